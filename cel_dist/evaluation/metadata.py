"""What is known of the utterances of a list besides their sound: speaker, session, sex, duration, age.

A table is a text file with a header, columns separated by tabs, an utterance a line:

    path                 speaker  session  sex  seconds  age
    id1/session1/1.flac  id1      session1 f    4.25     31

`path` and at least one of the others must be there, other columns are passed over. `gender` is another name for `sex`,
and `duration` for `seconds`. A list without a header has lines `path speaker`.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError
from cel_dist.evaluation.trials import Trials

_ALIASES = {"gender": "sex", "duration": "seconds"}
_SEXES = {"f": "f", "female": "f", "m": "m", "male": "m"}
_UNKNOWN = {"", "-", "?", "na", "n/a", "nan", "none", "null", "unk", "unknown"}


@dataclass(frozen=True)
class Metadata:
    """Columns over the N files of a list, in its order; None where the table has no such column.

    Attributes:
        source: the table's path, for messages.
        speaker: str [N], "" where unknown.
        session: str [N], "" where unknown. Names need to be unique only among the sessions of one speaker.
        sex: str [N], "f" or "m", "" for everything else.
        seconds: float64 [N], duration of the utterance, NaN where unknown.
        age: float64 [N], years, NaN where unknown.
    """

    source: str
    speaker: NDArray[np.str_] | None = None
    session: NDArray[np.str_] | None = None
    sex: NDArray[np.str_] | None = None
    seconds: NDArray[np.float64] | None = None
    age: NDArray[np.float64] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str], files: Sequence[str]) -> "Metadata":
        """Read the rows of `files`; rows of other files are passed over.

        Windows line ends, empty lines and a byte order mark are fine.

        Args:
            path: the table, as the module says.
            files: the utterances, called as in the first column of the table.

        Raises:
            CelError: the table cannot be read, has no usable header, a line with another number of columns, a file
                twice or a value that is no number where one is needed; or lacks some of `files`.
        """
        lines = _lines(path)
        if not lines:
            raise CelError(f"{path} is empty; write a header with 'path', and a line an utterance")
        if "path" in _header(lines[0][1]):
            columns, rows = _read_table(path, lines)
        else:
            columns, rows = ["speaker"], _read_list(path, lines)
        missing = [name for name in files if name not in rows]
        if missing:
            raise CelError(
                f"{path} lacks {len(missing)} of the {len(files)} utterances of the trials, the first is {missing[0]}; "
                "write paths there as in the trials"
            )
        chosen = [rows[name] for name in files]
        values: dict[str, Any] = {}
        for place, name in enumerate(columns):
            convert = _CONVERSIONS.get(name)
            if convert is not None:
                values[name] = np.array([convert(row[place], name, number, path) for number, row in chosen])
        return cls(str(path), **values)

    def check(self, trials: Trials) -> None:
        """Raise CelError where trials and table contradict each other.

        A target trial must have one speaker and one sex, a non-target trial two speakers, as far as they are known.

        Args:
            trials: those over whose files the metadata was read.
        """
        targets = trials.labels == 1
        for what, column in (("speaker", self.speaker), ("sex", self.sex)):
            if column is None:
                continue
            numbers = name_numbers(column)
            enrol, test = numbers[trials.enrol], numbers[trials.test]
            known = (enrol >= 0) & (test >= 0)
            self._refuse(trials, known & targets & (enrol != test), what, column)
            if what == "speaker":
                self._refuse(trials, known & ~targets & (enrol == test), what, column)

    def _refuse(self, trials: Trials, wrong: NDArray[np.bool_], what: str, column: NDArray[np.str_]) -> None:
        if not wrong.any():
            return
        first = int(np.argmax(wrong))
        enrol, test = int(trials.enrol[first]), int(trials.test[first])
        kind = "target" if trials.labels[first] == 1 else "non-target"
        pair = f"{trials.files[enrol]} and {trials.files[test]}"
        raise CelError(
            f"{self.source} contradicts {np.count_nonzero(wrong)} trials: {pair} are a {kind} trial, but have {what} "
            f"'{column[enrol]}' and '{column[test]}'; correct the table or the list"
        )


def name_numbers(names: NDArray[np.str_]) -> NDArray[np.int64]:
    """A number [N] for each name, equal for equal names, and -1 for "": numbers of millions of trials fit in memory.

    >>> name_numbers(np.array(["b", "", "a", "b"]))
    array([ 1, -1,  0,  1])
    """
    known = names != ""
    numbers = np.full(len(names), -1, np.int64)
    numbers[known] = np.unique(names[known], return_inverse=True)[1]
    return numbers


_Rows = dict[str, tuple[int, list[str]]]
"""File to (number of its line, its values)."""


def _lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    try:
        # utf-8-sig drops a byte order mark; universal newlines take care of Windows line ends.
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CelError(f"cannot read the metadata {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise CelError(f"the metadata {path} is not UTF-8 text; check that it is the table and not audio") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _header(line: str) -> list[str]:
    names = [name.strip().lower() for name in _columns(line, "\t" in line)]
    return [_ALIASES.get(name, name) for name in names]


def _columns(line: str, is_tabbed: bool) -> list[str]:
    return [value.strip() for value in line.split("\t")] if is_tabbed else line.split()


def _read_table(path: str | os.PathLike[str], lines: list[tuple[int, str]]) -> tuple[list[str], _Rows]:
    """Names of the columns, without the path, and rows."""
    is_tabbed = "\t" in lines[0][1]
    names = _header(lines[0][1])
    wanted = [name for name in names if name in _CONVERSIONS]
    twice = sorted({name for name in ("path", *wanted) if names.count(name) > 1})
    if twice:
        also = "".join(f" (or '{alias}')" for alias, name in _ALIASES.items() if name == twice[0])
        raise CelError(f"the header of {path} has '{twice[0]}'{also} twice; remove one of the columns")
    if not wanted:
        raise CelError(
            f"the header of {path} has none of the columns {', '.join(_CONVERSIONS)}; name those that it has so"
        )
    place = names.index("path")
    rows: _Rows = {}
    for number, line in lines[1:]:
        values = _columns(line, is_tabbed)
        # An editor may have cut off the tabs of empty columns at the end.
        values += [""] * (len(names) - len(values)) if is_tabbed else []
        if len(values) != len(names):
            raise CelError(
                f"line {number} of {path} has {len(values)} columns and the header {len(names)}; separate columns by "
                "single tabs"
            )
        _add(rows, values.pop(place), number, values, path)
    return [name for name in names if name != "path"], rows


def _read_list(path: str | os.PathLike[str], lines: list[tuple[int, str]]) -> _Rows:
    rows: _Rows = {}
    for number, line in lines:
        values = line.rsplit(maxsplit=1)
        # A table with more columns would pass for a list of long names.
        if len(values) != 2 or line.strip().count("\t") > 1:
            raise CelError(
                f"line {number} of {path} is not 'path speaker'; a table with other columns needs a header line with "
                "'path'"
            )
        _add(rows, values[0].strip(), number, values[1:], path)
    return rows


def _add(rows: _Rows, name: str, number: int, values: list[str], path: str | os.PathLike[str]) -> None:
    if not name:
        raise CelError(f"line {number} of {path} has no path; add it or remove the line")
    earlier = rows.setdefault(name, (number, values))
    if earlier[0] != number:
        raise CelError(f"line {number} of {path} repeats {name} of line {earlier[0]}; keep one of them")


def _text(value: str, name: str, number: int, path: str | os.PathLike[str]) -> str:
    return "" if value.lower() in _UNKNOWN else value


def _sex(value: str, name: str, number: int, path: str | os.PathLike[str]) -> str:
    return _SEXES.get(value.lower(), "")


def _number(value: str, name: str, number: int, path: str | os.PathLike[str]) -> float:
    if value.lower() in _UNKNOWN:
        return math.nan
    try:
        result = float(value)
    except ValueError:
        result = -1.0
    if not (math.isfinite(result) and result >= 0):
        raise CelError(
            f"line {number} of {path}: '{value}' in column '{name}' is not a number of at least 0; leave it empty if "
            "it is unknown"
        )
    return result


_CONVERSIONS: dict[str, Callable[[str, str, int, str | os.PathLike[str]], str | float]] = {
    "speaker": _text,
    "session": _text,
    "sex": _sex,
    "seconds": _number,
    "age": _number,
}
