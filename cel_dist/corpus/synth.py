"""`cel corpus synth`: a whole corpus with lists, trials and a noise and room bank, out of nothing but a seed."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cel_dist.corpus import SAMPLE_RATE_HZ, espeak, noise_bank
from cel_dist.corpus.listing import write_lists
from cel_dist.corpus.randomness import generator
from cel_dist.corpus.recording import NUM_SESSIONS, Recording, Speaker, record_speaker
from cel_dist.corpus.voices import Voice, draw_voices
from cel_dist.data.pool import default_workers
from cel_dist.errors import CelError, RunError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_Work = Callable[[], list[Recording] | None]

_MARKER = "corpus.json"
# Raised whenever the same parameters give other audio, so that an older corpus is not taken for the present one.
_FORMAT = 1
_MIN_SPEAKERS = 6
_MAX_SPEAKERS = 2_000
_MAX_UTTERANCES = 1_000
_MIN_HELD_OUT = 2
_VALIDATION_SHARE, _TEST_SHARE = 0.08, 0.16


@dataclass(frozen=True)
class CorpusResult:
    """Where the parts of a finished corpus are."""

    out: Path
    speakers: int
    """Speakers in all three splits; those of the bank are not counted."""
    utterances: int
    """Utterances in all."""
    seconds_audio: float
    """Speech in all."""
    root: Path
    """Folder to which the lists and trials are relative."""
    train_list: Path
    train_labelled: Path
    validation_trials: Path
    test_trials: Path
    noise: Path
    """Bank of noises: folders noise, speech and music."""
    rir: Path
    """Bank of room impulse responses."""
    reused: bool
    """Whether the corpus was there already."""


@dataclass(frozen=True)
class _Parameters:
    format: int
    speakers: int
    utterances: int
    validation_speakers: int
    test_speakers: int
    seed: int


def synthesise_corpus(
    out: str | Path,
    *,
    speakers: int = 100,
    utterances: int = 20,
    held_out: tuple[int, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CorpusResult:
    """Make the embedded corpus, or reuse the one that is there.

    The files do not depend on `workers`. The corpus is built in a hidden folder beside `out`, which takes its name when
    everything is written: `out` is a whole corpus or none.

    Args:
        out: folder to make; it may exist if it is empty or holds the corpus of the same parameters.
        speakers: all speakers, at least 6.
        utterances: utterances of each speaker, at least 2; they are divided over two sessions.
        held_out: numbers of validation and of test speakers. Default: 8 % and 16 %, at least 2 each.
        seed: seed of everything that is drawn.
        workers: processes; 1 works in this process. Default: one a core.
        progress: called with the pieces of work done and their total.

    Raises:
        CelError: a number is out of range, `out` holds something else, or espeakng_loader is not installed.
        RunError: the speech engine fails, or the disk is full.
    """
    out = Path(out)
    parameters = _check_parameters(speakers, utterances, held_out, seed)
    if workers is not None and workers < 1:
        raise CelError(f"workers is {workers}; use at least 1")
    finished = _find_finished(out, parameters)
    if finished is not None:
        return finished
    espeak.check_available()
    with _staging(out) as folder:
        people, bank_voices = _draw_people(parameters)
        work: list[_Work] = [
            *(
                partial(record_speaker, folder / "speech", person, utterances=utterances, seed=seed)
                for person in people
            ),
            *(
                partial(noise_bank.write_share, folder / "bank", share, seed=seed, bank_voices=bank_voices)
                for share in noise_bank.shares()
            ),
        ]
        recordings = _work_off(work, workers or default_workers(), progress or (lambda done, total: None))
        write_lists(folder, people, recordings, seed=seed)
        # The marker comes last and vouches for the rest.
        totals = {"seconds_audio": round(sum(r.num_samples for r in recordings) / SAMPLE_RATE_HZ, 3)}
        (folder / _MARKER).write_text(json.dumps(asdict(parameters) | totals, indent=1) + "\n", encoding="utf-8")
    return _result(out, parameters, totals["seconds_audio"], reused=False)


def _check_parameters(speakers: int, utterances: int, held_out: tuple[int, int] | None, seed: int) -> _Parameters:
    if not _MIN_SPEAKERS <= speakers <= _MAX_SPEAKERS:
        raise CelError(f"speakers is {speakers}; use {_MIN_SPEAKERS} to {_MAX_SPEAKERS}, of whom some are held out")
    if not NUM_SESSIONS <= utterances <= _MAX_UTTERANCES:
        raise CelError(f"utterances is {utterances}; use {NUM_SESSIONS} (one a session) to {_MAX_UTTERANCES} a speaker")
    if seed < 0:
        raise CelError(f"seed is {seed}; use 0 or a positive number")
    validation, test = held_out or (
        max(_MIN_HELD_OUT, round(_VALIDATION_SHARE * speakers)),
        max(_MIN_HELD_OUT, round(_TEST_SHARE * speakers)),
    )
    if min(validation, test) < _MIN_HELD_OUT or speakers - validation - test < _MIN_HELD_OUT:
        raise CelError(
            f"held_out is ({validation}, {test}) of {speakers} speakers; leave at least {_MIN_HELD_OUT} each for "
            "validation, test and training"
        )
    return _Parameters(_FORMAT, speakers, utterances, validation, test, seed)


def _draw_people(parameters: _Parameters) -> tuple[list[Speaker], list[Voice]]:
    """The speakers with their splits, and the voices of the bank, all at a distance from each other."""
    voices = draw_voices(parameters.speakers + noise_bank.NUM_VOICES, parameters.seed)
    splits = ["validation"] * parameters.validation_speakers + ["test"] * parameters.test_speakers
    splits += ["train"] * (parameters.speakers - len(splits))
    order = generator(parameters.seed, "splits").permutation(parameters.speakers)
    people = [Speaker(number, f"spk{number:04d}", splits[place], voices[number]) for number, place in enumerate(order)]
    return people, voices[parameters.speakers :]


def read_corpus(folder: Path) -> CorpusResult | None:
    """The corpus that `synthesise_corpus` made in `folder`; None if it is anything else."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        seconds_audio = float(marker.pop("seconds_audio"))
        parameters = _Parameters(**marker)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _result(folder, parameters, seconds_audio, reused=True) if parameters.format == _FORMAT else None


def _find_finished(out: Path, parameters: _Parameters) -> CorpusResult | None:
    """The corpus in `out`, None if nothing is there. Raises CelError if it is anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise CelError(f"{out} is a file; give the name of a new folder")
    if not any(out.iterdir()):
        return None
    try:
        marker = json.loads((out / _MARKER).read_text(encoding="utf-8"))
        found = _Parameters(**{name: marker[name] for name in asdict(parameters)})
        seconds_audio = float(marker["seconds_audio"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CelError(f"{out} is not empty and holds no finished corpus; give another folder, or delete it") from None
    if found != parameters:
        differences = ", ".join(
            f"{name} {value} instead of {asdict(parameters)[name]}"
            for name, value in asdict(found).items()
            if value != asdict(parameters)[name]
        )
        raise CelError(f"{out} holds another corpus ({differences}); give another folder, or delete it")
    logger.info("%s holds this corpus already; it is used as it is", out)
    return _result(out, parameters, seconds_audio, reused=True)


def _result(out: Path, parameters: _Parameters, seconds_audio: float, *, reused: bool) -> CorpusResult:
    return CorpusResult(
        out=out,
        speakers=parameters.speakers,
        utterances=parameters.speakers * parameters.utterances,
        seconds_audio=seconds_audio,
        root=out / "speech",
        train_list=out / "train.txt",
        train_labelled=out / "train_labelled.txt",
        validation_trials=out / "validation_trials.txt",
        test_trials=out / "test_trials.txt",
        noise=out / "bank" / "noise",
        rir=out / "bank" / "rir",
        reused=reused,
    )


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends, and is deleted if it fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CelError(f"cannot write the corpus to {out}: {error.strerror}; give a folder you may write to") from None
    try:
        yield folder
        # A temporary folder is private to its owner; a corpus has the rights of any new folder.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        folder.replace(out)
    except OSError as error:
        raise RunError(f"cannot write the corpus to {out}: {error}; check the free space and the rights") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _work_off(work: Sequence[_Work], workers: int, progress: Progress) -> list[Recording]:
    """Do all pieces of work, and return what they recorded in the order of the pieces."""
    progress(0, len(work))
    results: list[list[Recording] | None] = []
    if workers == 1:
        for piece in work:
            results.append(piece())
            progress(len(results), len(work))
    else:
        # One engine a process, because its state is static. Spawned, because a forked process would inherit locks.
        pool = ProcessPoolExecutor(
            min(workers, len(work)), multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_parent
        )
        try:
            futures = [pool.submit(piece) for piece in work]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                progress(done, len(work))
            results = [future.result() for future in futures]
        except BrokenProcessPool:
            raise RunError("a process of the speech synthesis died; check the free memory, or use workers=1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [recording for result in results if result for recording in result]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
