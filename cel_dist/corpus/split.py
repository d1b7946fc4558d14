"""Lists and trials for a tree of labelled recordings: `<speaker>/<session>/...` or `<speaker>/...`."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cel_dist.corpus.trials import Utterance, count_nontarget_pairs, count_target_pairs, draw_trials, write_trials
from cel_dist.data.sources import find_audio
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


def split_by_speaker(root: Path, out: Path, seed: int = 0) -> Split:
    """Divide a tree by speakers into a training list without labels and two lists of trials over held-out speakers.

    The first folder below `root` names the speaker, the second, if there is one, the session. Target trials cross
    sessions where every held-out speaker has two of them. Files whose names the lists cannot hold (with a tab or a line
    break, or not UTF-8) are left out and counted in the log; blanks in names are fine.

    Args:
        root: the tree.
        out: folder for `train.txt`, `validation_trials.txt` and `test_trials.txt`.
        seed: seed of the division and of the trials.

    Raises:
        CelError: there are fewer than 6 speakers, or too few utterances to draw trials from.
    """
    utterances = [_utterance(path) for path in _listable(root, find_audio(root))]
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_speaker[utterance.speaker].append(utterance)
    testable = sorted(speaker for speaker, spoken in by_speaker.items() if len(spoken) >= 2)
    if len(by_speaker) < MIN_SPEAKERS or len(testable) < 2 * MIN_HELD_OUT:
        raise CelError(
            f"{root} holds {len(by_speaker)} speakers, {len(testable)} of them with two recordings or more; lay the "
            f"files out as {root}/SPEAKER/..., with at least {MIN_SPEAKERS} speakers"
        )
    order = np.random.default_rng(seed).permutation(testable).tolist()
    num_validation = max(MIN_HELD_OUT, round(VALIDATION_SHARE * len(testable)))
    num_test = max(MIN_HELD_OUT, round(TEST_SHARE * len(testable)))
    held_out = {"validation": order[:num_validation], "test": order[num_validation : num_validation + num_test]}
    out.mkdir(parents=True, exist_ok=True)
    split = Split(root, out / "train.txt", out / "validation_trials.txt", out / "test_trials.txt")
    for name, path in (("validation", split.validation_trials), ("test", split.test_trials)):
        _write_trials(path, [utterance for speaker in held_out[name] for utterance in by_speaker[speaker]], seed)
    excluded = {speaker for speakers in held_out.values() for speaker in speakers}
    kept = [utterance.path for utterance in utterances if utterance.speaker not in excluded]
    split.train_list.write_text("".join(path + "\n" for path in kept), encoding="utf-8")
    return split


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
    # A list strips its lines, and a number sign begins a comment in it.
    listed = f"./{path}" if path[0] == "#" or path[0].isspace() else path
    return Utterance(listed, speaker, folders[0] if folders else "")


def _write_trials(path: Path, utterances: list[Utterance], seed: int) -> None:
    sessions: dict[str, set[str]] = defaultdict(set)
    for utterance in utterances:
        sessions[utterance.speaker].add(utterance.session)
    cross_session = all(len(own) > 1 for own in sessions.values())
    trials = draw_trials(
        utterances,
        num_target=min(MAX_TRIALS, count_target_pairs(utterances, cross_session=cross_session)),
        num_nontarget=min(MAX_TRIALS, count_nontarget_pairs(utterances, cross_session=cross_session)),
        seed=seed,
        cross_session=cross_session,
    )
    write_trials(path, trials)
