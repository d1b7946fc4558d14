"""Writing audio files of the corpus."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from cel_dist.corpus import SAMPLE_RATE_HZ


def write_flac(path: Path, wave: NDArray[np.int16] | NDArray[np.floating[Any]]) -> None:
    """Write [T] samples as 16-bit FLAC; floating-point samples lie within -1 and 1.

    The file is encoded in memory, because libsndfile does not report a full disk.

    Raises:
        OSError: the file cannot be written.
    """
    encoded = io.BytesIO()
    soundfile.write(encoded, wave, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    path.write_bytes(encoded.getbuffer())
