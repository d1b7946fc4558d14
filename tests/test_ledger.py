"""What the host enters of steps that it hears of late."""

from unittest.mock import patch

import pytest
import torch
from worlds import run_world

from cel_dist.config_file import parse_config
from cel_dist.distributed import World


def seconds_of_steps(finite):
    """What a CPU that takes a second for each step is said to have taken for those that are finite."""
    from cel_dist.losses import LossOutput
    from cel_dist.process_group import start_process_group, stop_process_group
    from cel_dist.training.agreement import Agreement
    from cel_dist.training.batches import TrainBatch
    from cel_dist.training.checkpoint import TrainState
    from cel_dist.training.ledger import LaunchedStep, Ledger

    world = World.from_environment()
    start_process_group(world)
    config = parse_config({"data": {"shards": "none"}, "augment": {"profile": 0}}, "test")
    zero = torch.zeros(())
    batch = TrainBatch(0, 0, torch.arange(2), torch.arange(4).view(2, 2), torch.zeros(2, 2, 40, 9), 0, 0.0, None)
    with patch("time.perf_counter") as clock:
        clock.return_value = 100.0
        ledger = Ledger(config, world, TrainState(), None, None)
        for step, is_finite in enumerate(finite, start=1):
            ledger.begin_step()
            clock.return_value += 1.0
            loss = 1.0 if is_finite else float("nan")
            agreement = Agreement(torch.tensor([loss, 1.0, 0, 0, 0], dtype=torch.float64), 1)
            ledger.enter(LaunchedStep(step, batch, None, LossOutput(*[zero] * 5), zero, lambda: None, agreement))
        ledger.settle()
        interval = ledger.take_interval()
        summary = interval.summary()
    stop_process_group()
    return interval.num_timed_steps, interval.training_seconds, summary["step_seconds"]


@pytest.mark.parametrize("finite", [(1, 1, 1, 1), (1, 1, 0, 0, 1, 1), (0, 0, 1), (0, 1)])
def test_each_step_has_its_own_time(finite, tmp_path):
    [found] = run_world(1, seconds_of_steps, finite, folder=tmp_path)
    assert found == (sum(finite), sum(finite), 1.0)
