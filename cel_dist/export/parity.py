"""Whether a file computes the embeddings of the model that it was made from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import RunError
from cel_dist.export.files import Embeddings, Run
from cel_dist.export.network import FULL_SCALE, reason
from cel_dist.features import SAMPLE_RATE
from cel_dist.model import SpeakerModel

TOLERANCE = 1e-4
"""Largest difference of any value of a unit embedding."""

LENGTHS = (1600, 1601, 2559, 4000, 8191, 16_000, 24_123, 32_000, 48_017, 80_000)
"""Samples: the shortest that is embedded, both sides of a hop, and up to 5 s."""

_BATCH_SAMPLES, _BATCH_ROWS = 16_000, 3


def probe(samples: int, seed: int) -> NDArray[np.int16]:
    """Something like a voice, int16 [samples] at 16 kHz: harmonics of a gliding pitch up to 4 kHz over faint noise.

    Its bands differ by some 60 dB, as those of speech do; in white noise a front end that loses digits would look as
    good as one that does not.
    """
    generator = np.random.default_rng(seed)
    seconds = np.arange(samples) / SAMPLE_RATE
    pitch_hz = generator.uniform(90, 160) * (1 + 0.2 * np.sin(2 * np.pi * generator.uniform(1, 3) * seconds))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
    voice = sum(np.sin(number * phase + generator.uniform(0, 6)) / number for number in range(1, 25))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * generator.uniform(3, 5) * seconds)
    wave = 6000 * syllables * voice + generator.normal(0, 10, samples)
    return wave.clip(-32_768, 32_767).astype(np.int16)


class Parity:
    """What a model gives for waveforms of ten lengths, and for several at once, to compare files with.

    Args:
        model: whose embeddings are the measure.
        lengths: samples of each waveform.

    Raises:
        RunError: the model's embeddings are not finite.
    """

    def __init__(self, model: SpeakerModel, lengths: Sequence[int] = LENGTHS) -> None:
        self._batches: list[tuple[Embeddings, Embeddings]] = []
        for seed, samples in enumerate(lengths):
            rows = _BATCH_ROWS if samples == _BATCH_SAMPLES else 1
            waves = tuple(probe(samples, _BATCH_ROWS * seed + row) for row in range(rows))
            scaled = np.stack(waves).astype(np.float32) / np.float32(FULL_SCALE)
            self._batches.append((scaled, model.embed(waves)))

    def difference(self, run: Run) -> float:
        """The largest difference between what `run` computes and what the model does."""
        return max(float(np.abs(run(waves) - rows).max()) for waves, rows in self._batches)

    def require(self, run: Run, kind: str) -> float:
        """As `difference`.

        Raises:
            RunError: it is larger than `TOLERANCE`, or not a number; or the file does not run.
        """
        try:
            found = self.difference(run)
        # Runtimes raise what they like.
        except Exception as error:
            raise RunError(
                f"the exported {kind} does not run ({reason(error)}); nothing was written. Export another format, or "
                "try other versions of torch and onnxruntime"
            ) from error
        if not found <= TOLERANCE:
            raise RunError(
                f"the embeddings of the exported {kind} differ from the model's by up to {found:.2g}, more than "
                f"{TOLERANCE:g}; nothing was written. Its encoder computes something else when it is traced: look for "
                "what depends on earlier calls, on random numbers or on the length, or export --format safetensors"
            )
        return found
