"""Trials: pairs of utterances of which it is known whether one speaker says both."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError
from cel_dist.evaluation.enrolment import Enrolment
from cel_dist.utterance import Excerpt

logger = logging.getLogger(__name__)

_NUMBERS = {"0": 0, "1": 1}
_WORDS = {"nontarget": 0, "target": 1, "imp": 0, "tgt": 1}

_CHUNK_CHARACTERS = 1 << 22
"""Of a list at once: enough to be quick, little enough to stay small whatever the length of the list."""

_END_OF_LINE = "\0"


@dataclass(frozen=True)
class Trials:
    """A list of trials over unique utterances, in the order of the list.

    An utterance is a file, or a model: what a speaker is enrolled with, which may be several files or parts of them.

    Attributes:
        files: the utterances, each once, as the list names them.
        labels: int8 [M], 1 for a target trial (same speaker) and 0 for a non-target trial.
        enrol: int32 [M], indices into `files`.
        test: int32 [M], indices into `files`.
        sources: what to embed for an utterance, by its name, with paths relative to the root; without an entry, the
            whole file of that name. The embedding of several is the mean of theirs.
        origin: name of the list.
    """

    files: list[str]
    labels: NDArray[np.int8]
    enrol: NDArray[np.int32]
    test: NDArray[np.int32]
    sources: Mapping[str, tuple[Excerpt, ...]] = field(default_factory=dict)
    origin: str = "trials"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def recordings(self) -> list[tuple[Excerpt, ...]]:
        """What to embed for each of `files`, at least one each."""
        return [self.sources.get(name) or (Excerpt(name),) for name in self.files]

    @property
    def paths(self) -> list[str]:
        """All files that are embedded, relative to the root, each once."""
        return list(dict.fromkeys(excerpt.path for excerpts in self.recordings for excerpt in excerpts))

    @property
    def first_paths(self) -> list[str]:
        """A file of each of `files`: its own path as the list has it, or that of the first file of a model."""
        return [
            name if len(excerpts) == 1 and excerpts[0].is_whole else excerpts[0].path
            for name, excerpts in zip(self.files, self.recordings, strict=True)
        ]

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], *, enrolment: Enrolment | None = None, test_folder: str = ""
    ) -> "Trials":
        """Read lines `label enrol test` with label 1 or 0, or `enrol test target|nontarget` (or `tgt|imp`).

        White space separates the columns; tabs do where names hold blanks (see `split_columns`).
        Empty lines, Windows line ends and a byte order mark are fine. A pair that is listed twice, in either order,
        counts twice, as in the published scoring, and is reported in the log. The list is read in parts, so that memory
        grows with the trials and the names, not with the text.

        Args:
            path: the list.
            enrolment: the models, whose names then stand in the place of enrolment files.
            test_folder: put before the names of test files that do not begin with it.

        Raises:
            CelError: the file cannot be read or is empty, a line has not three columns or an unknown label, a model is
                not enrolled or has the name of a file, a pair is listed both as target and as non-target, or all trials
                are of one class. Lines are named by number.
        """
        numbering = _Numbering()
        labels, pairs, numbers = [], [], []
        for first, text in _chunks(path):
            lines, label, names = _rows(text, first, path)
            if enrolment is not None:
                places = (f"{path}, line {line}" for line in lines)
                names[0::2] = enrolment.utterances(names[0::2], places)
            if test_folder:
                names[1::2] = [name if name.startswith(test_folder) else test_folder + name for name in names[1::2]]
            labels.append(np.fromiter(label, np.int8, len(lines)))
            pairs.append(np.fromiter(map(numbering.__getitem__, names), np.int32, len(names)).reshape(-1, 2))
            numbers.append(np.fromiter(lines, np.int32, len(lines)))
        if not len(numbering):
            raise CelError(f"{path} holds no trials; write one a line: label (1 or 0), enrolment file, test file")
        both = np.concatenate(pairs)
        sources = {} if enrolment is None else enrolment.sources
        if enrolment is not None:
            names = list(numbering)
            enrolment.require_own_names(names[number] for number in np.unique(both[:, 1]))
        trials = cls(
            list(numbering),
            np.concatenate(labels),
            np.ascontiguousarray(both[:, 0]),
            np.ascontiguousarray(both[:, 1]),
            {name: sources[name] for name in numbering if name in sources},
            Path(path).name,
        )
        lines_at = np.concatenate(numbers)
        if trials.labels.min() == trials.labels.max():
            kind = "target" if trials.labels[0] else "non-target"
            raise CelError(
                f"all {len(trials)} trials of {path} (line {lines_at[0]} and on) are {kind} trials; error rates need "
                "both kinds, add trials with the other label"
            )
        _check_repeated_pairs(trials, lines_at, path)
        return trials


class _Numbering(dict[str, int]):
    """Names to consecutive numbers, in the order in which they are first asked for."""

    def __missing__(self, name: str) -> int:
        number = self[name] = len(self)
        return number


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


def _chunks(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Some whole lines at a time, and the number of the first."""
    try:
        # utf-8-sig drops a byte order mark; universal newlines take care of Windows line ends.
        with open(path, encoding="utf-8-sig") as file:
            number = 1
            while text := file.read(_CHUNK_CHARACTERS):
                text += file.readline()
                yield number, text
                number += text.count("\n")
    except OSError as error:
        raise CelError(f"cannot read the trials file {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise CelError(f"the trials file {path} is not UTF-8 text; check that it is the list and not audio") from None


def _rows(text: str, first: int, path: str | os.PathLike[str]) -> tuple[Sequence[int], Iterable[int], list[str]]:
    """The numbers of the lines that are not empty, their labels, and their names: enrolment, test, enrolment, ..."""
    # Lines of one form, as nearly all are, are taken all at once: a list a line would cost several times as much. The
    # mark at the end of each tells that every line has three columns, and not one two and another four.
    text += "" if text.endswith("\n") else "\n"
    tokens = text.replace("\n", f" {_END_OF_LINE}\n").split()
    marks = tokens[3::4]
    num_lines = text.count("\n")
    if len(tokens) == 4 * num_lines and marks.count(_END_OF_LINE) == num_lines:
        del tokens[3::4]
        lines = range(first, first + num_lines)
        ones, threes = tokens[0::3], tokens[2::3]
        if _WORDS.keys() >= set(threes):
            del tokens[2::3]
            return lines, map(_WORDS.__getitem__, threes), tokens
        if _NUMBERS.keys() >= set(ones) and _WORDS.keys().isdisjoint(threes):
            del tokens[0::3]
            return lines, map(_NUMBERS.__getitem__, ones), tokens
    kept = [(number, line) for number, line in enumerate(text.split("\n"), start=first) if line.strip()]
    rows = [_parse(line, f"{path}, line {number}") for number, line in kept]
    names = [name for _, enrol, test in rows for name in (enrol, test)]
    return [number for number, _ in kept], [label for label, _, _ in rows], names


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


def _check_repeated_pairs(trials: Trials, numbers: NDArray[np.int32], path: str | os.PathLike[str]) -> None:
    # Two utterances are of one speaker or of two, whichever of them is enrolled.
    first_side, second_side = np.minimum(trials.enrol, trials.test), np.maximum(trials.enrol, trials.test)
    pairs = first_side.astype(np.int64) * len(trials.files) + second_side
    ordered = np.sort(pairs)
    # Most lists repeat nothing, which sorting shows in a fraction of the time that it takes to say what.
    if not (ordered[1:] == ordered[:-1]).any():
        return
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(pairs)))
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
