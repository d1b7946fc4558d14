"""What a user can do about a rank that runs out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cel_dist.config import Config
from cel_dist.distributed import World
from cel_dist.errors import RunError

# How PyTorch's allocator for the CPU begins the RuntimeError that it raises.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def advice_on_memory(config: Config, world: World) -> Iterator[None]:
    """Turn running out of memory within the block into a RunError that says which settings to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _advice(config, world, str(error)) from error
    except RuntimeError as error:
        if _CPU_ALLOCATOR not in str(error):
            raise
        raise _advice(config, world, str(error)) from error


def _advice(config: Config, world: World, message: str) -> RunError:
    """The settings that take memory, those first that change nothing of the result."""
    rows = config.train.batch_size // world.size
    means = []
    if config.train.encode_chunks < rows:
        means.append(f"raise train.encode_chunks={config.train.encode_chunks} (parts of the {rows} rows of a rank)")
    if config.loss.exchange != "ring" and world.size > 1:
        means.append("set loss.exchange=ring")
    if config.engine.zero_stage < 3 and world.size > 1:
        means.append(f"raise engine.zero_stage={config.engine.zero_stage}")
    if config.train.precision == "fp32":
        means.append("set train.precision=bf16")
    means.append(f"use more ranks, or lower train.batch_size={config.train.batch_size} in a new run")
    said = " ".join(message.split())[:160] or "no memory"
    return RunError(
        f"rank {world.rank} ran out of memory ({said}): {', or '.join(means)}; then run again, it continues"
    )
