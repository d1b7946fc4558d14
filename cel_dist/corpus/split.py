"""Lists and trials for a tree of labelled recordings: `<speaker>/<session>/...` or `<speaker>/...`."""

import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cel_dist.corpus.trials import (
    Trial,
    Utterance,
    count_nontarget_pairs,
    count_target_pairs,
    draw_trials,
    write_trials,
)
from cel_dist.data.files import atomic_write, require_folder_or_nothing, writing_into
from cel_dist.data.sources import find_audio, read_labels
from cel_dist.errors import CelError

VALIDATION_SHARE, TEST_SHARE = 0.08, 0.16
MIN_HELD_OUT = 2
MIN_SPEAKERS = 6
MAX_TRIALS = 2_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Lists of a split corpus; paths in them are relative to `root`."""

    root: Path
    train_list: Path
    validation_trials: Path
    test_trials: Path


@dataclass(frozen=True)
class HeldOut:
    """Trials of speakers none of whom is trained on; paths in them are relative to `root`."""

    root: Path
    validation_trials: Path
    test_trials: Path


def split_by_speaker(root: Path, out: Path, seed: int = 0, labels: Path | None = None) -> Split:
    """Divide a tree by speakers into a training list without labels and two lists of trials over held-out speakers.

    The first folder below `root` names the speaker, the second, if there is one, the session; or `labels` names the
    speakers, and folders are sessions. Target trials cross sessions where every held-out speaker has two of them. Files
    without a speaker, because they lie in `root` itself, are for training. Files whose names the lists cannot hold
    (with a tab or a line break, or not UTF-8) are left out and counted in the log; blanks in names are fine.

    Args:
        root: the tree.
        out: folder for `train.txt`, `validation_trials.txt` and `test_trials.txt`.
        seed: seed of the division and of the trials.
        labels: file with a line `path speaker` for every audio file.

    Raises:
        CelError: there are fewer than 6 speakers, or too few utterances to draw trials from; `labels` is faulty; `out`
            is a file.
        RunError: `out` cannot be written.
    """
    require_folder_or_nothing(out)
    utterances = labelled_utterances(root, labels)
    by_speaker, order = _shuffled_speakers(root, utterances, seed, labels)
    num_validation = max(MIN_HELD_OUT, round(VALIDATION_SHARE * len(order)))
    num_test = max(MIN_HELD_OUT, round(TEST_SHARE * len(order)))
    excluded = set(order[: num_validation + num_test])
    kept = [utterance.path for utterance in utterances if utterance.speaker not in excluded]
    if not kept:
        raise CelError(f"{root} leaves no speaker to train on beside {len(excluded)} held-out ones; add speakers")
    split = Split(root, out / "train.txt", out / "validation_trials.txt", out / "test_trials.txt")
    parts = {split.validation_trials: order[:num_validation], split.test_trials: order[num_validation:][:num_test]}
    drawn = _drawn(parts, by_speaker, seed)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        for path, trials in drawn.items():
            write_trials(path, trials)
        with atomic_write(split.train_list) as file:
            file.write("".join(path + "\n" for path in kept).encode())
    return split


def hold_out_all(root: Path, out: Path, seed: int = 0, labels: Path | None = None) -> HeldOut:
    """Divide the speakers of a tree, all of whom are held out because something else is trained on, into those of
    `validation_trials.txt` and those of `test_trials.txt`, half each; arguments and errors as `split_by_speaker`."""
    require_folder_or_nothing(out)
    by_speaker, order = _shuffled_speakers(root, labelled_utterances(root, labels), seed, labels)
    half = len(order) // 2
    made = HeldOut(root, out / "validation_trials.txt", out / "test_trials.txt")
    drawn = _drawn({made.validation_trials: order[:half], made.test_trials: order[half:]}, by_speaker, seed)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        for path, trials in drawn.items():
            write_trials(path, trials)
    return made


def _shuffled_speakers(
    root: Path, utterances: Sequence[Utterance], seed: int, labels: Path | None
) -> tuple[dict[str, list[Utterance]], list[str]]:
    """What each speaker said, and in random order the speakers who said two things or more.

    Raises:
        CelError: there are too few.
    """
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        if utterance.speaker:
            by_speaker[utterance.speaker].append(utterance)
    testable = sorted(speaker for speaker, spoken in by_speaker.items() if len(spoken) >= 2)
    if len(by_speaker) < MIN_SPEAKERS or len(testable) < 2 * MIN_HELD_OUT:
        lay_out = f"lay the files out as {root}/SPEAKER/..." if labels is None else f"label more files in {labels}"
        raise CelError(
            f"{root} holds {len(by_speaker)} speakers, {len(testable)} of them with two recordings or more; {lay_out}, "
            f"with at least {MIN_SPEAKERS} speakers"
        )
    return by_speaker, np.random.default_rng(seed).permutation(testable).tolist()


def _drawn(
    parts: Mapping[Path, Sequence[str]], by_speaker: Mapping[str, list[Utterance]], seed: int
) -> dict[Path, list[Trial]]:
    return {
        path: _draw([utterance for speaker in speakers for utterance in by_speaker[speaker]], seed)
        for path, speakers in parts.items()
    }


def trials_of_tree(
    root: Path,
    out: Path,
    *,
    num_target: int | None = None,
    num_nontarget: int | None = None,
    seed: int = 0,
    labels: Path | None = None,
) -> Counter[int]:
    """Draw trials from all labelled recordings of a tree and write them; speakers and sessions as `split_by_speaker`.

    Args:
        root: the tree.
        out: the file to write; it appears whole or not at all.
        num_target: trials of one speaker; None: as many as there are, up to 2000.
        num_nontarget: trials of two speakers, likewise.
        seed: same tree, numbers and seed, same trials.
        labels: file with a line `path speaker` for every audio file.

    Returns:
        How many trials there are of label 1 and of label 0.

    Raises:
        CelError: no speaker has two recordings, or there is only one; more trials are asked for than are possible;
            `labels` is faulty; `out` is a folder.
        RunError: `out` cannot be written.
    """
    if out.is_dir():
        raise CelError(f"{out} is a folder; give the name of a file to write, such as {out / 'trials.txt'}")
    require_folder_or_nothing(out.parent)
    utterances = [utterance for utterance in labelled_utterances(root, labels) if utterance.speaker]
    counts = Counter(utterance.speaker for utterance in utterances)
    repeated = sum(count > 1 for count in counts.values())
    if len(counts) < 2 or not repeated:
        raise CelError(
            f"{root} holds {len(counts)} speakers, {repeated} of them with two recordings or more; trials need two "
            f"speakers, one with two recordings: lay the files out as {root}/SPEAKER/..., or give --labels"
        )
    trials = _draw(utterances, seed, num_target, num_nontarget)
    with writing_into(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_trials(out, trials)
    return Counter(trial.label for trial in trials)


def labelled_utterances(root: Path, labels: Path | None = None) -> list[Utterance]:
    """All audio of a tree that a list can name, with speakers and sessions by its folders, or by a file of labels.

    Raises:
        CelError: there is no audio, or `labels` is faulty.
    """
    paths = _listable(root, find_audio(root))
    if labels is None:
        utterances = [_utterance(path) for path in paths]
        unknown = [utterance.path for utterance in utterances if not utterance.speaker]
        if unknown:
            logger.warning(
                "%d files lie in %s itself, not in the folder of a speaker, the first is %s; they are in no trial",
                len(unknown),
                root,
                unknown[0],
            )
        return utterances
    speakers = read_labels(labels, paths)
    return [
        Utterance(_listed(path), speaker, posixpath.dirname(path))
        for path, speaker in zip(paths, speakers, strict=True)
    ]


def _listable(root: Path, paths: Sequence[str]) -> list[str]:
    listable = [path for path in paths if _is_listable(path)]
    odd = len(paths) - len(listable)
    if odd:
        first = next(path for path in paths if not _is_listable(path))
        logger.warning(
            "left out %d of %d files below %s, the first is %s; rename them: UTF-8, without tabs and line breaks",
            odd,
            len(paths),
            root,
            ascii(first),
        )
    return listable


def _is_listable(path: str) -> bool:
    if set(path) & set("\t\r\n"):
        return False
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _utterance(path: str) -> Utterance:
    speaker, *folders, _ = path.split("/") if "/" in path else ("", path)
    return Utterance(_listed(path), speaker, folders[0] if folders else "")


def _listed(path: str) -> str:
    # A list strips its lines, and a number sign begins a comment in it.
    return f"./{path}" if path[0] == "#" or path[0].isspace() else path


def _draw(
    utterances: list[Utterance], seed: int, num_target: int | None = None, num_nontarget: int | None = None
) -> list[Trial]:
    sessions: dict[str, set[str]] = defaultdict(set)
    for utterance in utterances:
        sessions[utterance.speaker].add(utterance.session)
    cross_session = all(len(own) > 1 for own in sessions.values())
    if num_target is None:
        num_target = min(MAX_TRIALS, count_target_pairs(utterances, cross_session=cross_session))
    if num_nontarget is None:
        num_nontarget = min(MAX_TRIALS, count_nontarget_pairs(utterances, cross_session=cross_session))
    return draw_trials(
        utterances, num_target=num_target, num_nontarget=num_nontarget, seed=seed, cross_session=cross_session
    )
