"""Fifty steps of two ranks, under every ZeRO stage and in bf16, give the losses of stage 0 in fp32, and send what the
formulas of `benchmarks/scaling_words.py` say.

The tolerances are some three to five times what was seen (torch 2.13.0, DeepSpeed 0.19.8, x86_64). Between the
stages that was nothing, because a sum over two ranks has only one order. One process with all rows sums them in another
order, which came to 8e-7 of losses that go from 2.5 to -1.9. Rate and encoder are such that fifty steps do not amplify
it: with two blocks instead of one it grew to 3e-3, and with ReLU it depends on the processor whether a value lies on
one side of its kink or on the other.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from worlds import run_world

from cel_dist.config import Config
from cel_dist.config_file import parse_config
from cel_dist.distributed import World
from cel_dist.encoders.fast_resnet34 import ResidualBlock
from cel_dist.encoders.pooling import SelfAttentivePooling
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective, new_objective

# Scripts, not a package.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

BATCH, VIEWS, MELS, FRAMES, DIM, NUM_STEPS, RATE = 16, 2, 40, 16, 32, 50, 1e-3
NUM_SPEAKERS = 64
RUNS = {
    "stage 0": (0, "fp32"),
    "stage 1": (1, "fp32"),
    "stage 2": (2, "fp32"),
    "stage 3": (3, "fp32"),
    "stage 0, bf16": (0, "bf16"),
    "stage 3, bf16": (3, "bf16"),
}


class SmallResNet(nn.Module):
    """The parts of the real encoder, with one block, and smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 7, stride=(2, 1), padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.block = ResidualBlock(8, 16, 2)
        self.pooling = SelfAttentivePooling(16)
        self.projection = nn.Linear(16, DIM)

    def forward(self, features: Tensor) -> Tensor:
        with patch.object(torch, "relu", nn.functional.silu):
            maps = self.block(self.stem_norm(torch.relu(self.stem(features[:, None]))))
        return self.projection(self.pooling(maps.mean(dim=2).transpose(1, 2)))


def batches() -> Any:
    """Features [B, V, 40, F] of utterances of a few speakers, step by step: something to be learned."""
    generator = torch.Generator().manual_seed(11)
    speakers = torch.randn(NUM_SPEAKERS, 1, MELS, 1, generator=generator)
    for _ in range(NUM_STEPS):
        chosen = speakers[torch.randperm(NUM_SPEAKERS, generator=generator)[:BATCH]]
        yield chosen + torch.randn(BATCH, VIEWS, MELS, FRAMES, generator=generator)


def settings(stage: int, precision: str) -> Config:
    return parse_config(
        {
            "data": {"shards": "none"},
            "augment": {"profile": 0},
            "train": {"batch_size": BATCH, "precision": precision},
            "engine": {"zero_stage": stage},
        },
        "test",
    )


def fifty_steps(stage: int, precision: str) -> dict[str, Any]:
    """Losses, gradient norms and w of every step, and what the last one sends."""
    import torch.distributed as dist
    from scaling_ranks import Counted

    from cel_dist.engine import Engine

    config = settings(stage, precision)
    world = World.from_environment()
    torch.manual_seed(0)
    objective = new_objective(config, SmallResNet(), dist.group.WORLD, on_gpu=False)
    engine = Engine(objective, config, world, torch.device("cpu"))
    found: dict[str, Any] = {"losses": [], "norms": [], "scales": []}
    ids, counted = torch.arange(BATCH)[world.rows(BATCH)], Counted()
    for batch in batches():
        is_last = len(found["losses"]) == NUM_STEPS - 1
        with counted if is_last else nullcontext():
            output = engine.forward_backward(batch[world.rows(BATCH)], ids)
            found["losses"].append(output.loss.item())
            found["norms"].append(engine.gradient_norm().item())
            engine.step(RATE)
        found["scales"].append(engine.loss_scalars()["w"])
    found["sent"] = counted.rows()
    return found


def fifty_plain_steps() -> dict[str, list[float]]:
    """The same of one process with the whole batch, torch's optimizer, and no engine."""
    torch.manual_seed(0)
    objective = Objective(SmallResNet(), EquilibriumLoss(), "separate")
    optimizer = torch.optim.AdamW(objective.parameters(), lr=RATE, weight_decay=0.0)
    found: dict[str, list[float]] = {"losses": [], "norms": [], "scales": []}
    for batch in batches():
        loss = objective("whole", batch, None).loss
        optimizer.zero_grad()
        loss.backward()
        found["losses"].append(loss.item())
        found["norms"].append(nn.utils.get_total_norm(p.grad for p in objective.parameters()).item())
        optimizer.step()
        found["scales"].append(objective.loss.w.item())
    return found


def all_runs() -> dict[str, dict[str, Any]]:
    """What this rank saw in each of `RUNS`."""
    from cel_dist.process_group import start_process_group, stop_process_group

    start_process_group(World.from_environment())
    found = {name: fifty_steps(stage, precision) for name, (stage, precision) in RUNS.items()}
    stop_process_group()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_world(2, all_runs, folder=tmp_path_factory.mktemp("stages"))


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == NUM_STEPS
    return max(abs(first - second) for first, second in zip(one, other, strict=True))


def test_stage_0_is_one_process_with_the_whole_batch(ranks) -> None:
    plain = fifty_plain_steps()
    assert plain["losses"][0] - plain["losses"][-1] > 4, "there is nothing to compare where nothing is learned"
    for rank in ranks:
        found = rank["stage 0"]
        assert largest_difference(found["losses"], plain["losses"]) < 3e-6
        # w goes from 10 to 10.05, and its last digit is 1e-6.
        assert largest_difference(found["scales"], plain["scales"]) < 3e-6
        assert found["norms"] == pytest.approx(plain["norms"], rel=2e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gives_the_losses_of_stage_0(ranks, stage: int) -> None:
    for rank in ranks:
        expected, found = rank["stage 0"], rank[f"stage {stage}"]
        assert largest_difference(found["losses"], expected["losses"]) < 1e-6
        assert largest_difference(found["scales"], expected["scales"]) < 1e-6
        # Summed over the parts that the ranks hold.
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_follows_fp32(ranks, stage: int) -> None:
    for rank in ranks:
        expected, found = rank["stage 0"], rank[f"stage {stage}, bf16"]
        # Seen: 8e-3. With less than 1e-4 it would be fp32 after all.
        assert 1e-4 < largest_difference(found["losses"], expected["losses"]) < 3e-2
        assert largest_difference(found["scales"], expected["scales"]) < 1e-4
        assert found["norms"] == pytest.approx(expected["norms"], rel=0.05)


def test_all_ranks_see_the_same_losses(ranks) -> None:
    first, second = ranks
    assert first == second


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_sends_what_the_formulas_say(ranks, stage: int) -> None:
    from scaling_words import Encoder, Step, sent

    encoder = SmallResNet()
    norms = [module.num_features for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    described = Encoder("small", tuple(p.numel() for p in encoder.parameters()), tuple(norms), DIM)
    expected = {(s.part, s.kind): (s.number, s.given) for s in sent(Step(described, 2, BATCH // 2, stage))}
    for rank in ranks:
        found = {(s["part"], s["kind"]): (s["number"], s["given"]) for s in rank[f"stage {stage}"]["sent"]}
        assert found == expected
