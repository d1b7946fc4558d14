"""Lists of utterances with or without their speakers: cohorts, and who speaks in a list of trials."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from cel_dist.errors import CelError


@dataclass(frozen=True)
class UtteranceList:
    """Utterances in the order of a list, each once.

    Attributes:
        files: paths as the list has them.
        speakers: the speaker of each; None if the list names none.
    """

    files: list[str]
    speakers: list[str] | None

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, want_speakers: bool = False) -> "UtteranceList":
        """Read lines `path` or `path speaker`.

        White space separates the columns, or tabs if the file holds any: names with blanks need tabs. Empty lines,
        Windows line ends and a byte order mark are fine; a line that is there twice counts once.

        Args:
            path: the list.
            want_speakers: refuse lines without a speaker.

        Raises:
            CelError: the file cannot be read or is empty, lines have different numbers of columns, or a path has two
                speakers. Lines are named by number.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise CelError(f"cannot read the list {path}: {error.strerror}; check the path") from None
        except UnicodeDecodeError:
            raise CelError(f"the list {path} is not UTF-8 text; check that it is a list and not audio") from None
        gap = "\t" if "\t" in text else None
        speakers: dict[str, str] = {}
        width = 2 if want_speakers else 0
        for number, line in enumerate(text.split("\n"), start=1):
            columns = [column.strip() for column in line.split(gap)] if line.strip() else []
            if not columns:
                continue
            width = width or min(len(columns), 2)
            if len(columns) != width or not all(columns):
                expected = "'path'" if width == 1 else "'path speaker'"
                raise CelError(
                    f"{path}, line {number}: {len(columns)} columns instead of {expected}; write every line alike, "
                    "with tabs between the columns if names hold spaces"
                )
            speaker = columns[1] if width == 2 else ""
            if speakers.setdefault(columns[0], speaker) != speaker:
                raise CelError(
                    f"{path}, line {number}: {columns[0]} is of {speaker}, before it was of {speakers[columns[0]]}; "
                    "remove the wrong line"
                )
        if not speakers:
            raise CelError(f"the list {path} is empty; write a path a line, relative to the root")
        return cls(list(speakers), list(speakers.values()) if width == 2 else None)


def speakers_of_files(
    files: Sequence[str], listed: str | os.PathLike[str] | None = None, *, names: Sequence[str] | None = None
) -> list[str]:
    """The speaker of each file: what a list `path speaker` says or, without one, the first folder of the path.

    That folder is the speaker in trees such as VoxCeleb's (`id10270/5r0dWxy17C8/00001.wav`).

    Args:
        files: paths as trials name them.
        listed: the list; it may name other files too.
        names: [N], other names that `listed` may have them under: those of models.

    Raises:
        CelError: a file is not in the list or, without a list, in no folder.

    >>> speakers_of_files(["id1/a/1.wav", "id2/b/1.wav"])
    ['id1', 'id2']
    """
    if listed is not None:
        known = UtteranceList.read(listed, want_speakers=True)
        assert known.speakers is not None
        table = dict(zip(known.files, known.speakers, strict=True))
        spoken = [table.get(name, table.get(file)) for file, name in zip(files, names or files, strict=True)]
        missing = [file for file, speaker in zip(files, spoken, strict=True) if speaker is None]
        if missing:
            raise CelError(
                f"{listed} names no speaker for {len(missing)} of {len(files)} utterances, the first is {missing[0]}; "
                "add lines 'path speaker' with the paths of the trials"
            )
        return [speaker for speaker in spoken if speaker is not None]
    folders = [PurePath(name).parts for name in files]
    for name, parts in zip(files, folders, strict=True):
        if len(parts) < 2 or PurePath(name).is_absolute():
            raise CelError(
                f"the path {name} does not tell its speaker by its first folder; give a list of lines 'path speaker' "
                "with --speakers"
            )
    return [parts[0] for parts in folders]
