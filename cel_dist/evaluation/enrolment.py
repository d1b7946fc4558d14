"""Models: what speakers are enrolled with, where trials do not name files of theirs."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cel_dist.errors import CelError
from cel_dist.utterance import Excerpt


@dataclass(frozen=True)
class Enrolment:
    """The models of a list of enrolments.

    Attributes:
        models: what each model is made of, by its name; at least one file or part of a file.
        origin: the list, for messages.
    """

    models: Mapping[str, tuple[Excerpt, ...]]
    origin: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Enrolment":
        """Read lines `model file`, or `model file start end` with times in seconds.

        A model on several lines is made of all their files. Tabs separate the columns of a line that holds one, white
        space those of others. Empty lines, Windows line ends and a byte order mark are fine.

        Raises:
            CelError: the file cannot be read or is empty, a line has another number of columns, or times that are none.
                Lines are named by number.
        """
        models: dict[str, list[Excerpt]] = {}
        try:
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        model, excerpt = _parse(line, f"{path}, line {number}")
                        models.setdefault(model, []).append(excerpt)
        except OSError as error:
            raise CelError(f"cannot read the enrolments {path}: {error.strerror}; check the path") from None
        except UnicodeDecodeError:
            raise CelError(f"the enrolments {path} are not UTF-8 text; check that it is the list") from None
        if not models:
            raise CelError(f"{path} holds no enrolments; write one a line: model, file")
        return cls({model: tuple(excerpts) for model, excerpts in models.items()}, str(path))

    def utterance(self, model: str) -> str:
        """The name of a model among the utterances: its own, or that of its file if it is one whole file.

        So a file that is enrolled and tested is embedded once, and lists of scores name files where they can.

        Raises:
            KeyError: there is no such model.
        """
        excerpts = self.models[model]
        return excerpts[0].path if len(excerpts) == 1 and excerpts[0].is_whole else model

    def utterances(self, models: list[str], places: Iterable[str]) -> list[str]:
        """`utterance` of each of `models`.

        Args:
            models: names of models.
            places: where each stands, for messages; looked at only for one.

        Raises:
            CelError: one of them is not enrolled.
        """
        known = {model: self.utterance(model) for model in self.models}
        try:
            return [known[model] for model in models]
        except KeyError as missing:
            model = missing.args[0]
            place = next(place for name, place in zip(models, places, strict=True) if name == model)
            raise CelError(
                f"{place}: the model {model} is not among the {len(known)} of {self.origin}; check that both lists "
                "belong together"
            ) from None

    def require_own_names(self, tested: Iterable[str]) -> None:
        """Refuse models that could be mistaken for a file among the utterances.

        Args:
            tested: names of test files.

        Raises:
            CelError: a model that is not one whole file has the name of a test file, or of one that is a model.
        """
        files = {*tested, *(name for model in self.models if (name := self.utterance(model)) != model)}
        clashing = sorted(files & self.sources.keys())
        if clashing:
            raise CelError(
                f"{self.origin}: {clashing[0]} is the name of a model of several files, or of a part of one, and of a "
                "file that is compared with; give the model another name"
            )

    @property
    def sources(self) -> dict[str, tuple[Excerpt, ...]]:
        """What to embed for the models that are not one whole file, by their names."""
        return {model: excerpts for model, excerpts in self.models.items() if self.utterance(model) == model}


def _parse(line: str, place: str) -> tuple[str, Excerpt]:
    columns = [column.strip() for column in line.split("\t")] if "\t" in line.strip() else line.split()
    if len(columns) == 2 and all(columns):
        return columns[0], Excerpt(columns[1])
    if len(columns) != 4 or not all(columns):
        raise CelError(
            f"{place}: {len(columns)} columns instead of 2 or 4; write 'model file' or 'model file start end', with "
            "tabs between the columns if file names hold spaces"
        )
    try:
        start, end = float(columns[2]), float(columns[3])
    except ValueError:
        start, end = 0.0, 0.0
    if not 0 <= start < end:
        raise CelError(f"{place}: a part from '{columns[2]}' to '{columns[3]}'; give start and end in seconds")
    return columns[0], Excerpt(columns[1], start, end)
