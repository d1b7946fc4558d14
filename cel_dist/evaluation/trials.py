"""Trials: pairs of utterances of which it is known whether one speaker says both."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError

logger = logging.getLogger(__name__)

_NUMBERS = {"0": 0, "1": 1}
_WORDS = {"nontarget": 0, "target": 1}


@dataclass(frozen=True)
class Trials:
    """A list of trials over unique files, in the order of the list.

    Attributes:
        files: the utterances, each once, as the list names them.
        labels: int8 [M], 1 for a target trial (same speaker) and 0 for a non-target trial.
        enrol: int32 [M], indices into `files`.
        test: int32 [M], indices into `files`.
    """

    files: list[str]
    labels: NDArray[np.int8]
    enrol: NDArray[np.int32]
    test: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Trials":
        """Read lines `label enrol test` with label 1 or 0, or `enrol test target|nontarget`.

        White space separates the columns; tabs do where names hold blanks (see `split_columns`).
        Empty lines, Windows line ends and a byte order mark are fine. A pair that is listed twice counts twice, as
        in the published scoring, and is reported in the log.

        Raises:
            CelError: the file cannot be read or is empty, a line has not three columns or an unknown label, a pair is
                listed both as target and as non-target, or all trials are of one class. Lines are named by number.
        """
        index: dict[str, int] = {}
        rows: list[tuple[int, int, int]] = []
        numbers: list[int] = []
        for number, line in enumerate(_read_lines(path), start=1):
            if not line.strip():
                continue
            label, enrol, test = _parse(line, f"{path}, line {number}")
            rows.append((label, index.setdefault(enrol, len(index)), index.setdefault(test, len(index))))
            numbers.append(number)
        if not rows:
            raise CelError(f"{path} holds no trials; write one a line: label (1 or 0), enrolment file, test file")
        columns = np.array(rows, dtype=np.int32)
        trials = cls(list(index), columns[:, 0].astype(np.int8), columns[:, 1], columns[:, 2])
        if trials.labels.min() == trials.labels.max():
            kind = "target" if trials.labels[0] else "non-target"
            raise CelError(
                f"all {len(trials)} trials of {path} (line {numbers[0]} and on) are {kind} trials; error rates need "
                "both kinds, add trials with the other label"
            )
        _check_repeated_pairs(trials, np.array(numbers), path)
        return trials


def split_columns(line: str, count: int) -> list[str]:
    """The columns of a line: what white space separates or, if that is not `count` columns and tabs make it so, tabs.

    >>> split_columns("1 a.wav b.wav", 3)
    ['1', 'a.wav', 'b.wav']
    >>> split_columns("1\\tAnn Lee/1.wav\\tAnn Lee/2.wav", 3)
    ['1', 'Ann Lee/1.wav', 'Ann Lee/2.wav']
    """
    columns = line.split()
    if len(columns) != count and line.count("\t") == count - 1:
        tabbed = [column.strip() for column in line.split("\t")]
        return tabbed if all(tabbed) else columns
    return columns


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        # utf-8-sig drops a byte order mark; universal newlines take care of Windows line ends.
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise CelError(f"cannot read the trials file {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise CelError(f"the trials file {path} is not UTF-8 text; check that it is the list and not audio") from None


def _parse(line: str, place: str) -> tuple[int, str, str]:
    columns = split_columns(line, 3)
    if len(columns) != 3:
        raise CelError(
            f"{place}: {len(columns)} columns instead of 3; write 'label enrol test' or 'enrol test target|nontarget', "
            "with tabs between the columns if file names hold spaces"
        )
    first, second, third = columns
    if third in _WORDS:
        return _WORDS[third], first, second
    if first in _NUMBERS:
        return _NUMBERS[first], second, third
    raise CelError(
        f"{place}: no label in '{line.strip()}'; the first column must be 1 or 0, or the last one target or nontarget"
    )


def _check_repeated_pairs(trials: Trials, numbers: NDArray[np.int64], path: str | os.PathLike[str]) -> None:
    pairs = trials.enrol.astype(np.int64) * len(trials.files) + trials.test
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(pairs)))
    if len(repeated) == 0:
        return
    originals = first[inverse[repeated]]
    contradicting = np.flatnonzero(trials.labels[repeated] != trials.labels[originals])
    if len(contradicting):
        worst = contradicting[0]
        raise CelError(
            f"{path}, line {numbers[repeated[worst]]}: the pair of line {numbers[originals[worst]]} with the other "
            "label; remove the wrong one"
        )
    logger.warning(
        "%s: %d trials repeat an earlier one (first: line %d repeats line %d); each counts as often as it is listed",
        path,
        len(repeated),
        numbers[repeated[0]],
        numbers[originals[0]],
    )
