import copy

import pytest
import torch
from torch import nn
from worlds import run_world

from cel_dist.config_file import parse_config
from cel_dist.distributed import World
from cel_dist.encoders.batch_norm import with_global_batch_norm
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective

BATCH, VIEWS, MELS, FRAMES, STEPS, RATE = 14, 2, 40, 6, 3, 1e-3
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


class DroppingEncoder(nn.Module):
    """Random numbers and running statistics, which a second pass over the same rows must not draw or move again."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(MELS * FRAMES, 24)
        self.norm = nn.BatchNorm1d(24)

    def forward(self, features):
        return nn.functional.dropout(self.norm(self.hidden(features.flatten(1))), 0.5, self.training)


class GainEncoder(nn.Module):
    """What the loss sees does not depend on the only parameter, however large a step is."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([100.0]))

    def forward(self, features):
        return self.gain * features.flatten(1)


def features():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(STEPS, BATCH, VIEWS, MELS, FRAMES, generator=generator)


def objective(similarity, group):
    torch.manual_seed(0)
    return Objective(SmallEncoder(), EquilibriumLoss(similarity=similarity, group=group), "separate")


def engine_of(module, stage, **other):
    """An engine on this rank; of the others `precision`, `chunks`, `clip_norm`, `weight_decay`."""
    from cel_dist.engine import Engine

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
            "optim": {"clip_norm": other.get("clip_norm", 0.0), "weight_decay": other.get("weight_decay", 0.0)},
        },
        "test",
    )
    return Engine(module, config, World.from_environment(), torch.device("cpu"))


def train_with_the_engine(*cases):
    """Train on this rank's rows once for every case: stage, and the others of `engine_of`."""
    import torch.distributed as dist

    from cel_dist.process_group import start_process_group, stop_process_group

    world = World.from_environment()
    start_process_group(world)
    results = []
    for stage, other in cases:
        engine = engine_of(objective(SIMILARITY, dist.group.WORLD), stage, **other)
        losses, norms = [], []
        for batch in features():
            # `torch.profiler` is the same instrument, but takes two seconds to import.
            with torch.autograd.profiler.profile(enabled=len(losses) == STEPS - 1) as profile:
                output = engine.forward_backward(batch[world.rows(BATCH)])
            losses.append(output.loss.item())
            norms.append(engine.gradient_norm().item())
            engine.step(RATE)
        state = {name: tensor.numpy() for name, tensor in engine.encoder_state().items()}
        results.append((losses, norms, state, engine.loss_scalars(), collectives(profile)))
    more = {}
    if world.size > 1:
        more["scales"] = {stage: scales_below_zero_and_back(stage) for stage in (0, 1, 2, 3)}
        more["dropout"] = {chunks: a_step_with_dropout(chunks) for chunks in (1, 2)}
        more["statistics"] = {kind: statistics_after_a_step(kind) for kind in ("per_rank", "global")}
    stop_process_group()
    return results, more


def collectives(profile):
    """Names of the collectives, in their order."""
    return [event.name for event in profile.function_events if event.name.startswith("c10d::")]


def scale_objective(group):
    loss = EquilibriumLoss(similarity=SIMILARITY, lambda_u=0.0, group=group)
    with torch.no_grad():
        loss.w.fill_(0.5)
    return Objective(GainEncoder(), loss, "separate")


def batches_for_the_scale():
    """Views that are opposites drive w down, views that are the same drive it up."""
    batch = features()[0]
    opposite, same = batch.clone(), batch.clone()
    opposite[:, 1], same[:, 1] = -batch[:, 0], batch[:, 0]
    return [(opposite, 2.0)] + 7 * [(same, 0.3)]


def scales_below_zero_and_back(stage):
    import torch.distributed as dist

    engine, scales = engine_of(scale_objective(dist.group.WORLD), stage), []
    for batch, rate in batches_for_the_scale():
        engine.forward_backward(batch[World.from_environment().rows(BATCH)])
        engine.step(rate)
        scales.append(engine.loss_scalars()["w"])
    return scales


def a_step_with_dropout(chunks):
    """Norm of the gradient and buffers of a step, and what plain autograd makes of the same rows and draws."""
    import torch.distributed as dist

    rows = features()[0][World.from_environment().rows(BATCH)]
    torch.manual_seed(0)
    module = Objective(DroppingEncoder(), EquilibriumLoss(similarity=SIMILARITY, group=dist.group.WORLD), "separate")
    plain, *others = (copy.deepcopy(module.encoder) for _ in range(1 + chunks))
    loss = EquilibriumLoss(similarity=SIMILARITY, group=dist.group.WORLD)
    engine = engine_of(module, 0, chunks=chunks)
    torch.manual_seed(1 + dist.get_rank())
    engine.forward_backward(rows)
    norm = engine.gradient_norm().item()
    torch.manual_seed(1 + dist.get_rank())
    parts = [torch.stack([plain(part[:, view]) for view in range(VIEWS)], dim=1) for part in rows.chunk(chunks)]
    loss(torch.cat(parts)).loss.backward()
    gradients = [parameter.grad for module in (plain, loss) for parameter in module.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    wanted = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
    running_mean = 0.0
    for part, encoder in zip(rows.chunk(chunks), others, strict=True):
        for view in range(VIEWS):
            encoder(part[:, view])
        running_mean = running_mean + len(part) / len(rows) * encoder.norm.running_mean.numpy()
    buffers = {name: buffer.numpy().copy() for name, buffer in engine.objective.encoder.norm.named_buffers()}
    return norm, wanted, buffers, running_mean


def statistics_after_a_step(kind):
    import torch.distributed as dist

    module = normalised_objective(dist.group.WORLD)
    if kind == "global":
        with_global_batch_norm(module.encoder, dist.group.WORLD, on_gpu=False)
    engine = engine_of(module, 0)
    engine.forward_backward(features()[0][World.from_environment().rows(BATCH)])
    engine.step(RATE)
    return {name: buffer.numpy().copy() for name, buffer in engine.objective.encoder.named_buffers()}


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
    # Four chunks of a rank's seven rows come out uneven.
    losses, norms, module = train_plainly(SIMILARITY)
    for results, _ in ranks:
        rank_losses, rank_norms, state, scalars, _ = results[STAGES_AND_CHUNKS.index((stage, chunks))]
        assert rank_losses == pytest.approx(losses, rel=2e-6)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        for name, tensor in module.encoder.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), tensor, rtol=0, atol=1e-6)
        assert scalars["w"] == pytest.approx(module.loss.w.item(), abs=1e-6)


@pytest.mark.parametrize(("stage", "chunks"), [case for case in STAGES_AND_CHUNKS if case[0] < 3])
def test_gradients_are_reduced_once_a_step(ranks, stage, chunks):
    for results, _ in ranks:
        *of_the_loss, of_the_gradients = results[STAGES_AND_CHUNKS.index((stage, chunks))][4]
        assert of_the_loss == ["c10d::_allgather_base_"] * 2
        assert of_the_gradients == "c10d::allreduce_"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scale_that_a_step_takes_below_zero_comes_back(ranks, stage):
    module = scale_objective(None)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    expected = []
    for batch, rate in batches_for_the_scale():
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        module("whole", batch, None).loss.backward()
        optimizer.step()
        module.loss.clamp_scale()
        expected.append(module.loss.w.item())
    assert expected[0] == pytest.approx(1e-6)
    assert expected[-1] > 0.1
    for _, more in ranks:
        assert more["scales"][stage] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chunks", [1, 2])
def test_dropout_repeats_itself_and_statistics_move_once(ranks, chunks):
    for _, more in ranks:
        norm, wanted, buffers, running_mean = more["dropout"][chunks]
        assert norm == pytest.approx(wanted, rel=1e-5)
        assert buffers["num_batches_tracked"] == VIEWS
        assert buffers["running_mean"] == pytest.approx(running_mean, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    cases = [(0, {"clip_norm": 1e-4}), (0, {"precision": "bf16"}), (0, {"weight_decay": 0.9})]
    return run_world(1, train_with_the_engine, *cases, folder=tmp_path_factory.mktemp("one_rank"))[0][0]


def test_clipping_is_what_the_configuration_says(one_rank):
    clipped, *_ = one_rank[0]
    expected, norms, _ = train_plainly(SIMILARITY, clip_norm=1e-4)
    assert min(norms) > 1e-4
    assert clipped == pytest.approx(expected, rel=1e-5)


def test_bf16_changes_the_arithmetic_but_not_the_type_of_the_parameters(one_rank):
    losses, _, state, scalars, _ = one_rank[1]
    exact, _, _ = train_plainly(SIMILARITY)
    assert losses[0] == pytest.approx(exact[0], rel=0.05)
    assert losses[0] != pytest.approx(exact[0], rel=1e-6)
    assert all(tensor.dtype == "float32" for tensor in state.values())
    assert scalars["w"] != 10.0


def test_weight_decay_leaves_the_scale_alone(one_rank):
    _, _, state, scalars, _ = one_rank[2]
    _, _, module = train_plainly(SIMILARITY)
    # A decay of 0.9 would take 0.027 from it in three steps.
    assert scalars["w"] == pytest.approx(module.loss.w.item(), abs=1e-3)
    size = module.encoder.hidden.weight.norm().item()
    assert torch.from_numpy(state["hidden.weight"]).norm() == pytest.approx((1 - 0.9 * RATE) ** 3 * size, rel=1e-3)


def normalised_objective(group):
    return Objective(NormalisedEncoder(), EquilibriumLoss(similarity=SIMILARITY, group=group), "separate")


def test_batch_norm_statistics_are_the_mean_over_the_ranks(ranks):
    alone = []
    for rank in range(2):
        module = normalised_objective(None)
        module("whole", features()[0][World(rank=rank, size=2).rows(BATCH)], None)
        alone.append(dict(module.encoder.named_buffers()))
    for _, more in ranks:
        buffers = more["statistics"]["per_rank"]
        for name in ("norm.running_mean", "norm.running_var"):
            assert not torch.allclose(alone[0][name], alone[1][name])
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(torch.from_numpy(buffers[name]), expected, rtol=1e-6, atol=1e-7)
        assert buffers["norm.num_batches_tracked"] == VIEWS


@pytest.mark.parametrize("kind", ["per_rank", "global"])
def test_batch_norm_statistics_are_the_same_on_all_ranks_to_the_bit(ranks, kind):
    (_, first), (_, second) = ranks
    for name, buffer in first["statistics"][kind].items():
        assert buffer.tobytes() == second["statistics"][kind][name].tobytes(), name


def test_global_batch_norm_has_the_statistics_of_the_whole_batch(ranks):
    module = normalised_objective(None)
    module("whole", features()[0], None)
    for _, more in ranks:
        for name, expected in module.encoder.named_buffers():
            torch.testing.assert_close(
                torch.from_numpy(more["statistics"]["global"][name]), expected, rtol=1e-5, atol=1e-6
            )
