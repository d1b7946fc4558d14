import pytest
import torch
from torch import nn
from worlds import run_world

from cel_dist.config_file import parse_config
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


def train_with_the_engine(*cases):
    """Train on this rank's rows once for every case: stage, and of the others `precision`, `clip_norm`, `chunks`."""
    import torch.distributed as dist

    from cel_dist.engine import Engine, start_process_group, stop_process_group

    world = World.from_environment()
    device = start_process_group(world)
    results = []
    for stage, other in cases:
        config = parse_config(
            {
                "data": {"shards": "none"},
                "augment": {"profile": 0},
                "train": {
                    "batch_size": BATCH,
                    "precision": other.get("precision", "fp32"),
                    "encode_chunks": other.get("chunks", 1),
                },
                "engine": {"zero_stage": stage},
                "optim": {"clip_norm": other.get("clip_norm", 0.0)},
            },
            "test",
        )
        engine = Engine(objective(SIMILARITY, dist.group.WORLD), config, world, device)
        losses, norms = [], []
        for batch in features():
            output = engine.forward_backward(batch[world.rows(BATCH)])
            losses.append(output.loss.item())
            norms.append(engine.gradient_norm().item())
            engine.step(RATE)
        state = {name: tensor.numpy() for name, tensor in engine.encoder_state().items()}
        results.append((losses, norms, state, engine.loss_scalars()))
    stop_process_group()
    return results


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


STAGES_AND_CHUNKS = [(stage, chunks) for stage in (0, 1, 2, 3) for chunks in (1, 4)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks made of every stage, with and without chunks, in one start of their world."""
    cases = [(stage, {"chunks": chunks}) for stage, chunks in STAGES_AND_CHUNKS]
    return run_world(2, train_with_the_engine, *cases, folder=tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize(("stage", "chunks"), STAGES_AND_CHUNKS)
def test_two_ranks_train_as_one_process_on_the_whole_batch(ranks, stage, chunks):
    # Four chunks of a rank's six rows come out uneven.
    losses, norms, module = train_plainly(SIMILARITY)
    for results in ranks:
        rank_losses, rank_norms, state, scalars = results[STAGES_AND_CHUNKS.index((stage, chunks))]
        assert rank_losses == pytest.approx(losses, rel=2e-6)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        for name, tensor in module.encoder.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), tensor, rtol=0, atol=1e-6)
        assert scalars["w"] == pytest.approx(module.loss.w.item(), abs=1e-6)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    cases = [(0, {"clip_norm": 1e-4}), (0, {"precision": "bf16"})]
    return run_world(1, train_with_the_engine, *cases, folder=tmp_path_factory.mktemp("one_rank"))[0]


def test_clipping_is_what_the_configuration_says(one_rank):
    clipped, _, _, _ = one_rank[0]
    expected, norms, _ = train_plainly(SIMILARITY, clip_norm=1e-4)
    assert min(norms) > 1e-4
    assert clipped == pytest.approx(expected, rel=1e-5)


def test_bf16_changes_the_arithmetic_but_not_the_type_of_the_parameters(one_rank):
    losses, _, state, scalars = one_rank[1]
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
    engine.forward_backward(features()[0][world.rows(BATCH)])
    engine.step(RATE)
    buffers = {name: buffer.numpy().copy() for name, buffer in engine.objective.encoder.named_buffers()}
    stop_process_group()
    return buffers


def test_batch_norm_statistics_are_the_mean_over_the_ranks(tmp_path):
    alone = []
    for rank in range(2):
        module = normalised_objective(None)
        module("whole", features()[0][World(rank=rank, size=2).rows(BATCH)], None)
        alone.append(dict(module.encoder.named_buffers()))
    for buffers in run_world(2, statistics_after_a_step, folder=tmp_path):
        for name in ("norm.running_mean", "norm.running_var"):
            assert not torch.allclose(alone[0][name], alone[1][name])
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(torch.from_numpy(buffers[name]), expected, rtol=1e-6, atol=1e-7)
        assert buffers["norm.num_batches_tracked"] == VIEWS
