"""The version of the code, asked of real repositories."""

import shutil
import subprocess
import sys
from pathlib import Path

import cel_dist.code_version

ASK = "import cel_dist.code_version as c, sys; print(c.__file__); print(c.code_version())"


def asked(checkout: Path, **environment: str) -> str:
    search = {"PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=checkout, env=search, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.splitlines()
    assert Path(file).parent.parent == checkout
    return version


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_code_is_a_commit_only_in_its_own_repository(tmp_path: Path) -> None:
    package = tmp_path / "cel_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(cel_dist.code_version.__file__, package)
    assert asked(tmp_path).startswith("cel_dist ")
    # Somebody else's repository, in which the package merely lies.
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "other")
    assert asked(tmp_path).startswith("cel_dist ")
    git(tmp_path, "add", "cel_dist/__init__.py", "cel_dist/code_version.py")
    git(tmp_path, "commit", "--quiet", "--message", "own")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert asked(tmp_path) == f"git:{commit}"
    # A hook of another repository.
    git(tmp_path, "init", "--quiet", "other")
    assert asked(tmp_path, GIT_DIR=str(tmp_path / "other" / ".git")) == f"git:{commit}"
    (package / "__init__.py").write_text("changed = True\n")
    assert asked(tmp_path) == f"git:{commit}+changed"
