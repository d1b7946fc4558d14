"""SpecAugment on the training device: stretches of time and of the spectrum are hidden, a whole batch at once.

Park et al. 2019, arXiv 1904.08779, section 2, without time warping.
"""

import numpy as np
import torch
from torch import Tensor, nn

from cel_dist.config_sections import AugmentSection
from cel_dist.copies import to_device
from cel_dist.data.randomness import Purpose, generator


class SpecAugment(nn.Module):
    """Sets some frames and some mel bands of every segment to 0, which is the mean of every band.

    The width of a mask is uniform from 0 to its limit, its place uniform over all where it fits. Each segment has masks
    of its own; masks may overlap.

    Args:
        config: numbers and widths of the masks.
        seed: seed of all choices.
    """

    def __init__(self, config: AugmentSection, seed: int) -> None:
        super().__init__()
        self._time = config.time_masks, config.time_mask_frames
        self._freq = config.freq_masks, config.freq_mask_bands
        self._seed = seed

    def forward(self, features: Tensor, *, epoch: int, step: int, rows: slice, batch_size: int) -> Tensor:
        """Mask this rank's rows of a global batch.

        Args:
            features: [B, V, M, F] on the device to work on.
            epoch: epoch of the batch.
            step: step of the batch in its epoch.
            rows: the rows that these are of the global batch; the masks of a row depend on its place there, not on the
                rank that holds it.
            batch_size: rows K of the global batch.

        Returns:
            [B, V, M, F], a new tensor unless there are no masks.
        """
        if self._time[0] == self._freq[0] == 0:
            return features
        num_views, num_bands, num_frames = features.shape[1:]
        numbers = generator(self._seed, Purpose.MASKS, epoch, step).random(
            (batch_size, num_views, self._time[0] + self._freq[0], 2)
        )[rows]
        in_time, in_freq = np.split(numbers, [self._time[0]], axis=2)
        hidden_frames = _hidden(in_time, self._time[1], num_frames, features.device)
        hidden_bands = _hidden(in_freq, self._freq[1], num_bands, features.device)
        return features.masked_fill(hidden_frames[:, :, None, :] | hidden_bands[:, :, :, None], 0.0)


def _hidden(numbers: np.ndarray, widest: int, size: int, device: torch.device) -> Tensor:
    """[B, V, size] bool, what the masks [B, V, masks, 2] of uniform numbers in [0, 1) cover."""
    widths = np.floor(numbers[..., 0] * (min(widest, size) + 1)).astype(np.int64)
    starts = np.floor(numbers[..., 1] * (size - widths + 1)).astype(np.int64)
    # The bounds go to the device, not the masks, which are as large as the features.
    first, end = (to_device(bound, device)[..., None] for bound in (starts, starts + widths))
    place = torch.arange(size, device=device)
    covered: Tensor = ((first <= place) & (place < end)).any(dim=2)
    return covered
