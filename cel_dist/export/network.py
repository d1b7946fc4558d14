"""What exported files compute, waveform to unit embedding, in operations that every runtime has for any length."""

import contextlib
import io
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as experimental_config
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cel_dist.errors import CelError
from cel_dist.features import HOP, LOG_FLOOR, SAMPLE_RATE, LogMel
from cel_dist.model import SpeakerModel
from cel_dist.utterance import MIN_SAMPLES

FULL_SCALE = 32_768.0
"""What a sample of 1.0 is on the int16 scale, on which encoders were trained."""

_VARIANCE_EPSILON = 1e-5


class ConvolutionalLogMel(nn.Module):
    """`LogMel` of waveforms with full scale 1.0, as a strided convolution.

    Fourier transforms and complex numbers are what runtimes differ in, or lack. Window and transform of a frame are
    one matrix here, whose rows are the cosines and sines of all frequencies, and frames that begin a hop apart are a
    convolution with it. The window is shorter than the transform: its samples alone are looked at, which changes the
    phases and not the powers.

    Args:
        num_mels: mel bands M, 40 or 80.

    >>> wave = torch.randn(2, 4000)
    >>> torch.allclose(ConvolutionalLogMel(40)(wave), LogMel(40)(FULL_SCALE * wave), atol=1e-3)
    True
    """

    kernel: Tensor
    mel: Tensor

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        published = LogMel(num_mels)
        window = published.spectrogram.window.double()
        size = published.spectrogram.n_fft
        # Whole turns are taken off as integers; in floating point they would cost digits.
        turns = torch.outer(torch.arange(size // 2 + 1), torch.arange(len(window))) % size
        angles = turns.double() * (2 * math.pi / size)
        rows = FULL_SCALE * window * torch.cat([angles.cos(), angles.sin()])
        self.register_buffer("kernel", rows.float()[:, None])
        self.register_buffer("mel", published.mel_scale.fb.T[:, :, None].contiguous())
        self.reach = len(window) // 2

    def forward(self, wave: Tensor) -> Tensor:
        """Features of waveforms of equal length.

        Args:
            wave: float32 [B, T] samples at 16 kHz with full scale 1.0, T >= 257.

        Returns:
            float32 [B, M, F] with F = 1 + T // 160; see `LogMel`.
        """
        padded = functional.pad(wave[:, None], (self.reach, self.reach), mode="reflect")
        spectrum = functional.conv1d(padded, self.kernel, stride=HOP)
        cosines, sines = spectrum.chunk(2, dim=1)
        # A matrix product, without the broadcast of one, which is traced as if there were never a single waveform.
        bands = functional.conv1d(cosines.square() + sines.square(), self.mel)
        log_mel = torch.log(bands + LOG_FLOOR)
        centred = log_mel - log_mel.mean(dim=2, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + _VARIANCE_EPSILON)


class WaveformEncoder(nn.Module):
    """Front end, encoder and normalisation of a model as one network: [B, T] to [B, D]."""

    def __init__(self, model: SpeakerModel) -> None:
        super().__init__()
        self.features = ConvolutionalLogMel(model.description.features.num_mels)
        self.encoder = model.encoder

    def forward(self, wave: Tensor) -> Tensor:
        """Unit embeddings float32 [B, D] of waveforms float32 [B, T] at 16 kHz with full scale 1.0."""
        return functional.normalize(self.encoder(self.features(wave)), dim=-1)


def traced(model: SpeakerModel) -> torch.export.ExportedProgram:
    """The network of a model as a program for any number of waveforms of any length from `MIN_SAMPLES` on.

    Args:
        model: on the CPU.

    Raises:
        CelError: the encoder computes what cannot be traced, such as a branch that depends on values or lengths.
    """
    dimensions = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("samples", min=MIN_SAMPLES)}
    failure: Exception | None = None
    for mode, oblivious in (
        (_WithoutMemoryFormats, True),
        (_WithoutMemoryFormats, False),
        (_FramesByConvolution, True),
    ):
        try:
            program = _traced(model, dimensions, mode(), oblivious=oblivious)
        # An encoder may be anybody's, and what torch raises has no common class.
        except Exception as error:
            failure = error
            continue
        for node in program.graph.nodes:
            # Paths of this machine.
            node.meta.pop("stack_trace", None)
        return program
    assert failure is not None
    raise not_exportable(model, "a graph", failure) from failure


def _traced(
    model: SpeakerModel, dimensions: dict[int, torch.export.Dim], mode: TorchFunctionMode, *, oblivious: bool
) -> torch.export.ExportedProgram:
    """One attempt of `traced`.

    Sizes above 1 in the example are taken to be so always, unless torch is told to be oblivious of them. That is what
    an encoder needs which leaves one frame of the shortest audio; one that never does may fail with it, because of a
    batch of one, which is no obstacle without. Which of them came about does not show in what is computed.
    """
    # torch has no other name for this setting; its exporter to ONNX uses it, too.
    setting = experimental_config.patch(backed_size_oblivious=oblivious)  # type: ignore[attr-defined]
    # An attempt that fails has the whole graph printed, and a warning; what there is to know is in what is raised.
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        for context in (setting, mode, contextlib.redirect_stderr(io.StringIO())):
            stack.enter_context(context)
        return torch.export.export(
            WaveformEncoder(model).eval(),
            (torch.zeros(2, SAMPLE_RATE),),
            dynamic_shapes={"wave": dimensions},
            prefer_deferred_runtime_asserts_over_guards=not oblivious,
        )


class _WithoutMemoryFormats(TorchFunctionMode):
    """Leaves tensors as they lie where an encoder asks for channels last.

    That is for the kernels of one machine, and whether a tensor has this format depends on which of its sizes are 1.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.contiguous:
            kwargs.pop("memory_format", None)
        return func(*args, **kwargs)


class _FramesByConvolution(_WithoutMemoryFormats):
    """Multiplies frames [B, F, C] by a matrix as a convolution of width 1, too.

    torch chooses among ways to multiply by whether there is one frame, and a program would be held to the choice. That
    is what a pooling with weights does behind an encoder which leaves one frame of the shortest audio.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and args[0].dim() == 3:
            weight, bias = args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and (args[0].dim(), args[1].dim()) == (3, 2):
            weight, bias = args[1].T, None
        else:
            return super().__torch_function__(func, types, args, kwargs)
        return functional.conv1d(args[0].transpose(1, 2), weight[:, :, None], bias).transpose(1, 2)


def not_exportable(model: SpeakerModel, kind: str, error: Exception) -> CelError:
    """What to raise where a model cannot be written as `kind`, for the reason that torch gave."""
    return CelError(
        f"encoder '{model.description.encoder.name}' cannot be exported as {kind} for waveforms of any number and "
        f"length ({reason(error)}); change it, or export --format safetensors, which takes any encoder"
    )


def reason(error: Exception) -> str:
    """The first line of what went wrong at first: exporters say more, in many lines and layers."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"
