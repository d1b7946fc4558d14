"""The two transforms of torchaudio that features are made of, for where torchaudio cannot be loaded.

Same arguments, buffers and bits as `torchaudio.transforms.Spectrogram` and `MelScale`, as far as `features` uses them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Spectrogram(nn.Module):
    """Complex spectra [.., n_fft / 2 + 1, F] of waveforms [.., T], frames centred, both ends mirrored.

    Args:
        n_fft: samples of a transform.
        win_length: samples of the window.
        hop_length: samples from frame to frame.
        window_fn: of the number of samples.
        power: None; others are not here.
    """

    window: Tensor

    def __init__(
        self, n_fft: int, win_length: int, hop_length: int, window_fn: Callable[[int], Tensor], power: None = None
    ) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.register_buffer("window", window_fn(win_length))

    def forward(self, wave: Tensor) -> Tensor:
        """Spectra of waveforms [.., T]."""
        spectra = torch.stft(
            wave.reshape(-1, wave.shape[-1]),
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            window=self.window,
            return_complex=True,
        )
        return spectra.reshape(wave.shape[:-1] + spectra.shape[-2:])


class MelScale(nn.Module):
    """Sums of power spectra [.., n_stft, F] over triangles that lie evenly on the mel scale, [.., n_mels, F].

    The scale is that of the HTK book: 2595 log10(1 + f / 700).

    Args:
        n_mels: triangles.
        sample_rate: Hz.
        f_min: where the first one begins, Hz.
        f_max: where the last one ends, Hz.
        n_stft: bins of a spectrum, from 0 to half the sample rate.
    """

    fb: Tensor

    def __init__(self, n_mels: int, sample_rate: int, f_min: float, f_max: float, n_stft: int) -> None:
        super().__init__()
        low, high = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (f_min, f_max))
        corners = 700.0 * (10.0 ** (torch.linspace(low, high, n_mels + 2) / 2595.0) - 1.0)
        widths = corners[1:] - corners[:-1]
        distances = corners[None, :] - torch.linspace(0, sample_rate // 2, n_stft)[:, None]
        falling, rising = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
        self.register_buffer("fb", torch.minimum(falling, rising).clamp(min=0))

    def forward(self, power: Tensor) -> Tensor:
        """Mel spectra of power spectra [.., n_stft, F]."""
        return (power.transpose(-1, -2) @ self.fb).transpose(-1, -2)
