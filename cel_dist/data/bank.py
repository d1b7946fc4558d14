"""The bank of noises and room responses: one memory-mapped file a category, shared by all processes of a node.

OUT/noise.i16, speech.i16, music.i16, rir.i16    raw little-endian int16 at 16 kHz, clip after clip
OUT/clips.npz                                    per category, the length of every clip in samples
OUT/bank.json                                    totals, and bytes and sha256 of every file; written last
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.data.manifests import FolderManifest
from cel_dist.errors import CelError

BANK_NAME = "bank.json"
CLIPS_NAME = "clips.npz"
CATEGORIES = ("noise", "speech", "music", "rir")
Category = Literal["noise", "speech", "music", "rir"]


class CategoryRecord(BaseModel):
    """What `bank.json` says of one category."""

    model_config = ConfigDict(frozen=True)

    clips: NonNegativeInt
    seconds: NonNegativeFloat
    bytes: NonNegativeInt
    sha256: str


class BankManifest(FolderManifest):
    """`bank.json`: what a bank holds."""

    file_name = BANK_NAME
    kind = "bank"
    writer = "cel prepare SRC --bank"

    format: Literal["cel_dist.bank"] = "cel_dist.bank"
    version: Literal[1] = 1
    sample_rate: int = SAMPLE_RATE
    job: str
    """Fingerprint of the preparation, by which a rerun knows another one."""
    files: str = ""
    """Stamp of the source files, by which a rerun knows whether there is anything to do."""
    lacked_ffmpeg: bool = False
    """Whether files were rejected for want of ffmpeg, which a rerun takes in once it is installed."""
    rejected: NonNegativeInt
    skipped: NonNegativeInt
    """Audio files under no folder that names a category."""
    categories: dict[Category, CategoryRecord]


def category_path(folder: Path, category: str) -> Path:
    """The file that holds the audio of a category."""
    return folder / f"{category}.i16"


@dataclass(frozen=True)
class Clips:
    """The clips of one category.

    Attributes:
        audio: int16 `[S]`, all clips one after the other; memory-mapped and read-only.
        starts: int64 `[C]`, first sample of each clip in `audio`.
        lengths: int64 `[C]`, samples of each clip.
    """

    audio: npt.NDArray[np.int16]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def crop(
        self, indices: npt.NDArray[np.int64], fractions: npt.NDArray[np.float64], samples: int
    ) -> npt.NDArray[np.int16]:
        """A window of each chosen clip.

        A clip longer than `samples` gives the window at `floor(fraction * (length - samples + 1))`, a shorter one is
        repeated from its start until it fills the window.

        Args:
            indices: `[n]`, which clips.
            fractions: `[n]` in [0, 1), where their windows lie.
            samples: length T of the windows.

        Returns:
            int16 `[n, T]`.
        """
        out = np.empty((len(indices), samples), np.int16)
        starts, lengths = self.starts[indices], self.lengths[indices]
        slack = np.maximum(lengths - samples, 0)
        # The product may round up to slack + 1 for fractions next to one.
        first = starts + np.minimum((fractions * (slack + 1)).astype(np.int64), slack)
        # One copy a row: a gather through an index array would read eight bytes of index for two of audio.
        for row, (begin, length) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
            filled = min(length, samples)
            out[row, :filled] = self.audio[begin : begin + filled]
            while filled < samples:
                more = min(filled, samples - filled)
                out[row, filled : filled + more] = out[row, :more]
                filled += more
        return out

    def padded(self, indices: npt.NDArray[np.int64], max_samples: int | None = None) -> npt.NDArray[np.int16]:
        """Whole clips, cut to `max_samples` if that is given, and padded with zeros to the longest of them.

        Args:
            indices: `[n]`, which clips.
            max_samples: longest result.

        Returns:
            int16 `[n, L]`, L the length of the longest chosen clip after the cut.
        """
        lengths = self.lengths[indices]
        if max_samples is not None:
            lengths = np.minimum(lengths, max_samples)
        out = np.zeros((len(indices), int(lengths.max(initial=0))), np.int16)
        for row, (begin, length) in enumerate(zip(self.starts[indices].tolist(), lengths.tolist(), strict=True)):
            out[row, :length] = self.audio[begin : begin + length]
        return out


class Bank:
    """An opened bank. It may be handed to other processes: they map the same files again.

    Attributes:
        folder: where it lies.
        manifest: what `bank.json` says.
    """

    def __init__(self, folder: Path, manifest: BankManifest, clips: dict[str, Clips]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._clips = clips

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        # Pickling a memory map would copy gigabytes into the pickle.
        return Bank.open, (self.folder,)

    @classmethod
    def open(cls, folder: str | Path) -> "Bank":
        """Map the bank that `cel prepare --bank` wrote into `folder`; reads no audio.

        Raises:
            CelError: it is missing, of another format, or a file's size is not what `bank.json` says.
        """
        folder = Path(folder)
        manifest = BankManifest.load(folder)
        remedy = f"run 'cel check {folder}' for every fault, or 'cel prepare --bank' again"
        if manifest.sample_rate != SAMPLE_RATE:
            raise CelError(f"the bank {folder} is at {manifest.sample_rate} Hz, this version reads {SAMPLE_RATE} Hz")
        try:
            with np.load(folder / CLIPS_NAME, allow_pickle=False) as arrays:
                lengths = {category: arrays[category].astype(np.int64) for category in manifest.categories}
        except Exception as error:
            # numpy and zipfile raise half a dozen types for a damaged file; all of them mean the same here.
            raise CelError(f"cannot read {folder / CLIPS_NAME} ({error}); {remedy}") from None
        clips: dict[str, Clips] = {}
        for category, record in manifest.categories.items():
            path = category_path(folder, category)
            counted = lengths[category]
            if len(counted) != record.clips or 2 * int(counted.sum()) != record.bytes or (counted <= 0).any():
                raise CelError(
                    f"{folder / CLIPS_NAME}: {len(counted)} clips of {category} with {2 * counted.sum()} bytes, "
                    f"{BANK_NAME} says {record.clips} with {record.bytes}; {remedy}"
                )
            try:
                size = path.stat().st_size
                if size != record.bytes:
                    raise CelError(f"{path} has {size} bytes, {BANK_NAME} says {record.bytes}; {remedy}")
                # A plain view: slices of np.memmap itself cost ten times those of an array.
                audio = np.memmap(path, "<i2", "r").view(np.ndarray)
            except OSError as error:
                raise CelError(f"cannot read {path}: {error.strerror}; {remedy}") from None
            clips[category] = Clips(audio, np.cumsum(counted) - counted, counted)
        return cls(folder, manifest, clips)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that hold clips, in the order noise, speech, music, rir."""
        return tuple(name for name in CATEGORIES if name in self._clips)

    def clips(self, category: str) -> Clips:
        """The clips of a category.

        Raises:
            CelError: the bank has no such category.
        """
        try:
            return self._clips[category]
        except KeyError:
            raise CelError(
                f"the bank {self.folder} holds no {category}, only {', '.join(self.categories)}; prepare one that does"
            ) from None
