"""Small real corpora for the tests of reading and training."""

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000


def voice(rng: np.random.Generator, pitch_hz: float, seconds: float) -> np.ndarray:
    """Something with a pitch and a spectrum of its own, float64 [T]."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    harmonics = sum(np.sin(2 * np.pi * pitch_hz * k * time + rng.uniform(0, 6)) / k for k in range(1, 12))
    return 0.1 * harmonics * (1.2 + np.sin(2 * np.pi * 3 * time + rng.uniform(0, 6))) + 0.01 * rng.standard_normal(
        len(time)
    )


def write_tree(folder: Path, *, speakers: int, utterances: int, seconds: tuple[float, float] = (3.7, 4.5)) -> Path:
    """`folder/spkNN/uttNN.wav`; returns `folder`."""
    rng = np.random.default_rng(0)
    for speaker in range(speakers):
        (folder / f"spk{speaker:02d}").mkdir(parents=True)
        for utterance in range(utterances):
            audio = voice(rng, 80 + 15 * speaker, rng.uniform(*seconds))
            soundfile.write(folder / f"spk{speaker:02d}" / f"utt{utterance:02d}.wav", audio, SAMPLE_RATE)
    return folder


def write_trials(path: Path, *, speakers: int, utterances: int) -> Path:
    """All pairs of the tree's utterances as `label enrol test`; returns `path`."""
    names = [(s, f"spk{s:02d}/utt{u:02d}.wav") for s in range(speakers) for u in range(utterances)]
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    path.write_text("".join(f"{int(a[0] == b[0])} {a[1]} {b[1]}\n" for a, b in pairs))
    return path


def write_bank_audio(folder: Path) -> Path:
    """A few noises and room responses in the layout that `cel prepare --bank` reads; returns `folder`."""
    rng = np.random.default_rng(1)
    for kind in ("noise", "speech", "music", "rir"):
        (folder / kind).mkdir(parents=True)
        for number in range(2):
            clip = rng.standard_normal(3 * SAMPLE_RATE)
            if kind == "rir":
                clip = clip[:2000] * np.exp(-np.arange(2000) / 300)
            soundfile.write(folder / kind / f"{number}.wav", 0.3 * clip / abs(clip).max(), SAMPLE_RATE)
    return folder
