"""What all ranks must know of a step, in one collective: whether it can be taken, which the device decides alone, and
what the host does about it when it hears of it.

The host is a step ahead: it reads what was agreed on a step when the device has been given the next one, or before
anything is recorded, saved or evaluated.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cel_dist.copies import Arrival
from cel_dist.distributed import World
from cel_dist.training.batches import TrainBatch


class Agreed(NamedTuple):
    """The same on all ranks.

    Attributes:
        loss: of the global batch; its mean over the ranks.
        gradient_norm: likewise.
        num_faults: utterances of the global batch that could not be read.
        num_failed: ranks that had no batch, and computed with the one before.
        num_stopping: ranks that were asked to end.
    """

    loss: float
    gradient_norm: float
    num_faults: int
    num_failed: int
    num_stopping: int

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Agreement:
    """What the ranks agreed on, first on the device.

    Attributes:
        refused: float32 scalar on the device: 1 for a step that cannot be taken, else 0. An optimizer calls it
            `found_inf`.
    """

    def __init__(self, sums: Tensor, num_ranks: int) -> None:
        self.refused = (~sums[:2].isfinite().all() | (sums[3] > 0)).float()
        self._sums, self._num_ranks = Arrival(sums), num_ranks

    @property
    def is_there(self) -> bool:
        """Whether the host would not wait for it, because the device is done with the step."""
        return self._sums.is_there

    def read(self) -> Agreed:
        """The same on the host, which waits for it."""
        loss, norm, *counts = self._sums.wait().tolist()
        return Agreed(loss / self._num_ranks, norm / self._num_ranks, *(int(count) for count in counts))


def agree(
    loss: Tensor, gradient_norm: Tensor, *, num_faults: int, has_failed: bool, is_stopping: bool, world: World
) -> Agreement:
    """Tell the other ranks how a step went, and hear it from them. A sum is finite only where every term is."""
    counts = (loss.new_full((), count, dtype=torch.float64) for count in (num_faults, has_failed, is_stopping))
    sums = torch.stack([loss.detach().double(), gradient_norm.double(), *counts])
    dist.all_reduce(sums)
    return Agreement(sums, world.size)


def describe_batch(batch: TrainBatch, world: World) -> dict[str, list[int]]:
    """What tells the utterances of a global batch; all ranks call this.

    Returns:
        `ids` of the samples of all ranks, in the order of their rows, and of them `not_finite`, those whose features
        are not: the loss of the others is not finite through no fault of their audio.
    """
    is_finite = batch.features.flatten(2).isfinite().all(dim=2).cpu()
    # The views of an utterance are one sample.
    own = _in_order(batch.utterances), _in_order(batch.utterances[~is_finite])
    parts: list[Any] = [own] * world.size
    dist.all_gather_object(parts, own)
    ids, not_finite = ([sample for part in parts for sample in part[place]] for place in (0, 1))
    return {"ids": ids, "not_finite": not_finite}


def _in_order(samples: Tensor) -> list[int]:
    return list(dict.fromkeys(samples.flatten().tolist()))
