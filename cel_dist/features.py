"""The front end: waveform to log-mel spectrogram, on whatever device the waveform is."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cel_dist.errors import CelError

SAMPLE_RATE = 16_000
HOP = 160
# Centred frames are mirrored by half an FFT at both ends, which takes one sample more than that.
MIN_SAMPLES = 257
# Added to the power of a band before the logarithm; int16-scale audio that is not exactly zero is far above it.
LOG_FLOOR = 1e-6

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
        CelError: torchaudio is not installed.
    """

    def __init__(self, num_mels: int = 40) -> None:
        super().__init__()
        try:
            from torchaudio.transforms import MelScale, Spectrogram
        except ImportError as error:
            raise CelError(
                f"torchaudio cannot be imported ({' '.join(str(error).split())}); install it, in the version of torch"
            ) from error
        except OSError:
            # Its wheels are linked with CUDA and do not load beside a CPU build of torch, such as an environment has
            # that was made of a model's requirements. What is needed of it here needs no native library.
            from cel_dist.mel import MelScale, Spectrogram
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
                return self.normalise(self.log_mel(wave))
            rows = max(1, _CPU_SAMPLES // wave.shape[-1])
            parts = (wave[first : first + rows] for first in range(0, len(wave), rows))
            return torch.cat([self.normalise(self.log_mel(part)) for part in parts])

    def log_mel(self, wave: Tensor) -> Tensor:
        """What `forward` normalises, [.., 40, F]: the logarithms, which still hold the channel and the level."""
        spectrum = self.spectrogram(wave.float())
        # Not the square of the magnitude: its root alone takes a CPU longer than the FFT.
        power = spectrum.real.square() + spectrum.imag.square()
        return torch.log(self.mel_scale(power) + LOG_FLOOR)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """Instance normalisation of [.., 40, F] over the frames that are there."""
        return F.instance_norm(log_mel, eps=1e-5)


def pieces(wave: Tensor, frames: int = 6000) -> Iterator[Tensor]:
    """Parts of a long waveform [T] that together have the frames of the whole, `frames` in all but the last.

    The frames beside a joint see their own part mirrored, as those at both ends of the whole do.
    """
    length = frames * HOP
    whole = max(0, len(wave) - MIN_SAMPLES) // length
    for number in range(whole):
        # A centred frame more would come of the sample at the joint, which is the first of the next part.
        yield wave[number * length : (number + 1) * length - 1]
    yield wave[whole * length :]


def quietest_frames(log_mel: Tensor, share: float, *, at_least: int = 16) -> Tensor:
    """Which frames of an utterance are the quietest: what a room and a recorder sound like.

    They have the lowest mean of the logarithms of all bands, so that a hum in a few bands does not choose them.
    Frames of digital silence are passed over. A file format or an editor made them, and there is nothing in them.

    Args:
        log_mel: [M, F] of one utterance, not normalised (`LogMel.log_mel`).
        share: of the frames that are not silent, in (0, 1].
        at_least: frames that are taken even if they are a larger share, where there are so many.

    Returns:
        int64 [k] indices of frames, ascending; k is 0 for an utterance of digital silence.

    >>> quietest_frames(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 0.5, at_least=1)
    tensor([1, 2])
    """
    log_mel = log_mel.double()
    heard = (log_mel.amax(dim=0) > math.log(LOG_FLOOR) + 1e-3).nonzero().squeeze(1)
    number = min(len(heard), max(at_least, round(share * len(heard))))
    # A stable sort: which of two frames of equal power is taken does not depend on the machine.
    order = log_mel[:, heard].mean(dim=0).argsort(stable=True)
    return heard[order[:number]].sort().values
