"""Manifests: JSON files that say what a folder must hold, written last and atomically."""

import hashlib
import os
from itertools import islice
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from typing_extensions import Self

from cel_dist.data.audio import AUDIO_SUFFIXES
from cel_dist.data.files import atomic_write
from cel_dist.errors import CelError

# By the names of their manifests; their classes need not be loaded to tell one from the other.
_KINDS = {"manifest.json": "folder of shards", "bank.json": "bank"}
# Enough to see whether a tree holds recordings.
_FOLDERS_LOOKED_AT = 100


class FolderManifest(BaseModel):
    """Base of the manifests. Subclasses say what they are called and which command writes such a folder."""

    model_config = ConfigDict(frozen=True)

    file_name: ClassVar[str]
    kind: ClassVar[str]
    """What a folder with such a manifest is, for messages."""
    writer: ClassVar[str]
    """The command that writes such a folder, without `--out`."""

    _sha256: str | None = PrivateAttr(default=None)

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the file that was read or written, in hexadecimal; None before there is one."""
        return self._sha256

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of `folder`.

        Raises:
            CelError: there is none, or it is not a manifest of this format and version.
        """
        path = folder / cls.file_name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CelError(
                cls._other_than_wanted(folder)
                or f"cannot read {path}: {error.strerror}; {folder} is not a finished {cls.kind}, run '{cls.writer} "
                f"--out {folder}' (again, if it was interrupted)"
            ) from None
        return cls.parse(content, str(path))

    @classmethod
    def _other_than_wanted(cls, folder: Path) -> str | None:
        """What a folder without such a manifest is said to be, if it is something that one may take for it."""
        for name, kind in _KINDS.items():
            if name != cls.file_name and (folder / name).exists():
                return f"{folder} is a {kind}, not a {cls.kind}; give a {cls.kind} in its place"
        names = (name for _, _, files in islice(os.walk(folder), _FOLDERS_LOOKED_AT) for name in files)
        if any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in names):
            command = f"{cls.writer.replace('SRC', str(folder))} --out NEW"
            return f"{folder} holds recordings, and is no {cls.kind}; '{command}' makes one of them in another folder"
        return None

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """Read a manifest's content; `name` stands for it in the message. Raises CelError as `load` does."""
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(str(part) for part in detail["loc"]) or "content"
            raise CelError(
                f"{name} is not a {cls.kind} that this version reads ({where}: {detail['msg'].lower()}); "
                f"run '{cls.writer}' into a new folder"
            ) from None
        # Not that of the fields, which another version may write in another way: the file's, as `sha256sum` says it.
        manifest._sha256 = hashlib.sha256(content).hexdigest()
        return manifest

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        content = self.model_dump_json(indent=1).encode() + b"\n"
        with atomic_write(folder / self.file_name) as file:
            file.write(content)
        self._sha256 = hashlib.sha256(content).hexdigest()
