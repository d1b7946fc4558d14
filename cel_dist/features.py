"""The front end: waveform to log-mel spectrogram, on whatever device the waveform is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cel_dist.errors import CelError

SAMPLE_RATE = 16_000
HOP = 160
# Centred frames are mirrored by half an FFT at both ends, which takes one sample more than that.
MIN_SAMPLES = 257

_FFT = 512
_WINDOW = 400
# Samples that a CPU works on at once. Spectra of more do not stay in its caches, and the allocator asks the system for
# their memory anew at every call; both cost more than the arithmetic.
_CPU_SAMPLES = 1 << 18


def segment_samples(frames: int) -> int:
    """Samples of a segment of `frames` frames: a hop each, and 240 for the rest of the last window.

    >>> segment_samples(180)
    29040
    """
    return frames * HOP + _WINDOW - HOP


class LogMel(nn.Module):
    """Log-mel spectrogram with instance normalisation over time: the published front end of CEL (Mun et al. 2020).

    40 mel bands between 0 and 8000 Hz of the power spectrum (FFT 512, Hann window 400, hop 160), `log(x + 1e-6)`, then
    zero mean and unit variance over the frames of every band. There is nothing to learn.

    Args:
        num_mels: mel bands M; 40 as published, or 80, as later encoders have.

    >>> LogMel()(1000 * torch.randn(2, segment_samples(180))).shape
    torch.Size([2, 40, 182])

    Raises:
        CelError: torchaudio cannot be imported; the message names the remedy.
    """

    def __init__(self, num_mels: int = 40) -> None:
        super().__init__()
        try:
            from torchaudio.transforms import MelScale, Spectrogram
        except (ImportError, OSError) as error:
            raise CelError(
                f"torchaudio cannot be imported ({' '.join(str(error).split())}); with a CPU build of torch run 'make "
                "install', which sets torchaudio's CUDA libraries (torchaudio/lib/*.so) aside"
            ) from error
        self.spectrogram = Spectrogram(
            n_fft=_FFT, win_length=_WINDOW, hop_length=HOP, window_fn=torch.hann_window, power=None
        )
        self.mel_scale = MelScale(
            n_mels=num_mels, sample_rate=SAMPLE_RATE, f_min=0.0, f_max=SAMPLE_RATE / 2, n_stft=_FFT // 2 + 1
        )

    def forward(self, wave: Tensor) -> Tensor:
        """Features of a batch of waveforms of equal length, in fp32 whatever the dtype of `wave`, also under autocast.

        Args:
            wave: [B, T] samples at 16 kHz on the int16 scale, any real dtype, T >= 257.

        Returns:
            [B, M, F] float32 with F = 1 + T // 160.

        Raises:
            CelError: the waveforms are shorter than 257 samples.
        """
        if wave.shape[-1] < MIN_SAMPLES:
            raise CelError(
                f"a waveform of {wave.shape[-1]} samples is too short for features; give at least {MIN_SAMPLES} "
                f"samples ({MIN_SAMPLES / SAMPLE_RATE * 1000:.0f} ms)"
            )
        # Powers of int16-scale audio reach 1e12 and the floor of the logarithm is 1e-6: fp16 holds neither, bf16 has no
        # digits for them.
        with torch.autocast(wave.device.type, enabled=False):
            if wave.device.type != "cpu" or wave.dim() == 1 or wave.numel() <= _CPU_SAMPLES:
                return self._features(wave)
            rows = max(1, _CPU_SAMPLES // wave.shape[-1])
            return torch.cat([self._features(wave[first : first + rows]) for first in range(0, len(wave), rows)])

    def _features(self, wave: Tensor) -> Tensor:
        spectrum = self.spectrogram(wave.float())
        # Not the square of the magnitude: its root alone takes a CPU longer than the FFT.
        power = spectrum.real.square() + spectrum.imag.square()
        return F.instance_norm(torch.log(self.mel_scale(power) + 1e-6), eps=1e-5)
