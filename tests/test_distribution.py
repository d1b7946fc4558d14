"""The files of a release: built as `make dist` does, compared with the checkout, and run outside of it."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib

import cel_dist

PROJECT = Path(__file__).resolve().parent.parent
# What git needs and whoever unpacks a release does not.
ONLY_IN_GIT = {".gitignore", ".ci/run"}
# What setuptools adds to an sdist.
ADDED = re.compile(r"(PKG-INFO|setup\.cfg|cel_dist\.egg-info/[\w.-]+)")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package build is not installed")


@dataclass(frozen=True)
class Distribution:
    checkout: Path
    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Installed:
    """A wheel that was unpacked by pip, and a shell's environment in which it is the only cel_dist."""

    site: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name and (PROJECT / name).exists()}


def build(source: Path, out: Path, *what: str) -> Path:
    """Without isolation and so without a network: setuptools is that of this environment."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Built in a copy of the checkout, in which somebody has worked."""
    folder = tmp_path_factory.mktemp("distribution")
    checkout = folder / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, checkout / name)
    left_behind = (
        "docker/server.env", "tests/__pycache__/a.pyc", "cel_dist/__pycache__/a.pyc", "docs/.draft.md.swp",
        "configs/.private/a.yaml", "demo/corpus/a.wav", "runs/a/model.json",
    )  # fmt: skip
    for left in left_behind:
        (checkout / left).parent.mkdir(parents=True, exist_ok=True)
        (checkout / left).write_text("not for others")
    out = build(checkout, folder / "dist")
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    assert sorted(out.iterdir()) == sorted([wheel, sdist])
    return Distribution(checkout, wheel, sdist)


def members(sdist: Path) -> dict[str, bytes]:
    """Files of an sdist without its top folder."""
    with tarfile.open(sdist) as tar:
        files = [member for member in tar.getmembers() if not member.isdir()]
        return {member.name.partition("/")[2]: tar.extractfile(member).read() for member in files}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_holds_the_checkout_and_nothing_else(distribution: Distribution) -> None:
    found = {name: data for name, data in members(distribution.sdist).items() if not ADDED.fullmatch(name)}
    assert found.keys() == tracked() - ONLY_IN_GIT
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"} <= found.keys()
    changed = [name for name, data in found.items() if data != (PROJECT / name).read_bytes()]
    assert changed == []


def test_the_wheel_holds_the_package_and_nothing_else(distribution: Distribution) -> None:
    found = contents(distribution.wheel)
    package = {name for name in tracked() if name.startswith("cel_dist/")}
    assert {name for name in found if ".dist-info/" not in name} == package
    assert [name for name in package if found[name] != (PROJECT / name).read_bytes()] == []
    (licence,) = (name for name in found if name.endswith(".dist-info/licenses/LICENSE"))
    assert found[licence] == (PROJECT / "LICENSE").read_bytes()


def test_the_sdist_alone_makes_the_same_wheel(distribution: Distribution, tmp_path: Path) -> None:
    with tarfile.open(distribution.sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    # `build` makes the wheel of an sdist; this one is made of the checkout.
    (of_the_checkout,) = build(distribution.checkout, tmp_path / "checkout", "--wheel").iterdir()
    (of_the_sdist,) = build(source, tmp_path / "sdist", "--wheel").iterdir()
    assert contents(of_the_sdist) == contents(of_the_checkout) == contents(distribution.wheel)


def test_the_metadata_say_what_it_is(distribution: Distribution) -> None:
    found = contents(distribution.wheel)
    (name,) = (name for name in found if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(found[name])
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"] == cel_dist.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (PROJECT / "README.md").read_text().strip()
    assert set(metadata.get_all("Classifier")) == set(project["classifiers"])
    assert all("License ::" not in line for line in project["classifiers"])
    assert len(metadata.get_all("Requires-Dist")) == len(project["dependencies"]) + sum(
        map(len, project["optional-dependencies"].values())
    )


@pytest.fixture(scope="module")
def installed(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a folder of its own, which comes before the checkout that this environment has installed."""
    site = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    done = subprocess.run([*command, str(distribution.wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW_"))}
    return Installed(site, {**kept, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})


def test_it_runs_in_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    program = "import cel_dist, cel_dist.code_version as c; print(cel_dist.__file__); print(c.code_version())"
    file, code = installed.run(sys.executable, "-c", program, cwd=tmp_path).splitlines()
    assert Path(file) == installed.site / "cel_dist" / "__init__.py"
    # It lies in no repository of its own, so its models name the version.
    assert code == f"cel_dist {cel_dist.__version__}"
    # What pip made for `cel`, with the interpreter of this environment.
    cel = str(installed.site / "bin" / "cel")
    assert "demo" in installed.run(cel, "--help", cwd=tmp_path)
    assert installed.run(cel, "config", "schema", cwd=tmp_path) == (PROJECT / "configs/cel.schema.json").read_text()


DEMO = """
import sys
from pathlib import Path

import cel_dist
from cel_dist.demo import run_demo

result = run_demo(Path("demo"), Path(sys.argv[1]), overrides=tuple(sys.argv[2:]))
print(cel_dist.__file__)
print(result.report)
print(result.model_uri)
"""


def test_the_demo_runs_with_two_ranks_and_registers_the_code_that_ran(
    installed: Installed, small_corpus, tmp_path: Path
) -> None:
    """All of `cel demo`, on fewer speakers and for fewer steps than its command line allows."""
    short = ("train.max_steps=4", "train.batch_size=8", "data.segment_frames=60", "data.workers=0", "train.threads=1")
    out = installed.run(sys.executable, "-c", DEMO, str(small_corpus.audio), *short, cwd=tmp_path)
    file, report, model = out.splitlines()[-3:]
    assert Path(file).is_relative_to(installed.site)
    assert "<svg" in (tmp_path / report).read_text()
    assert model.startswith("models:/cel-demo/")
    (stored,) = tmp_path.rglob("code/cel_dist/report/run.html.j2")
    assert stored.read_bytes() == (PROJECT / "cel_dist/report/run.html.j2").read_bytes()
