"""The documentation: it builds as a site, its links lead somewhere, and what it speaks of exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cel_dist.config import Config
from cel_dist.sweep.section import SweepSection

PROJECT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return [PROJECT / name for name in listed.stdout.splitlines()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; strict, so that a page or a section that a link leads to must exist."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="(https?://[^"]+)"', text)
        assert loaded == [], page
    # Pages from elsewhere in the checkout are linked where they are.
    assert 'href="benchmarks/results/claims.html"' in (site / "finetuning.html").read_text()
    assert "<math" in (site / "method.html").read_text()


def test_the_references_have_every_command_setting_and_public_function(site: Path) -> None:
    import importlib

    import typer

    from cel_dist.cli import app

    for name in app._COMMAND_MODULES:
        importlib.import_module(f"cel_dist.cli.{name}")
    commands = (site / "reference/commands.html").read_text()
    for name, command in typer.main.get_command(app.app).commands.items():
        for inner in getattr(command, "commands", {"": None}):
            assert f'id="{"-".join(filter(None, ("cel", name, inner)))}"' in commands
    settings = (site / "reference/settings.html").read_text()
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, section in {**sections, "sweep": SweepSection}.items():
        for key, field in section.model_fields.items():
            assert f"<code>{name}.{key}</code>" in settings
            assert field.description, f"{name}.{key} has no description"
    python = (site / "reference/python.html").read_text()
    for name in ("load_model", "SpeakerModel.embed", "EquilibriumLoss", "uniformity", "build_encoder", "eer"):
        assert re.search(rf'id="cel_dist\.[\w.]*{name}"', python), name


def test_links_between_files_of_the_checkout_lead_somewhere() -> None:
    missing = []
    for page in pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in LINK.findall(text):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(PROJECT)}: {target}")
    assert missing == []


def test_settings_in_the_documentation_exist() -> None:
    """What tutorials do not run: settings with a value, in text and tables."""
    known = {f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields}
    known |= {f"sweep.{key}" for key in SweepSection.model_fields}
    sections = {*Config.model_fields, "sweep"}
    unknown = []
    for page in pages():
        if page.name == "CHANGELOG.md":
            continue
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            for section, key in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)(?==)", code):
                if section in sections and f"{section}.{key}" not in known:
                    unknown.append(f"{page.relative_to(PROJECT)}: {section}.{key}")
    assert unknown == []
