"""Speed perturbation on the training device: utterances played faster or slower, a whole batch at once.

Ko et al. 2015, Audio augmentation for speech recognition. At speed s, y(t) = x(s t): tempo and pitch change together,
so that a voice at another speed counts as another voice. That is why all segments of an utterance share one speed.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cel_dist.copies import to_device
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError

_HUNDREDTHS = 100


class SpeedPerturbation(nn.Module):
    """Brings segments to one length by playing each utterance at one of some speeds.

    A segment is read as long as the highest speed takes it (`Config.read_samples`); at a lower one its end is left out.

    Args:
        speeds: factors with two decimals at most; 1.0 leaves an utterance as it is.
        num_samples: samples T of a segment afterwards.
        seed: seed of the choices.

    Raises:
        CelError: there are other speeds than 1.0, and torchaudio, which resamples, cannot be imported.
    """

    def __init__(self, speeds: tuple[float, ...], num_samples: int, seed: int) -> None:
        super().__init__()
        self.speeds = speeds
        self._num_samples = num_samples
        self._seed = seed
        self._hundredths = [round(_HUNDREDTHS * speed) for speed in speeds]
        self._is_off = self._hundredths == [_HUNDREDTHS]
        # What is to be played at speed s is resampled as if its rate were s times the true one.
        self._resample = nn.ModuleList([] if self._is_off else _resamplers(self._hundredths))

    def drawn(self, *, epoch: int, step: int, rows: slice, batch_size: int) -> npt.NDArray[np.int64]:
        """Which speed each row of this rank has: [B] int64, places in `speeds`, a function of (seed, epoch, step).

        Args:
            epoch: epoch of the batch.
            step: step of the batch in its epoch.
            rows: the rows of the global batch that are wanted.
            batch_size: rows K of the global batch.
        """
        whole = generator(self._seed, Purpose.SPEED, epoch, step).integers(len(self.speeds), size=batch_size)
        chosen: npt.NDArray[np.int64] = whole[rows]
        return chosen

    def forward(self, segments: Tensor, *, epoch: int, step: int, rows: slice, batch_size: int) -> Tensor:
        """Play this rank's rows of a global batch at their speeds.

        Args:
            segments: [B, V, R] int16 or float, R samples as `Config.read_samples` says.
            epoch: epoch of the batch.
            step: step of the batch in its epoch.
            rows: the rows that these segments are of the global batch.
            batch_size: rows K of the global batch.

        Returns:
            [B, V, T]; with the one speed 1.0 as it came, else float32.
        """
        if self._is_off:
            return segments[..., : self._num_samples]
        chosen = self.drawn(epoch=epoch, step=step, rows=rows, batch_size=batch_size)
        played = segments.new_empty((*segments.shape[:2], self._num_samples), dtype=torch.float32)
        for number, hundredths in enumerate(self._hundredths):
            index = to_device(np.flatnonzero(chosen == number), segments.device)
            if len(index) == 0:
                continue
            # So many that the last sample that is kept is one of the utterance.
            needed = -(-self._num_samples * hundredths // _HUNDREDTHS)
            wave = segments[index, :, :needed].to(torch.float32)
            played[index] = self._resample[number](wave)[..., : self._num_samples]
        return played


def _resamplers(hundredths: list[int]) -> list[nn.Module]:
    try:
        # Not above: its wheels do not load beside a CPU build of torch, and training at one speed does without.
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:
        raise CelError(
            f"augment.speeds needs torchaudio, which cannot be imported ({' '.join(str(error).split())}); see "
            "'torchaudio on a CPU' in docs/install.md, or leave out augment.speeds"
        ) from None
    return [Resample(speed, _HUNDREDTHS) for speed in hundredths]
