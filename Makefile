# PYTHON makes the virtual environment; to change it later, remove .venv first.
PYTHON ?= python3
export PYTHON

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs docs-serve dist clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Put everything into .venv; does nothing when that is done
	@bash scripts/install.sh

demo: install ## Train on the embedded corpus and write a report to demo/
	$(BIN)/cel demo --out demo

test: lint ## Check the style and the types, then run all tests
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=15

lint: install ## Check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install ## Build the documentation as a site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: install ## Show the documentation at http://127.0.0.1:8000 while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: install ## Build the wheel and the sdist of a release, dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## Remove caches and build outputs; keep .venv, runs and demo
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
