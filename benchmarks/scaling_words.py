"""What a training step sends, as formulas: collectives, their number, and the bytes that a rank gives to each.

`scaling.py` counts the same in real worlds; `tests/test_benchmarks.py` holds the two together.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "broadcast", "send"]
FLOAT, DOUBLE = 4, 8
# Scalars in the loss's exchange: two of faults, pairs of equal ids, distance of the views; loss and accuracy; a
# logarithm for each view.
SCALARS = 8
# DeepSpeed's stage3_param_persistence_threshold: what is not larger stays whole on every rank.
PERSISTENT = 100_000


@dataclass(frozen=True)
class Sent:
    """One kind of collective of a part of the step: `number` of them, to which this rank gives `given` bytes in all.

    The part `agreement` is what the training loop asks of all ranks: is there a batch everywhere, are loss and gradient
    finite. It does not depend on the model, and is taken as it was counted.
    """

    part: str
    kind: Kind
    number: int
    given: int

    def on_the_wire(self, ranks: int) -> float:
        """Bytes that a rank sends where the collectives run around a ring, the least that any way needs."""
        factor = {
            "all-gather": ranks - 1,
            "all-reduce": 2 * (ranks - 1) / ranks,
            "reduce-scatter": (ranks - 1) / ranks,
            "broadcast": 1,
            "send": 1,
        }
        return self.given * factor[self.kind]


@dataclass(frozen=True)
class Encoder:
    """What the traffic depends on: numbers of all parameters, tensor by tensor, channels of all batch norms."""

    name: str
    parameters: tuple[int, ...]
    channels: tuple[int, ...]
    dim: int

    @property
    def size(self) -> int:
        """P, the number of its parameters."""
        return sum(self.parameters)


@dataclass(frozen=True)
class Step:
    """W ranks with b utterances each, V views, ZeRO stage; A-Prot and PoN."""

    encoder: Encoder
    ranks: int
    share: int
    stage: int = 0
    exchange: Literal["gather", "ring"] = "gather"
    batch_norm: Literal["global", "per_rank"] = "global"
    views: int = 2
    joint: bool = False
    # Of w and b.
    loss_parameters: int = 2

    def with_ranks(self, ranks: int) -> "Step":
        return replace(self, ranks=ranks)

    @property
    def rows_bytes(self) -> int:
        """Of this rank's rows with their ids, two words each."""
        return FLOAT * self.share * (self.views * self.encoder.dim + 2)


def sent(step: Step) -> list[Sent]:
    """All collectives of a step but those of the part `agreement`."""
    if step.ranks == 1:
        return []
    found = [*_batch_norm(step), *_loss(step), *_engine(step)]
    statistics = 2 * sum(step.encoder.channels)
    found.append(Sent("running statistics", "all-reduce", 1, FLOAT * statistics))
    return found


def _batch_norm(step: Step) -> list[Sent]:
    if step.batch_norm == "per_rank":
        return []
    passes = 1 if step.joint else step.views
    channels = step.encoder.channels
    forward = FLOAT * passes * sum(2 * count + 1 for count in channels)
    backward = FLOAT * passes * sum(2 * count for count in channels)
    return [
        Sent("batch norm", "all-gather", passes * len(channels), forward),
        Sent("batch norm", "all-reduce", passes * len(channels), backward),
    ]


def _loss(step: Step) -> list[Sent]:
    exchange = Sent("loss, exchange", "all-gather", 1, DOUBLE * (SCALARS + step.share))
    if step.exchange == "gather":
        return [Sent("loss, rows", "all-gather", 1, step.rows_bytes), exchange]
    # Two passes over the rows of the others.
    turns = 2 * (step.ranks - 1)
    return [Sent("loss, rows", "send", turns, turns * step.rows_bytes), exchange]


def _engine(step: Step) -> list[Sent]:
    ranks, tensors = step.ranks, [*step.encoder.parameters, *[1] * step.loss_parameters]
    if step.stage == 0:
        return [Sent("gradients", "all-reduce", 1, FLOAT * sum(tensors))]
    if step.stage < 3:
        # DeepSpeed sums the whole gradient on every rank in stages 1 and 2, too, and cuts it afterwards. The parameters
        # of encoder and loss are two groups, each padded to a multiple of two a rank.
        groups = (step.encoder.size, step.loss_parameters)
        cut = sum(2 * math.ceil(group / (2 * ranks)) for group in groups)
        return [
            Sent("gradients", "all-reduce", 1, FLOAT * sum(tensors)),
            Sent("gradient norm", "all-reduce", 1, FLOAT),
            Sent("parameters", "all-gather", len(groups), FLOAT * cut),
        ]
    parts = [math.ceil(count / ranks) for count in tensors]
    whole = [part for part, count in zip(parts, tensors, strict=True) if count <= PERSISTENT]
    # Together before the forward pass, and kept until after the backward one. w and b go along, because setting their
    # bounds lets them go.
    fetched = [part for part, count in zip(parts, tensors, strict=True) if count > PERSISTENT]
    fetched += [1] * step.loss_parameters
    return [
        Sent("gradients", "reduce-scatter", 1, FLOAT * ranks * sum(parts)),
        Sent("gradient norm", "all-reduce", 3, FLOAT + 2 * DOUBLE),
        # Those that stay whole are sent one by one after every update.
        Sent("parameters", "all-gather", len(whole) + 1, FLOAT * (sum(whole) + sum(fetched))),
        Sent("parameters", "broadcast", step.loss_parameters, FLOAT * step.loss_parameters),
    ]


def rows_in_memory(step: Step) -> int:
    """Bytes of the rows of other ranks that a rank holds: all of them, or three blocks of a ring."""
    return step.rows_bytes * (step.ranks if step.exchange == "gather" else 3)
