"""What a rank takes of the processor, and what it can expect of it."""

import torch

from cel_dist.config import Config
from cel_dist.data.pool import default_workers
from cel_dist.distributed import World


def num_threads(config: Config, world: World) -> int:
    """Threads of this rank's tensor operations: an equal share of the cores among the ranks of the machine."""
    return config.train.threads or max(1, default_workers() // world.local_size)


def remark_on_precision(config: Config, device: torch.device) -> str | None:
    """What is to be said of the precision: on a processor without instructions for bf16 torch goes through every
    product by itself."""
    if config.train.precision == "fp32" or device.type != "cpu" or has_bf16_units():
        return None
    return (
        "train.precision=bf16: this processor has no instructions for bf16, and a step takes many times as long as in "
        "fp32; set train.precision=fp32"
    )


def has_bf16_units() -> bool:
    """Whether the processor computes products of bf16 matrices itself (AVX512-BF16, AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
