"""One process of `benchmarks/train.py`: this project's training step, the published way of it, or the machine.

    python benchmarks/train_one.py ours|published|machine CONFIG STEPS          # prints one JSON object

`ours` is the training loop of `cel train` on the shards of CONFIG: first steps without a break, of which the rate and
the waiting for data are told, because only they leave the readers no more time than a run does. Then it takes by turns
a step as it is, a step with a synchronisation around every part, and a pass of the encoder alone, so that all three see
the same machine.
"""

import argparse
import json
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

WARM_UP = 3


class Clock:
    """Seconds of named blocks, summed over a step, where it is on.

    Attributes:
        steps: of each step seconds by name.
        is_on: whether blocks are timed, which makes the host wait for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_on = False
        self.steps: list[dict[str, float]] = []

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = self.now() if self.is_on else 0.0
        yield
        if self.is_on:
            self.steps[-1][name] += self.now() - begin

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of which all blocks are timed, and the step itself."""
        self.steps.append(defaultdict(float))
        self.is_on = True
        with self.timed("step"):
            yield
        self.is_on = False

    def watch(self, module: nn.Module, name: str) -> None:
        """Time the forward passes of a module."""
        begun: list[float] = []

        def begin(*_: Any) -> None:
            if self.is_on:
                begun.append(self.now())

        def end(*_: Any) -> None:
            if self.is_on:
                self.steps[-1][name] += self.now() - begun.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


class _Noted:
    """The batches of a trainer, and how long the loop waited for the last one."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.waited = 0.0

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.waited = batch.waited
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def ours(config_file: Path, steps: int) -> dict[str, Any]:
    """The loop of `cel train`: seconds of whole steps, of their parts, and of the encoder alone."""
    from cel_dist.config_file import load_config
    from cel_dist.distributed import World
    from cel_dist.process_group import process_group
    from cel_dist.training import trainer as loop
    from cel_dist.training.preflight import preflight
    from cel_dist.training.processor import settle
    from cel_dist.training.stopping import stop_requests

    config = load_config(config_file)
    world = World.from_environment()
    checked = preflight(config, world.size, "none")
    settle(config, world)
    with process_group(world, config.engine) as (device, watchdog), stop_requests() as request:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        clock = Clock(device)
        with (
            patch("cel_dist.training.trainer.named", clock.timed),
            patch("cel_dist.training.batches.named", clock.timed),
        ):
            trainer = loop.Trainer(config, world, device, "none", checked, watchdog, request)
            trainer.batches = batches = _Noted(trainer.batches)  # type: ignore[assignment]
            clock.watch(trainer.engine.objective.get_submodule("encoder"), "encoder forward")
            clock.watch(trainer.engine.objective.get_submodule("loss"), "loss forward")
            whole, waited = _without_a_break(trainer, clock, batches, steps)
            # Before there is a second encoder.
            peak_bytes = _peak_bytes(device)
            alone = EncoderAlone(config, config.train.batch_size // world.size, device)
            by_turns, ceiling = [], []
            for _ in range(WARM_UP + steps):
                begin = clock.now()
                trainer.advance()
                by_turns.append(clock.now() - begin)
                with clock.step():
                    trainer.advance()
                # All ranks at once, as in a step.
                torch.distributed.barrier()
                begin = clock.now()
                alone()
                ceiling.append(clock.now() - begin)
        result = {
            "whole": whole,
            "waited": waited,
            "by_turns": by_turns[WARM_UP:],
            "parts": [_parts(seconds) for seconds in clock.steps[WARM_UP:]],
            "encoder_alone": ceiling[WARM_UP:],
            "peak_bytes": peak_bytes,
            "syncs": _synchronisations(trainer) if device.type == "cuda" else None,
        }
        trainer.batches.close()
        trainer.checkpoints.close()
    return result


def _without_a_break(trainer: Any, clock: Clock, batches: _Noted, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of steps that follow each other at once, and those that the loop waited for data in them."""
    for _ in range(WARM_UP):
        trainer.advance()
    whole, waited = [], []
    begin = first = clock.now()
    for _ in range(steps):
        trainer.advance()
        end = time.perf_counter()
        whole.append(end - begin)
        waited.append(batches.waited)
        begin = end
    if trainer.device.type == "cuda":
        # The host is ahead of the device, so that its times of single steps are none.
        whole = [(clock.now() - first) / steps] * steps
    return whole, waited


class EncoderAlone:
    """Forward and backward passes of the encoder of a run on features that are on the device: what no step can beat.
    Views and batch norm are as in a step; there is no loss, and no gradient goes to another rank.

    Args:
        config: of the run.
        rows: utterances of this rank.
        device: where to compute.
    """

    def __init__(self, config: Any, rows: int, device: torch.device) -> None:
        from cel_dist.features import HOP, segment_samples
        from cel_dist.training.objective import new_encoder, new_objective

        frames = 1 + segment_samples(config.data.segment_frames) // HOP
        objective = new_objective(config, new_encoder(config), torch.distributed.group.WORLD, device.type == "cuda")
        self._objective = objective.to(device).train()
        self._features = torch.randn(rows, 2, config.features.num_mels, frames, device=device)
        self._cast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def __call__(self) -> None:
        with self._cast:
            embeddings = self._objective("embed", self._features)
        embeddings.sum().backward()
        self._objective.zero_grad()


# Of `Trainer.train_step` and `Batches`; what their sums lack is told as the rest.
_TIMED = ("read", "augment", "features", "encoder forward", "loss forward", "check", "optimizer")


def _parts(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of a step, and the step."""
    found = {name: seconds[name] for name in _TIMED}
    # The collective, and what the host does when it hears of it.
    found["check"] += seconds["agree"]
    found["backward"] = seconds["forward and backward"] - seconds["encoder forward"] - seconds["loss forward"]
    return {**found, "step": seconds["step"]}


def _peak_bytes(device: torch.device) -> int:
    """Most memory at a time: of the GPU, or of this process with all that it has loaded."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronisations(trainer: Any) -> int:
    """How often the host waits for the GPU in a step, as far as torch can tell."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train_step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["ours", "published", "machine"])
    parser.add_argument("config", type=Path)
    parser.add_argument("steps", type=int)
    options = parser.parse_args()
    result: dict[str, Any]
    if options.way == "ours":
        result = ours(options.config, options.steps)
    elif options.way == "machine":
        from train_machine import machine

        result = machine(options.config)
    else:
        from train_published import published

        result = published(options.config, options.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
