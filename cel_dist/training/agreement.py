"""What all ranks must know of a step before they update anything, in one collective, and what they do about a step that
cannot be taken."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cel_dist.distributed import World
from cel_dist.training.batches import TrainBatch


class Agreement(NamedTuple):
    """The same on all ranks.

    Attributes:
        loss: of the global batch; its mean over the ranks.
        gradient_norm: likewise.
        num_faults: utterances of the global batch that could not be read.
        num_stopping: ranks that were asked to end.
    """

    loss: float
    gradient_norm: float
    num_faults: int
    num_stopping: int

    @property
    def is_finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def agree(loss: Tensor, gradient_norm: Tensor, *, num_faults: int, is_stopping: bool, world: World) -> Agreement:
    """Tell the other ranks how a step went, and hear it from them. A sum is finite only where every term is."""
    values = torch.stack(
        [
            loss.detach().double(),
            gradient_norm.double(),
            *loss.new_tensor([num_faults, is_stopping], dtype=torch.float64),
        ]
    )
    dist.all_reduce(values)
    sum_of_losses, sum_of_norms, total_faults, num_stopping = values.tolist()
    return Agreement(sum_of_losses / world.size, sum_of_norms / world.size, int(total_faults), int(num_stopping))


def _in_order(samples: Tensor) -> list[int]:
    return list(dict.fromkeys(samples.flatten().tolist()))


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
