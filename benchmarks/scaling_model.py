"""How long a step would take on stated networks: computing, and the collectives of `scaling_words`, one after the
other.

A collective costs its latency, a starting time and one hop a round, and its bytes around a ring at the speed of the
slowest link. Nothing overlaps: DeepSpeed reduces the gradients of this small encoder after the backward pass, and the
loss waits for its rows.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from scaling_words import Encoder, Sent, Step, rows_in_memory, sent
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cel_dist.encoders import fast_resnet34
from cel_dist.losses import EquilibriumLoss

# Two views of the published length.
VIEWS, FRAMES, DIM = 2, 180, 512
RANKS = (1, 8, 64, 256, 1024)
SHARES = (128, 256, 512, 1024)
# A larger encoder of the same form.
WIDE_CHANNELS = (60, 120, 240, 480)


@dataclass(frozen=True)
class Network:
    """Machines and what joins them. Assumed, not measured.

    Attributes:
        name: for the tables.
        per_node: accelerators of a machine.
        inside_seconds: latency between two of them.
        inside_rate: bytes a second between two of them.
        between_seconds: latency between machines, through all layers of software.
        between_rate: bytes a second out of a machine, all its network cards together.
    """

    name: str
    per_node: int
    inside_seconds: float
    inside_rate: float
    between_seconds: float
    between_rate: float


NETWORKS = (
    Network("1 GbE", 1, 5e-6, 12e9, 50e-6, 0.115e9),
    Network("10 GbE", 4, 5e-6, 12e9, 30e-6, 1.1e9),
    Network("100 GbE RoCE", 8, 5e-6, 20e9, 10e-6, 11e9),
    Network("NVLink, 8 x 400 Gb/s InfiniBand", 8, 3e-6, 350e9, 6e-6, 8 * 45e9),
)


@dataclass(frozen=True)
class Accelerator:
    """What one computes with, sustained. Assumed, not measured.

    Attributes:
        encoder_rate: operations a second on the encoder, whose small convolutions wait for memory.
        loss_rate: on the matrix products of the loss in fp32.
        launch_seconds: of starting a collective, whatever its size.
    """

    encoder_rate: float = 10e12
    loss_rate: float = 30e12
    launch_seconds: float = 15e-6


def shipped_encoder() -> Encoder:
    """The encoder of the published recipe."""
    return _described("Fast ResNet-34", fast_resnet34.FastResNet34(DIM))


def wide_encoder() -> Encoder:
    """The same with 3.75 times the filters."""
    return _described("3.75 times as wide", _Wide(DIM))


class _Wide(fast_resnet34.FastResNet34):
    layout = tuple(
        (channels, *rest) for channels, (_, *rest) in zip(WIDE_CHANNELS, fast_resnet34.FastResNet34.layout, strict=True)
    )


def _described(name: str, module: nn.Module) -> Encoder:
    norms = [found for found in module.modules() if isinstance(found, nn.modules.batchnorm._BatchNorm)]
    parameters = tuple(parameter.numel() for parameter in module.parameters())
    return Encoder(name, parameters, tuple(norm.num_features for norm in norms), DIM)


def flops() -> dict[str, float]:
    """Operations, counted: forward and backward of an utterance in both encoders; of a pair and dimension in the "
    "loss."""
    found = {}
    for encoder, module in ((shipped_encoder(), fast_resnet34.FastResNet34(DIM)), (wide_encoder(), _Wide(DIM))):
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(VIEWS, 40, FRAMES)).sum().backward()
        found[encoder.name] = float(counter.get_total_flops())
    rows = torch.randn(64, VIEWS, DIM, requires_grad=True)
    with _Products() as products:
        EquilibriumLoss()(rows).loss.backward()
    found["loss"] = products.operations / (64 * 64 * DIM)
    return found


class _Products(TorchDispatchMode):
    """Operations of the matrix products in the block; torch's own counter leaves out those that write into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_"):
            first, second = [found.shape for found in args if isinstance(found, torch.Tensor)][-2:]
            self.operations += 2 * first[0] * first[1] * second[1]
        return func(*args, **(kwargs or {}))


def collective_seconds(one: Sent, ranks: int, network: Network, accelerator: Accelerator) -> float:
    """Of all `one.number` of them. Rounds are logarithmic in the ranks, save for the neighbours of a ring."""
    inside = min(ranks, network.per_node)
    nodes = math.ceil(ranks / network.per_node)
    if one.kind == "send":
        # All turns cross the slowest link, at the same time.
        latency = network.between_seconds if nodes > 1 else network.inside_seconds
    else:
        hops = math.ceil(math.log2(inside)) * network.inside_seconds
        hops += math.ceil(math.log2(nodes)) * network.between_seconds
        latency = hops * (2 if one.kind == "all-reduce" else 1)
    rate = network.inside_rate if nodes == 1 else min(network.inside_rate, network.between_rate)
    return one.number * (accelerator.launch_seconds + latency) + one.on_the_wire(ranks) / rate


@dataclass(frozen=True)
class Modelled:
    """Seconds of a step, computing and sending."""

    encoder: float
    loss: float
    parts: dict[str, float]

    @property
    def sending(self) -> float:
        return sum(self.parts.values())

    @property
    def efficiency(self) -> float:
        """Encoding an utterance is what one rank would do as well; all else is the price of the others."""
        return self.encoder / (self.encoder + self.loss + self.sending)

    @property
    def worst(self) -> str:
        """What takes the most time beside the encoder."""
        parts = {**self.parts, "loss, products": self.loss}
        return max(parts, key=lambda name: parts[name])


def model(
    step: Step, network: Network, work: dict[str, float], agreement: list[Sent], accelerator: Accelerator
) -> Modelled:
    """A step of `step.ranks` ranks."""
    parts: dict[str, float] = {}
    for one in [*sent(step), *(agreement if step.ranks > 1 else [])]:
        parts[one.part] = parts.get(one.part, 0.0) + collective_seconds(one, step.ranks, network, accelerator)
    pairs = step.share * step.share * step.ranks
    return Modelled(
        encoder=step.share * work[step.encoder.name] / accelerator.encoder_rate,
        loss=pairs * step.encoder.dim * work["loss"] / accelerator.loss_rate,
        parts=parts,
    )


def agreement_of(counts: list[dict]) -> list[Sent]:
    """What the training loop asks of all ranks, as counted in the largest world."""
    row = max(counts, key=lambda row: row["W"])
    return [Sent(s["part"], s["kind"], s["number"], s["given"]) for s in row["sent"] if s["part"] == "agreement"]


def modelled(work: dict[str, float], counts: list[dict], accelerator: Accelerator) -> dict[str, Any]:
    """Everything that the tables show."""
    agreement = agreement_of(counts)
    encoders = (shipped_encoder(), wide_encoder())
    words, grid, variants = [], [], []
    for encoder in encoders:
        for ranks in RANKS[1:]:
            words.append({"encoder": encoder.name, "W": ranks, "b": 256, **wire_words(encoder, ranks, 256, agreement)})
        for network in NETWORKS:
            for share in SHARES:
                for ranks in RANKS[1:]:
                    found = model(Step(encoder, ranks, share), network, work, agreement, accelerator)
                    row = {"encoder": encoder.name, "network": network.name, "b": share, "W": ranks}
                    grid.append({**row, "efficiency": found.efficiency, "worst": found.worst})
            base = Step(encoder, 256, 256)
            changes = {
                "as shipped": base,
                "encoder.views=joint": replace(base, joint=True),
                "encoder.batch_norm=per_rank": replace(base, batch_norm="per_rank"),
                "loss.exchange=ring": replace(base, exchange="ring"),
                "engine.zero_stage=1": replace(base, stage=1),
                "engine.zero_stage=3": replace(base, stage=3),
            }
            for name, step in changes.items():
                found = model(step, network, work, agreement, accelerator)
                row = {"encoder": encoder.name, "network": network.name, "change": name, "seconds": found.parts}
                variants.append({**row, "efficiency": found.efficiency, "sending": found.sending})
    return {
        "encoders": [
            {"name": e.name, "parameters": e.size, "tensors": len(e.parameters), "batch_norms": len(e.channels)}
            for e in encoders
        ],
        "networks": [asdict(network) for network in NETWORKS],
        "accelerator": asdict(accelerator),
        "words": words,
        "grid": grid,
        "variants": variants,
        "loss": [loss_row(work, share, ranks, accelerator) for share in SHARES for ranks in RANKS],
    }


def wire_words(encoder: Encoder, ranks: int, share: int, agreement: list[Sent]) -> dict[str, Any]:
    """fp32 words that a rank sends a step, by part, and the collectives of a step."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 3):
        total = {}
        collectives = sum(one.number for one in agreement)
        for one in sent(Step(encoder, ranks, share, stage=stage)):
            total[one.part] = total.get(one.part, 0) + one.on_the_wire(ranks) / 4
            collectives += one.number
        found[f"stage {stage}"] = {**{name: round(value) for name, value in total.items()}, "collectives": collectives}
    ring = [s for s in sent(Step(encoder, ranks, share, exchange="ring")) if s.part == "loss, rows"]
    found["ring"] = round(sum(one.on_the_wire(ranks) for one in ring) / 4)
    return found


def loss_row(work: dict[str, float], share: int, ranks: int, accelerator: Accelerator) -> dict[str, Any]:
    """What grows with the global batch: rows in memory, and the products of a rank."""
    step = Step(shipped_encoder(), ranks, share)
    return {
        "b": share,
        "W": ranks,
        "K": share * ranks,
        "gathered_mebibytes": rows_in_memory(step) / 2**20,
        "ring_mebibytes": rows_in_memory(replace(step, exchange="ring")) / 2**20,
        "products_seconds": share * share * ranks * DIM * work["loss"] / accelerator.loss_rate,
        "encoder_seconds": share * work[step.encoder.name] / accelerator.encoder_rate,
    }
