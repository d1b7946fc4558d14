"""Copies between the host and the device that the host does not wait for.

From memory that is not page-locked a GPU copies while the host waits, and a number that the host asks a GPU for makes
it wait for everything that the GPU was given before.
"""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array of the host as a tensor on a device; on a CPU a view of it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Arrival:
    """A tensor on its way to the host, as it is now; on a CPU, where it is there already, the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether nobody would have to wait for it."""
        return self._event is None or self._event.query()  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The tensor, as soon as it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
