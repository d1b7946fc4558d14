"""What the machine can do, and what a training step of an encoder asks of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# A product of matrices that takes so long is large enough to be timed.
_ENOUGH_SECONDS = 0.02
_MOST_ROWS = 8192


def machine(config_file: Path) -> dict[str, Any]:
    """Rates of the device, and the work of the encoder of a configuration for an utterance of two views."""
    from cel_dist.config_file import load_config
    from cel_dist.features import HOP, segment_samples
    from cel_dist.training.objective import new_encoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(config_file)
    frames = 1 + segment_samples(config.data.segment_frames) // HOP
    encoder, rows = new_encoder(config), 4
    features = torch.randn(rows, config.features.num_mels, frames)
    with FlopCounterMode(display=False) as operations, ByteCounter() as moved:
        encoder(features).sum().backward()
    # The counter takes a multiplication and an addition for two.
    return {
        "rates": rates(device),
        "multiply_adds": operations.get_total_flops() // 2 * 2 // rows,
        "bytes": moved.total * 2 // rows,
    }


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that all operations read and write, as if no cache kept anything for the next one."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            tensors = [
                one for one in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)
            ]
            self.total += sum(one.numel() * one.element_size() for one in tensors)
        return result


def _is_view(func: Any) -> bool:
    """Whether an operation gives its input another shape and moves nothing."""
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def rates(device: torch.device) -> dict[str, float]:
    """Matrix products in multiply-adds a second by dtype, and copies in bytes a second, read and written.

    The better one of torch's own product and of a convolution with one tap, which on a CPU is another library.
    """
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows, rate, seconds = 256, 0.0, 0.0
        while seconds < _ENOUGH_SECONDS and rows <= _MOST_ROWS:
            one = torch.randn(rows, rows, device=device, dtype=dtype)
            pixels = one.T.reshape(1, rows, 16, rows // 16).contiguous(memory_format=torch.channels_last)
            taps = one[:, :, None, None]
            seconds = least_seconds(lambda one=one: one @ one, device)  # type: ignore[misc]
            if name == "fp32":
                seconds = min(seconds, least_seconds(lambda p=pixels, t=taps: torch.conv2d(p, t), device))  # type: ignore[misc]
            rate = max(rate, rows**3 / seconds)
            rows *= 2
        found[f"matrix_{name}"] = rate
    one = torch.empty(64 << 20, device=device)
    other = torch.empty_like(one)
    found["copy"] = 2 * one.numel() * 4 / least_seconds(lambda: other.copy_(one), device)
    return found


def least_seconds(work: Callable[[], Any], device: torch.device, repetitions: int = 6) -> float:
    """The shortest of some repetitions; the first one is not counted."""
    seconds = []
    for _ in range(1 + repetitions):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
