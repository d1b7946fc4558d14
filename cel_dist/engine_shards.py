"""Parameters of which every rank has a part of its own, outside of DeepSpeed: sharded class weights and their Adam.

DeepSpeed broadcasts what a module has, averages its gradients and partitions its optimizer, all of which would mix up
parts that differ. Their gradients are whole where they are, so there is nothing to send.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cel_dist.errors import RunError
from cel_dist.losses.class_weights import ClassWeights

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Shards:
    """This rank's part of a head, with the optimizer of it.

    Args:
        head: with `sharded=True`, after it was moved to its device.
        rank: of this process.
        learning_rate: at first.
    """

    def __init__(self, head: ClassWeights, rank: int, learning_rate: float) -> None:
        self._parameters = head.sharded_parameters()
        self._first, self._end = head.shard_range
        self._rank = rank
        # No decay: it would change the scale of the logits, and nothing where weights are normalised.
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=learning_rate, weight_decay=0.0, fused=True)
        for parameter in self._parameters.values():
            moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}

    def gradients(self) -> list[Tensor]:
        """Of this rank's rows: those of the global loss."""
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def step(self, learning_rate: float, refused: Tensor | None = None) -> None:
        """Update, unless `refused` is 1 on the device, and forget the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.found_inf = refused  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()

    def snapshot(self) -> dict[str, Any]:
        """A file by name, for `torch.save`, of copies on the CPU."""
        tensors = {
            name: {
                "value": parameter.detach().to("cpu", copy=True),
                **{
                    key: torch.as_tensor(value).to("cpu", copy=True)
                    for key, value in self._optimizer.state[parameter].items()
                },
            }
            for name, parameter in self._parameters.items()
        }
        return {f"shard-{self._rank:05d}.pt": {"first": self._first, "end": self._end, "tensors": tensors}}

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Put in what the ranks that wrote `folder` had of this rank's classes, whatever their number.

        Raises:
            RunError: files are missing or damaged, or are of other classes.
        """
        missing = self._end - self._first
        try:
            for path in sorted(folder.glob("shard-*.pt")):
                part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                first, end = max(self._first, part["first"]), min(self._end, part["end"])
                if first >= end:
                    continue
                target = slice(first - self._first, end - self._first)
                source = slice(first - part["first"], end - part["first"])
                for name, parameter in self._parameters.items():
                    self._put(parameter, part["tensors"][name], target, source)
                missing -= end - first
        except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise RunError(f"class weights in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
        if missing:
            raise RunError(
                f"{folder} lacks the class weights of {missing} of the classes {self._first} to {self._end - 1}"
            )

    def _put(self, parameter: Tensor, saved: dict[str, Tensor], target: slice, source: slice) -> None:
        parameter[target] = saved["value"][source].to(parameter.device)
        state = self._optimizer.state[parameter]
        for moment in _MOMENTS:
            state[moment][target] = saved[moment][source].to(parameter.device)
        state["step"].copy_(saved["step"])
