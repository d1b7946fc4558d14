"""Class weights trained by the engine, whole or in shards, under every ZeRO stage, against one plain process."""

import math
import warnings

import numpy as np
import pytest
import torch
from test_engine import BATCH, FRAMES, MELS, STEPS, SmallEncoder
from worlds import run_world

from cel_dist.config_file import parse_config
from cel_dist.distributed import World
from cel_dist.engine_checkpoint import FOLDER
from cel_dist.losses.supervised import AdaCos, CosFace, SupervisedLoss
from cel_dist.training.objective import Objective

# So many weights that ZeRO-3 does not keep them whole.
CLASSES, DIM, RATE, HEAD_RATE, CLIP = 6301, 16, 1e-3, 5e-3, 0.5
CASES = [(stage, sharded, 1) for stage in (0, 1, 2, 3) for sharded in (False, True)]
CASES += [(stage, True, 2) for stage in (0, 1, 2, 3)] + [(0, False, 2)]


def batches():
    """Features that differ by class, and classes; the second utterance of each row is a view of its own."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(CLASSES, 1, MELS, FRAMES, generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield centres[labels] + torch.randn(BATCH, 2, MELS, FRAMES, generator=generator), labels


def objective(group, *, sharded=False, head=CosFace):
    torch.manual_seed(0)
    encoder = SmallEncoder()
    settings = {"margin": 0.1, "scale": 10.0} if head is CosFace else {}
    weights = head(DIM, CLASSES, group=group, sharded=sharded, seed=1, **settings)
    return Objective(encoder, SupervisedLoss(weights, lambda_u=0.5, group=group, skip_unusable=True), "joint")


def engine_of(module, stage, chunks=1):
    from cel_dist.engine import Engine

    tree = {
        "data": {"shards": "none"},
        "augment": {"profile": 0},
        "train": {"batch_size": BATCH, "encode_chunks": chunks},
        "engine": {"zero_stage": stage},
        "optim": {"lr": RATE, "head_lr": HEAD_RATE, "clip_norm": CLIP},
    }
    return Engine(module, parse_config(tree, "test"), World.from_environment(), torch.device("cpu"))


def steps(engine, rows, some=None):
    told = []
    for features, labels in list(batches())[slice(some)]:
        output = engine.forward_backward(features[rows], labels[rows])
        told.append((output.loss.item(), engine.gradient_norm().item(), output.accuracy.item()))
        engine.step(RATE)
    return told


def state_of(engine):
    weights = engine.class_weights()
    return {name: tensor.numpy() for name, tensor in {**engine.encoder_state(), **weights}.items()}


def copies(files):
    """What a rank saves of its shard of the class weights: values, moments, steps."""
    (shard,) = (content for name, content in files.items() if name.startswith("shard-"))
    return {(name, key): value.numpy().copy() for name, of in shard["tensors"].items() for key, value in of.items()}


def train_every_way(folder):
    import torch.distributed as dist

    from cel_dist.process_group import start_process_group, stop_process_group

    world = World.from_environment()
    start_process_group(world)
    results = {}
    with warnings.catch_warnings(record=True) as told:
        for stage, sharded, chunks in CASES:
            engine = engine_of(objective(dist.group.WORLD, sharded=sharded), stage, chunks)
            results[stage, sharded, chunks] = steps(engine, world.rows(BATCH)), state_of(engine)
    results["warnings"] = {str(warning.message) for warning in told if warning.category is FutureWarning}
    # What a useless batch leaves behind is nothing.
    engine = engine_of(objective(dist.group.WORLD, sharded=True), 1)
    features, labels = next(batches())
    before = state_of(engine), copies(engine.snapshot())
    engine.forward_backward(features[world.rows(BATCH)] * float("nan"), labels[world.rows(BATCH)])
    problem = engine.problem()
    engine.step(RATE, torch.ones(()))
    results["useless"] = problem(), before, (state_of(engine), copies(engine.snapshot()))
    # AdaCos: its scale goes the way of the weights.
    engine = engine_of(objective(dist.group.WORLD, sharded=True, head=AdaCos), 2, chunks=2)
    steps(engine, world.rows(BATCH))
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, content in engine.snapshot().items():
        torch.save(content, folder / FOLDER / name)
    saved = engine.loss_scalars(), state_of(engine)
    results["adacos"] = saved, steps(engine, world.rows(BATCH), 1), engine.loss_scalars(), state_of(engine)
    results["cut"] = cut_a_whole_head(folder / "whole")
    stop_process_group()
    return results


def cut_a_whole_head(folder):
    """What one rank would save of all classes, read by this rank's part."""
    import torch.distributed as dist

    from cel_dist.engine_shards import Shards

    folder.mkdir(parents=True, exist_ok=True)
    alone = CosFace(DIM, CLASSES, sharded=True, seed=5)
    shards = Shards(alone, rank=0, learning_rate=RATE)
    alone(torch.randn(8, DIM), torch.arange(8) % CLASSES).loss.backward()
    shards.step(RATE)
    (content,) = shards.snapshot().values()
    if dist.get_rank() == 0:
        torch.save(content, folder / "shard-00000.pt")
    dist.barrier()
    head = CosFace(DIM, CLASSES, group=dist.group.WORLD, sharded=True, seed=6)
    part = Shards(head, dist.get_rank(), RATE)
    part.restore(folder)
    (read,) = part.snapshot().values()
    whole = torch.load(folder / "shard-00000.pt", weights_only=True)["tensors"]["weight"]
    own = read["tensors"]["weight"]
    return whole, head.shard_range, own["value"], own["exp_avg"]


def go_on_elsewhere(folder, universal):
    import torch.distributed as dist

    from cel_dist.process_group import start_process_group, stop_process_group

    world = World.from_environment()
    start_process_group(world)
    engine = engine_of(objective(dist.group.WORLD, sharded=True, head=AdaCos), 0)
    engine.load_universal(universal, folder)
    read = engine.loss_scalars(), state_of(engine)
    result = read, steps(engine, world.rows(BATCH), 1), engine.loss_scalars(), state_of(engine)
    stop_process_group()
    return result


def plain_steps():
    """The same with nothing but torch, in one process with the whole batch."""
    module = objective(None)
    groups = [
        {"params": module.encoder.parameters(), "lr": RATE},
        {"params": module.loss.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    told = []
    for features, labels in batches():
        optimizer.zero_grad()
        output = module("whole", features, labels)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        told.append((output.loss.item(), norm.item(), output.accuracy.item()))
    weights = module.loss.head.class_weights()
    return told, {name: tensor.numpy() for name, tensor in {**module.encoder.state_dict(), **weights}.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    return folder, run_world(2, train_every_way, folder / "adacos", folder=folder / "world")


def assert_same(state, expected, start, case):
    for name, tensor in expected.items():
        # Adam makes a whole step of a gradient that is nothing but rounding, so a few numbers of a hundred thousand are
        # off by a part of a step; a wrong gradient is wrong everywhere.
        error, change = (np.linalg.norm(a - b) for a, b in ((state[name], tensor), (tensor, start[name])))
        assert change > 1e-3
        assert error < 5e-5 * change, f"{case}: {name}"


def plain_start():
    module = objective(None)
    weights = module.loss.head.class_weights()
    return {name: tensor.numpy() for name, tensor in {**module.encoder.state_dict(), **weights}.items()}


@pytest.mark.parametrize(("stage", "sharded", "chunks"), CASES)
def test_class_weights_learn_as_in_one_process(ranks, stage, sharded, chunks):
    told, expected = plain_steps()
    assert all(norm > CLIP for _, norm, _ in told), "nothing is clipped"
    for results in ranks[1]:
        losses, state = results[stage, sharded, chunks]
        for step, wanted in zip(losses, told, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert_same(state, expected, plain_start(), f"ZeRO {stage}, sharded {sharded}")


def test_the_rates_of_encoder_and_head_are_apart():
    module, before = objective(None), objective(None)
    engine_rates = plain_steps()[1]
    moved = {
        name: abs(engine_rates[name] - tensor.numpy()).max() for name, tensor in module.encoder.state_dict().items()
    }
    head = abs(engine_rates["weight"] - before.loss.head.class_weights()["weight"].numpy()).max()
    assert head > 3 * max(moved.values())


def test_no_step_warns_of_what_deepspeed_calls(ranks):
    assert all(results["warnings"] == set() for results in ranks[1])


def test_a_useless_batch_changes_nothing(ranks):
    for results in ranks[1]:
        problem, before, after = results["useless"]
        assert "not finite" in problem
        for tensors, same in zip(before, after, strict=True):
            assert len(tensors) > 0
            assert all((same[name] == tensor).all() for name, tensor in tensors.items())


def test_shards_and_the_scale_of_adacos_go_on_in_another_world(ranks, tmp_path):
    from cel_dist.engine_checkpoint import write_universal

    folder, results = ranks
    (scalars, saved), next_step, next_scalars, next_state = results[0]["adacos"]
    assert scalars["scale"] != pytest.approx(2**0.5 * math.log(CLASSES - 1), rel=1e-3), "it never moved"
    write_universal(folder / "adacos", tmp_path / "universal", stage=2)
    arguments = folder / "adacos", tmp_path / "universal"
    ((read_scalars, read), step, after_scalars, after) = run_world(
        1, go_on_elsewhere, *arguments, folder=tmp_path / "world"
    )[0]
    assert read_scalars == scalars
    assert all((read[name] == tensor).all() for name, tensor in saved.items())
    assert step[0] == pytest.approx(next_step[0], rel=1e-5)
    assert after_scalars == pytest.approx(next_scalars, rel=1e-5)
    # A moment that was lost or laid elsewhere moves a weight by as much as a step, 5e-3.
    assert_same(after, next_state, saved, "one rank instead of two")


def test_a_whole_head_is_cut_for_more_ranks(ranks):
    for whole, (first, end), values, moments in (results["cut"] for results in ranks[1]):
        assert end - first < CLASSES
        assert (values == whole["value"][first:end]).all()
        assert (moments == whole["exp_avg"][first:end]).all()
        assert moments.any()
