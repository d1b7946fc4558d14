"""What an engine saves, put into engines of other numbers of ranks and other stages."""

import shutil
from pathlib import Path

import pytest
import torch
from test_engine import FRAMES, MELS, RATE, SIMILARITY, engine_of, features
from torch import nn
from worlds import run_world

from cel_dist.distributed import World
from cel_dist.encoders.batch_norm import with_global_batch_norm
from cel_dist.engine_checkpoint import FOLDER, write_universal
from cel_dist.errors import RunError
from cel_dist.losses import EquilibriumLoss
from cel_dist.training.objective import Objective

STAGES = (0, 1, 2, 3)
STEPS = 2


class OddEncoder(nn.Module):
    """Sizes that no number of ranks divides, and buffers; no bias before the norm, where its gradient is rounding."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(MELS * FRAMES, 23)
        self.norm = nn.BatchNorm1d(23)
        self.output = nn.Linear(23, 13)

    def forward(self, features):
        return self.output(self.norm(torch.tanh(self.hidden(features.flatten(1)))))


def new_engine(stage, seed):
    group = torch.distributed.group.WORLD
    torch.manual_seed(seed)
    encoder = with_global_batch_norm(OddEncoder(), group, on_gpu=False)
    loss = EquilibriumLoss(similarity=SIMILARITY, group=group)
    return engine_of(Objective(encoder, loss, "separate"), stage, weight_decay=0.1)


def step(engine, batch):
    # Two ranks have seven rows each; of four only three can, so that one has none to itself.
    rows = World.from_environment().rows(12)
    loss = engine.forward_backward(batch[:12][rows]).loss.item()
    engine.step(RATE)
    return loss


def state_of(engine):
    return {name: tensor.numpy() for name, tensor in engine.encoder_state().items()}, engine.loss_scalars()


def write_and_go_on(folder):
    """Under each stage: two steps, what is saved, then the state, another step's loss, and the state after it."""
    from cel_dist.process_group import start_process_group, stop_process_group

    start_process_group(World.from_environment())
    outcomes = {}
    for stage in STAGES:
        engine = new_engine(stage, seed=0)
        for batch in features()[:STEPS]:
            step(engine, batch)
        files = engine.snapshot()
        saved = state_of(engine)
        outcomes[stage] = saved, step(engine, features()[STEPS]), state_of(engine)
        # Later: a copy does not change with what it was made of.
        (folder / str(stage) / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            torch.save(content, folder / str(stage) / FOLDER / name)
    stop_process_group()
    return outcomes


def read_and_go_on(folder, transitions):
    """For each transition, from a stage to a stage: the state read, the next step's loss, and the state after it."""
    from cel_dist.process_group import start_process_group, stop_process_group

    start_process_group(World.from_environment())
    outcomes = {}
    for former, stage in transitions:
        engine = new_engine(stage, seed=1)
        if former == stage == 0:
            engine.load(folder / "0")
        else:
            engine.load_universal(folder / f"universal-{former}", folder / str(former))
        read = state_of(engine)
        outcomes[former, stage] = read, step(engine, features()[STEPS]), state_of(engine)
    stop_process_group()
    return outcomes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of what two ranks saved under each stage, and how they went on."""
    folder = tmp_path_factory.mktemp("engines")
    before = run_world(2, write_and_go_on, folder, folder=folder / "world")[0]
    for stage in STAGES:
        write_universal(folder / str(stage), folder / f"universal-{stage}", stage=stage)
    return folder, before


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_another_world_goes_on_with_the_same_parameters_and_optimizer(written, num_ranks, tmp_path):
    folder, before = written
    every = [(former, stage) for former in STAGES for stage in STAGES if (former, stage) != (1, 2)]
    # All at one rank, where they cost least.
    transitions = every if num_ranks == 1 else [(2, 0), (2, 3), (3, 1), (0, 2), (0, 0)]
    for outcomes in run_world(num_ranks, read_and_go_on, folder, transitions, folder=tmp_path):
        for (former, stage), (read, loss, after) in outcomes.items():
            saved, next_loss, state_after = before[former]
            case = f"ZeRO {former} to {stage}"
            assert read[1] == saved[1], case
            for name, tensor in saved[0].items():
                assert (read[0][name] == tensor).all(), f"{case}: {name}"
            # The same sums in another order.
            assert loss == pytest.approx(next_loss, rel=1e-5), case
            assert after[1] == pytest.approx(state_after[1], abs=1e-6), case
            for name, tensor in state_after[0].items():
                # A moment that was lost or laid elsewhere moves parameters by as much as a step, 1e-3.
                assert after[0][name] == pytest.approx(tensor, abs=5e-6, rel=1e-5), f"{case}: {name}"


def read_and_refuse(folder):
    """The state read under stage 0, the state after a step that was refused, and after one that was not."""
    from cel_dist.process_group import start_process_group, stop_process_group

    start_process_group(World.from_environment())
    engine = new_engine(0, seed=1)
    engine.load(folder)
    seen = [state_of(engine)]
    for refused in (1.0, 0.0):
        engine.forward_backward(features()[STEPS][:12][World.from_environment().rows(12)])
        engine.step(RATE, torch.tensor(refused))
        seen.append(state_of(engine))
    stop_process_group()
    return seen


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_goes_on_fused(written, tmp_path):
    folder, before = written
    shutil.copytree(folder / "0" / FOLDER, tmp_path / FOLDER)
    file = tmp_path / FOLDER / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    for group in states["optimizer"]["param_groups"]:
        group.update(fused=None, foreach=True)
    torch.save(states, file)
    for read, refused, taken in run_world(2, read_and_refuse, tmp_path, folder=tmp_path / "world"):
        for found, expected in ((read, before[0][0]), (refused, before[0][0]), (taken, before[0][2])):
            assert found[1] == expected[1]
            for name, tensor in expected[0].items():
                assert (found[0][name] == tensor).all(), name


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_files_are_no_checkpoint(written, stage, tmp_path):
    source = written[0] / str(stage) / FOLDER
    (tmp_path / FOLDER).mkdir()
    for path in source.iterdir():
        (tmp_path / FOLDER / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint \S+ cannot be converted for other ranks or stages: "):
        write_universal(tmp_path, tmp_path / "universal", stage=stage)
    assert Path(tmp_path / FOLDER).exists()
