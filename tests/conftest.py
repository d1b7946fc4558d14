"""What all tests share: where the reference data lies, and a corpus made once."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from audio_tree import write_bank_audio, write_tree, write_trials
from prepare_corpus import NAMES, speaker_of, write_corpus

from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank

PROJECT = Path(__file__).resolve().parent.parent

# What a shell starts in the background ignores Ctrl-C, and so would all the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Beside other tests a dozen imports of torch at once take as long as they take.
os.environ.setdefault("CEL_DOCTOR_TIMEOUT", "240")

# Begun first, so that none of them is left alone at the end: files that take long, those that compute and those that
# wait by turns, so that they run beside each other.
LONGEST = (
    "test_killed_runs",
    "test_sweep",
    "test_tutorials",
    "test_cable",
    "test_finetuning",
    "test_stream_kills",
    "test_training",
    "test_two_hosts",
    "test_run_failures",
    "test_tracking_server",
    "test_serving",
    "test_launcher",
    "test_launch_tree",
    "test_watchdog",
    "test_resuming",
    "test_service",
    "test_registry",
    "test_export",
    "test_demo",
    "test_launch",
    "test_stages",
    "test_real_speech",
    "test_plugins",
    "test_terminal",
    "test_encoder_training",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by `LONGEST`; within a file, and of the others, nothing changes."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 20 files with odd names, as `prepare_corpus` describes it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speakers of `corpus`."""
    path = tmp_path_factory.mktemp("labels") / "labels"
    path.write_text("".join(f"{name} {speaker_of(name)}\n" for name in NAMES), encoding="utf-8")
    return path


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB in the test's folder, of its own file system."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        # Lazily: a thread that fetches ahead may hold a file a moment longer.
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests start processes of their own; OpenMP threads that spin for a core they do not get slow all of them down."""
    torch.set_num_threads(1)
