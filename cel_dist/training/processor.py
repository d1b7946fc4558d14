"""What a rank takes of the processor and of memory, and what it can expect of them."""

import ctypes
import logging

import torch

from cel_dist.config import Config
from cel_dist.data.pool import default_workers
from cel_dist.distributed import World

# Parameters of glibc's `mallopt` (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def settle(config: Config, world: World) -> None:
    """Give this process its threads, and let it keep the memory that it frees.

    A step allocates and frees the same maps again and again. glibc hands larger ones back to the system, which clears
    every page anew the next time. Other allocators are left as they are.
    """
    torch.set_num_threads(num_threads(config, world))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions refuse more than half of a heap of theirs. Where both are refused, the second setting alone would
    # make it worse: it ends the growth of the threshold by itself.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def num_threads(config: Config, world: World) -> int:
    """Threads of this rank's tensor operations: an equal share of the cores among the ranks of the machine."""
    return config.train.threads or max(1, default_workers() // world.local_size)


def remark_on_cores(world: World, device: torch.device) -> str | None:
    """What is to be said where the ranks of a machine without GPUs are more than the cores that they may use."""
    cores = default_workers()
    if device.type != "cpu" or world.local_size <= cores:
        return None
    return (
        f"{world.local_size} processes share {cores} cores, and wait for each other at every step; "
        f"--nproc {cores} or fewer is faster"
    )


def remark_on_precision(config: Config, device: torch.device) -> tuple[int, str] | None:
    """What is to be said of the precision on a CPU, with its level of `logging`.

    Without instructions for bf16 torch goes through every product by itself; with them fp32 is the slower way.
    """
    is_bf16 = config.train.precision == "bf16"
    if device.type != "cpu" or has_bf16_units() == is_bf16:
        return None
    if is_bf16:
        return logging.WARNING, (
            "train.precision=bf16: this processor has no instructions for bf16, and a step takes many times as long as "
            "in fp32; set train.precision=fp32"
        )
    return logging.INFO, "this processor has instructions for bf16: train.precision=bf16 trains faster than fp32"


def has_bf16_units() -> bool:
    """Whether the processor computes products of bf16 matrices itself (AVX512-BF16, AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
