"""That a training step asks for nothing that the host would have to wait for a GPU for, told by its operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import train_job, write_config
from worlds import run_world

# What reads a number, or makes a tensor whose shape depends on numbers.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "repeat_interleave.Tensor")


class Noting(TorchDispatchMode):
    """Notes the operations that would wait, with what they were given."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function).removeprefix("aten.")
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for part in arguments
            if isinstance(part, (list, tuple))
            for index in part
        )
        if by_mask or any(name.startswith(waiting) for waiting in WAITING):
            self.found.append(name)
        return function(*arguments, **(options or {}))


def train_and_note(config):
    """The outcome of a run, what its third step waited for, and what a loss does that is read at once."""
    from cel_dist.training.agreement import Agreement
    from cel_dist.training.trainer import Trainer

    genuine, found, seen = Trainer.train_step, [], []

    def train_step(trainer):
        if trainer.state.step != 2:
            return genuine(trainer)
        # What became of the step before is read here, as it should be.
        trainer.ledger.settle()
        with Noting(found):
            genuine(trainer)
        with Noting(seen):
            Agreement(torch.zeros(5), 1).read()
            float(torch.zeros(()))
        return None

    Trainer.train_step = train_step
    return train_job(config), found, seen


@pytest.mark.parametrize(("stage", "chunks"), [(0, 1), (2, 2)])
def test_a_step_waits_for_nothing(small_corpus, tmp_path, stage, chunks):
    file = write_config(
        small_corpus,
        tmp_path,
        train={"log_every": 5, "max_steps": 4, "encode_chunks": chunks},
        checkpoint={"every_steps": 5},
        engine={"zero_stage": stage},
        encoder={"embedding_dim": 32},
    )
    for result, found, seen in run_world(2, train_and_note, file, folder=tmp_path / "world"):
        assert result["steps"] == 4
        assert found == []
        # The instrument sees what it is to see.
        assert "_local_scalar_dense.default" in seen
