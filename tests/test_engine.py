import pytest
import torch
from torch import nn
from worlds import run_world

from cel_dist.config import parse_config
from cel_dist.distributed import World
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective

BATCH, VIEWS, MELS, FRAMES, STEPS, RATE = 12, 2, 40, 6, 3, 1e-3
SIMILARITY = "angular_prototypical"


class SmallEncoder(nn.Module):
    """Without batch norm, so that the number of ranks must not matter at all."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(MELS * FRAMES, 24)
        self.output = nn.Linear(24, 16)

    def forward(self, features):
        return self.output(torch.tanh(self.hidden(features.flatten(1))))


class NormalisedEncoder(nn.Module):
    """Only batch norm, whose statistics depend on which rows a rank has."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(MELS * FRAMES)

    def forward(self, features):
        return self.norm(features.flatten(1))


def features():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(STEPS, BATCH, VIEWS, MELS, FRAMES, generator=generator)


def objective(similarity, group):
    torch.manual_seed(0)
    return Objective(SmallEncoder(), EquilibriumLoss(similarity=similarity, group=group), "separate")


def train_with_the_engine(similarity, stage, precision="fp32", clip_norm=0.0, chunks=1):
    import torch.distributed as dist

    from cel_dist.engine import Engine, start_process_group, stop_process_group

    world = World.from_environment()
    device = start_process_group(world)
    config = parse_config(
        {
            "data": {"shards": "none"},
            "augment": {"profile": 0},
            "train": {"batch_size": BATCH, "precision": precision, "encode_chunks": chunks},
            "engine": {"zero_stage": stage},
            "optim": {"clip_norm": clip_norm},
        },
        "test",
    )
    engine = Engine(objective(similarity, dist.group.WORLD), config, world, device)
    losses, norms = [], []
    for batch in features():
        output = engine.forward_backward(batch[world.rows(BATCH)])
        losses.append(output.loss.item())
        norms.append(engine.gradient_norm().item())
        engine.step(RATE)
    state, scalars = engine.encoder_state(), engine.loss_scalars()
    stop_process_group()
    return losses, norms, {name: tensor.numpy() for name, tensor in state.items()}, scalars


def train_plainly(similarity, clip_norm=0.0):
    module = objective(similarity, None)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    losses, norms = [], []
    for batch in features():
        output = module("whole", batch, None)
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        limit = clip_norm or float("inf")
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), limit).item())
        optimizer.step()
    return losses, norms, module


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process_on_the_whole_batch(tmp_path, stage, chunks):
    # Four chunks of a rank's six rows come out uneven.
    losses, norms, module = train_plainly(SIMILARITY)
    for rank_losses, rank_norms, state, scalars in run_world(
        2, train_with_the_engine, SIMILARITY, stage, "fp32", 0.0, chunks, folder=tmp_path
    ):
        assert rank_losses == pytest.approx(losses, rel=2e-6)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        for name, tensor in module.encoder.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), tensor, rtol=0, atol=1e-6)
        assert scalars["w"] == pytest.approx(module.loss.w.item(), abs=1e-6)


def test_clipping_is_what_the_configuration_says(tmp_path):
    clipped, _, _, _ = run_world(1, train_with_the_engine, SIMILARITY, 0, "fp32", 1e-4, folder=tmp_path)[0]
    expected, norms, _ = train_plainly(SIMILARITY, clip_norm=1e-4)
    assert min(norms) > 1e-4
    assert clipped == pytest.approx(expected, rel=1e-5)


def test_bf16_changes_the_arithmetic_but_not_the_type_of_the_parameters(tmp_path):
    losses, _, state, scalars = run_world(1, train_with_the_engine, SIMILARITY, 0, "bf16", folder=tmp_path)[0]
    exact, _, _ = train_plainly(SIMILARITY)
    assert losses[0] == pytest.approx(exact[0], rel=0.05)
    assert losses[0] != pytest.approx(exact[0], rel=1e-6)
    assert all(tensor.dtype == "float32" for tensor in state.values())
    assert scalars["w"] != 10.0


def normalised_objective(group):
    return Objective(NormalisedEncoder(), EquilibriumLoss(similarity=SIMILARITY, group=group), "separate")


def statistics_after_a_step():
    import torch.distributed as dist

    from cel_dist.engine import Engine, start_process_group, stop_process_group

    world = World.from_environment()
    device = start_process_group(world)
    tree = {"data": {"shards": "none"}, "augment": {"profile": 0}, "train": {"batch_size": BATCH}}
    engine = Engine(normalised_objective(dist.group.WORLD), parse_config(tree, "test"), world, device)
    engine.backward(engine.forward(features()[0][world.rows(BATCH)]).loss)
    engine.step(RATE)
    buffers = {name: buffer.numpy().copy() for name, buffer in engine.objective.encoder.named_buffers()}
    stop_process_group()
    return buffers


def test_batch_norm_statistics_are_the_mean_over_the_ranks(tmp_path):
    alone = []
    for rank in range(2):
        module = normalised_objective(None)
        module(features()[0][World(rank=rank, size=2).rows(BATCH)])
        alone.append(dict(module.encoder.named_buffers()))
    for buffers in run_world(2, statistics_after_a_step, folder=tmp_path):
        for name in ("norm.running_mean", "norm.running_var"):
            assert not torch.allclose(alone[0][name], alone[1][name])
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(torch.from_numpy(buffers[name]), expected, rtol=1e-6, atol=1e-7)
        assert buffers["norm.num_batches_tracked"] == VIEWS
