"""One rank of the worlds that `scaling.py` starts: real steps of the real training loop, counted and timed.

A dispatch mode sees every collective with its tensors, also those of DeepSpeed and of gloo's send and receive, whose
sizes the profiler does not know. Counted steps are slowed down by it, so others are timed.
"""

import contextlib
import gc
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allreduce_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "barrier": "barrier",
}
# Where these take what a rank gives; the others have it first.
SECOND = {"all-gather", "reduce-scatter"}


class Counted(TorchDispatchMode):
    """Collectives in the block: number and bytes that this rank gives, by part and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name != "recv_":
            kind = KINDS.get(name, name)
            given = sum(tensor.numel() * tensor.element_size() for tensor in tensors(args[kind in SECOND]))
            key = (part_of(sys._getframe(1), kind, given), kind)
            self.number[key] += 1
            self.bytes[key] += given
        return func(*args, **(kwargs or {}))

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"part": part, "kind": kind, "number": number, "given": self.bytes[part, kind]}
            for (part, kind), number in sorted(self.number.items())
        ]


def tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [found for each in argument for found in tensors(each)] if isinstance(argument, list | tuple) else []


def part_of(frame: Any, kind: str, given: int) -> str:
    """The part of the step that a collective belongs to, by who called it."""
    while frame is not None:
        path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        match path.name:
            case "batch_norm.py" if "cel_dist" in path.parts:
                return "batch norm"
            case "exchange.py":
                return "loss, exchange" if function == "gather_vectors" else "loss, rows"
            case "engine.py" if function == "gradient_norm":
                return "gradient norm"
            case "engine.py" if function == "_average_buffers":
                return "running statistics"
        if "deepspeed" in path.parts:
            if kind == "all-reduce" and given <= 8:
                return "gradient norm"
            return "gradients" if kind in ("all-reduce", "reduce-scatter") else "parameters"
        if path.parent.name in ("training", "evaluation"):
            return "agreement"
        frame = frame.f_back
    return "unknown"


class Enough(BaseException):
    """Ends a training after the steps that were asked for."""


def train_step_of(case: dict[str, Any], original: Any, found: dict[str, Any]) -> Any:
    """`Trainer.train_step`, which counts or times what it does."""

    def train_step(trainer: Any, *arguments: Any) -> Any:
        step = len(found["seconds"])
        counted = Counted()
        if case["counts"] and step == case["steps"] - 1:
            with counted:
                original(trainer, *arguments)
            found["sent"] = counted.rows()
            raise Enough
        profiled = step >= case["steps"] - case["profiled"]
        with torch.autograd.profiler.profile(enabled=profiled) as profile:
            begin = time.perf_counter()
            result = original(trainer, *arguments)
            seconds = time.perf_counter() - begin
        found["seconds"].append(seconds)
        if profiled:
            microseconds = sum(e.cpu_time_total for e in profile.function_events if e.name.startswith("gloo:"))
            found["shares"].append(microseconds / 1e6 / seconds)
        if step == case["steps"] - 1:
            raise Enough
        return result

    return train_step


def run(case: dict[str, Any]) -> dict[str, Any]:
    from cel_dist.config_file import parse_config
    from cel_dist.training import trainer as module

    found: dict[str, Any] = {"seconds": [], "shares": [], "sent": []}
    original = module.Trainer.train_step
    module.Trainer.train_step = train_step_of(case, original, found)
    try:
        module.train(parse_config(case["config"], "benchmark"), "none")
    except Enough:
        pass
    finally:
        module.Trainer.train_step = original
        gc.collect()
    skipped = 2
    seconds = found["seconds"][skipped : len(found["seconds"]) - case["profiled"]]
    return {
        "sent": found["sent"],
        "seconds": [statistics.median(seconds), min(seconds), max(seconds)] if seconds else None,
        "collectives_share": statistics.median(found["shares"]) if found["shares"] else None,
    }


def main(job: Path, rank: str) -> None:
    from cel_dist.config_sections import EngineSection
    from cel_dist.distributed import World, leave_process
    from cel_dist.process_group import process_group
    from cel_dist.training import trainer as module

    torch.set_num_threads(1)
    with process_group(World.from_environment(), EngineSection()) as joined:
        # One process group for all cases: a second one in the same process hangs.
        module.process_group = lambda world, settings: contextlib.nullcontext(joined)
        found = [run(case) for case in json.loads(job.read_text())]
        (job.parent / f"rank{rank}.json").write_text(json.dumps(found))
    leave_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
