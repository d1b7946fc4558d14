"""What a release says of itself beside its code: citation, licences, security, the card of a model."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
import yaml
from commands import cel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cel_dist

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", PROJECT / "scripts" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> dict[str, str]:
    """Packages of the page and their licences."""
    table = (PROJECT / "docs" / "licences.md").read_text().split("## All packages")[1]
    rows = re.findall(r"^\| \[?([\w.-]+)(?:\]\([^)]+\))? \| ([^|]+) \| [^|]+ \|$", table, re.MULTILINE)
    return {canonicalize_name(name): terms for name, terms in rows if name not in ("package", "---")}


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PYPROJECT["version"] == cel_dist.__version__
    assert citation["license"] == PYPROJECT["license"]
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"] == PYPROJECT["urls"]["Paper"]


def test_every_package_that_users_get_is_listed_with_its_licence(licences: ModuleType) -> None:
    needed = [*PYPROJECT["dependencies"]]
    for extra in licences.EXTRAS:
        needed += PYPROJECT["optional-dependencies"][extra]
    assert set(licences.EXTRAS) == PYPROJECT["optional-dependencies"].keys() - {"docs", "dev"}
    found = listed()
    assert {canonicalize_name(Requirement(line).name) for line in needed} - found.keys() == set()
    assert licences.closure().keys() - found.keys() == set()
    assert all(terms.strip() for terms in found.values())


def test_a_licence_is_taken_from_where_the_metadata_have_it(licences: ModuleType) -> None:
    from importlib.metadata import distribution

    known = {"numpy": "BSD-3-Clause", "soxr": "LGPL", "certifi": "Mozilla", "torch": "BSD"}
    for name, words in known.items():
        assert words in licences.licence(distribution(name)), name
    page = (PROJECT / "docs" / "licences.md").read_text()
    beyond = page.split("## All packages")[0]
    for name in ("soxr", "certifi", "libsndfile", "espeak-ng"):
        assert name in beyond


def test_the_page_of_model_cards_has_the_headings_that_cards_have() -> None:
    from test_model_card import described

    from cel_dist.model_card import model_card

    card = model_card(described({"data": {"shards": "s", "bank": "b"}}), "cel")
    page = (PROJECT / "docs" / "model_card.md").read_text()
    headings = re.findall(r"^## (.+)$", card, re.MULTILINE)
    assert headings[:1] == ["Measured"]
    for heading in headings:
        assert f"**{heading}**" in page


def test_the_command_says_which_version_it_is(tmp_path: Path) -> None:
    code, out, err = cel("--version", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"cel_dist {re.escape(cel_dist.__version__)}( \(git:[0-9a-f]{{40}}(\+changed)?\))?\n", out)
