"""The package as a whole: importing it is light, and rooms know only whom docs/architecture.md lets them know."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cel_dist

PACKAGE = Path(cel_dist.__file__).parent
HEAVY = {"torch", "torchaudio", "ray", "mlflow", "deepspeed", "webdataset"}

# Third-party package -> the only modules and folders of cel_dist that may import it.
IMPORTED_ONLY_BY = {
    "deepspeed": ("engine.py", "engine_checkpoint.py", "launcher/node.py", "process_group.py", "doctor/"),
    "mlflow": ("tracking/", "doctor/"),
    "ray": ("ray_cluster.py", "sweep/"),
    "optuna": ("sweep/",),
    "psutil": ("launcher/ranks.py", "losses/exchange.py", "doctor/"),
    "webdataset": ("data/stream.py", "doctor/"),
    "torchaudio": ("features.py", "data/speed.py", "corpus/catalogue.py", "doctor/"),
    "soundfile": ("data/audio.py", "corpus/", "doctor/"),
    "soxr": ("data/audio.py", "corpus/", "doctor/"),
    "fsspec": ("data/remote.py",),
    "aiohttp": ("data/remote.py",),
    "safetensors": ("model_folder.py", "training/classes.py"),
    "matplotlib": ("evaluation/plots.py", "sweep/plots.py"),
    "jinja2": ("report/", "sweep/summary.py"),
    "onnxruntime": ("export/",),
    "packaging": ("doctor/",),
    "espeakng_loader": ("corpus/",),
    "fastapi": ("service/",),
    "starlette": ("service/",),
    "uvicorn": ("service/",),
    "prometheus_client": ("service/",),
    "python_multipart": ("service/",),
    "typer": ("cli/",),
    "click": ("cli/",),
    "rich": ("cli/", "sweep/table.py", "training/display.py"),
}

# Room -> the rooms of cel_dist that it may import, besides itself.
MAY_KNOW = {
    "errors": set(),
    "plugins": {"errors"},
    "config": {"errors", "config_sections", "plugins"},
    "config_sections": set(),
    "distributed": {"errors"},
    "imports": set(),
    "features": {"errors", "mel"},
    "mel": set(),
    "random_state": set(),
    "metrics": {"errors"},
    "back_end": {"errors"},
    "config_file": {"errors", "config"},
    "encoders": {"errors", "plugins"},
    "losses": {"errors", "distributed", "plugins"},
    "published": {"errors", "encoders"},
    "watch": {"errors", "distributed"},
    "ray_cluster": {"errors", "data"},
    "process_group": {"errors", "config", "config_sections", "distributed", "imports", "watch"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names imported anywhere in a module, inside functions too, with their line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            # `from cel_dist import engine` imports a room as much as `from cel_dist.engine import Engine` does.
            parts = [f"cel_dist.{alias.name}" for alias in node.names] if node.module == "cel_dist" else [node.module]
            yield from ((part, node.lineno) for part in parts)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after a statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import cel_dist") & HEAVY


def test_the_numerics_load_neither_engine_nor_tracking() -> None:
    loaded = loaded_by("import cel_dist.features, cel_dist.encoders, cel_dist.losses, cel_dist.metrics")
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow", "deepspeed", "webdataset", "torchaudio"}


def test_the_launcher_of_a_node_loads_deepspeed_without_tracking() -> None:
    program = "import sys; sys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: pass"
    loaded = loaded_by(f"from cel_dist.launcher.node import main; {program}")
    assert loaded & {"deepspeed", "mlflow", "ray", "torchaudio", "yaml"} == {"deepspeed"}


@pytest.mark.parametrize("package", IMPORTED_ONLY_BY)
def test_a_third_party_package_is_imported_only_by_its_room(package: str) -> None:
    allowed = IMPORTED_ONLY_BY[package]
    strangers = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in modules()
        for name, line in imported_names(path)
        if name.partition(".")[0] == package and not path.relative_to(PACKAGE).as_posix().startswith(allowed)
    ]
    assert not strangers, f"only {', '.join(allowed)} may import {package}"


@pytest.mark.parametrize("room", MAY_KNOW)
def test_the_inner_rooms_do_not_know_the_outer_ones(room: str) -> None:
    files = [path for path in modules() if path.relative_to(PACKAGE).with_suffix("").parts[0] == room]
    assert files, f"there is no room called {room}"
    known = {name.split(".")[1] for path in files for name, _ in imported_names(path) if name.startswith("cel_dist.")}
    assert known - {room} <= MAY_KNOW[room]
