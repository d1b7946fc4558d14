"""What all tests share: where the reference data lies, and a corpus made once."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from audio_tree import write_bank_audio, write_tree, write_trials

from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference numbers and real speech."""
    folder = Path(os.environ.get("CEL_SHARED", PROJECT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder}; set CEL_SHARED to the folder that holds golden/ and data/")
    return folder


@dataclass(frozen=True)
class SmallCorpus:
    """Ten speakers with four utterances each, as audio, shards and trials, and a bank."""

    audio: Path
    shards: Path
    bank: Path
    trials: Path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """Made once, read by many; tests that damage files take a copy."""
    folder = tmp_path_factory.mktemp("small_corpus")
    audio = write_tree(folder / "audio", speakers=10, utterances=4)
    prepare(audio, folder / "shards", samples_per_shard=15, workers=1)
    prepare_bank(write_bank_audio(folder / "bank_audio"), folder / "bank", workers=1)
    trials = write_trials(folder / "trials.txt", speakers=10, utterances=2)
    return SmallCorpus(audio, folder / "shards", folder / "bank", trials)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests start processes of their own; OpenMP threads that spin for a core they do not get slow all of them down."""
    torch.set_num_threads(1)
