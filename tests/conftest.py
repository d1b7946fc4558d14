"""What all tests share: where the reference data lies, and a corpus made once."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference numbers and real speech."""
    folder = Path(os.environ.get("CEL_SHARED", PROJECT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder}; set CEL_SHARED to the folder that holds golden/ and data/")
    return folder
