"""Audio in formats that only ffmpeg writes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile

FFMPEG = shutil.which("ffmpeg")


def encode(wave: np.ndarray, rate: int, target: Path) -> Path:
    """`wave` `[T]` or `[T, channels]` in the format that the suffix of `target` stands for."""
    plain = target.with_name(target.name + ".plain.wav")
    soundfile.write(plain, wave, rate)
    command = [str(FFMPEG), "-v", "error", "-i", str(plain), "-movflags", "faststart", f"file:{target}"]
    subprocess.run(command, check=True)
    plain.unlink()
    return target
