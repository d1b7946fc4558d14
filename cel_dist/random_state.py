"""States of the random generators of a process, for encoders that draw (dropout); all else that training draws is a
function of seed and step."""

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Seed the generators of this process, differently on every rank."""
    words = np.random.SeedSequence((seed, rank)).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    np.random.seed(words)
    random.seed(words.tobytes())


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of torch (CPU, and `device` if that is a GPU), numpy and Python, as tensors and plain
    numbers, so that `torch.load` reads them with `weights_only=True`."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned; that of a GPU only where there is one again."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
