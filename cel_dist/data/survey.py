"""What a folder holds of a public corpus, by the names of its files, against what its publishers count."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cel_dist.data.bank import Category
from cel_dist.data.recipes import Part, Recipe
from cel_dist.data.sources import audio_below
from cel_dist.errors import CelError


@dataclass(frozen=True)
class PartFound:
    """The files of a part: paths relative to the source, and their speakers where the part has any."""

    part: Part
    paths: tuple[str, ...]
    speakers: tuple[str, ...]

    @property
    def num_speakers(self) -> int:
        """How many different speakers there are."""
        return len(set(self.speakers))

    @property
    def is_as_published(self) -> bool:
        """Whether no published number differs; a part that is not there, and need not be, is fine."""
        if not self.paths:
            return self.part.optional
        return all(published is None or found == published for found, published, _ in self._numbers())

    @property
    def difference(self) -> str:
        """How the part differs from the published numbers, in words."""
        if not self.paths:
            return "not there, not needed" if self.part.optional else "not there"
        numbers = self._numbers()
        if all(published is None for _, published, _ in numbers):
            return "not checked"
        words = [
            f"{abs(found - published)} {what if abs(found - published) > 1 else what[:-1]} "
            f"{'more' if found > published else 'fewer'}"
            for found, published, what in numbers
            if published is not None and found != published
        ]
        return ", ".join(words) or "as published"

    def _numbers(self) -> tuple[tuple[int, int | None, str], tuple[int, int | None, str]]:
        return (
            (self.num_speakers, self.part.speakers, "speakers"),
            (len(self.paths), self.part.files, "files"),
        )


@dataclass(frozen=True)
class Survey:
    """The parts of a recipe as found below a folder, and how many audio files belong to none."""

    recipe: Recipe
    source: Path
    parts: tuple[PartFound, ...]
    others: int

    @property
    def is_as_published(self) -> bool:
        """Whether all numbers are the published ones, and there is something to train on."""
        return all(found.is_as_published for found in self.parts) and any(found.paths for found in self._used())

    def training_speakers(self) -> dict[str, str]:
        """Path and speaker of every file to train on.

        Raises:
            CelError: there is none.
        """
        self._require_files()
        return {
            path: speaker for found in self._used() for path, speaker in zip(found.paths, found.speakers, strict=True)
        }

    def clips(self) -> dict[Category, list[str]]:
        """The files of each category of a bank.

        Raises:
            CelError: there is none.
        """
        self._require_files()
        by_category: dict[Category, list[str]] = {}
        for category in get_args(Category):
            paths = [path for found in self.parts if found.part.use == category for path in found.paths]
            if paths:
                by_category[category] = sorted(paths)
        return by_category

    def _used(self) -> list[PartFound]:
        return [found for found in self.parts if found.part.use != "held out"]

    def _require_files(self) -> None:
        if not any(found.paths for found in self._used()):
            raise CelError(
                f"{self.source} holds nothing of {self.recipe.title} to prepare, laid out as it is distributed; "
                "--dry-run says how that is"
            )


def survey(recipe: Recipe, source: str | Path) -> Survey:
    """Sort the audio files below `source` into the parts of a recipe. No audio is read.

    A source that is not there is an empty one: before a download, that is what it is.

    Raises:
        CelError: a folder cannot be read.
    """
    source = Path(source)
    # The folders that lead to the source may be part of the layout: LibriSpeech/train-clean-100 can be the source.
    root = source.resolve().as_posix()
    patterns = [(part, re.compile(part.pattern)) for part in recipe.parts]
    paths: dict[str, list[str]] = {part.name: [] for part in recipe.parts}
    speakers: dict[str, list[str]] = {part.name: [] for part in recipe.parts}
    others = 0
    for path in audio_below(source) if source.is_dir() else []:
        whole = f"{root}/{path}"
        for part, pattern in patterns:
            if (match := pattern.search(whole)) is not None:
                paths[part.name].append(path)
                if "speaker" in pattern.groupindex:
                    speakers[part.name].append(match["speaker"])
                break
        else:
            others += 1
    parts = (PartFound(part, tuple(paths[part.name]), tuple(speakers[part.name])) for part in recipe.parts)
    return Survey(recipe, source, tuple(parts), others)
