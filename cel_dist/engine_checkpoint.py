"""What DeepSpeed has of a run: copied out of an engine, and put into one, also where the number of ranks or the ZeRO
stage is another.

The files are DeepSpeed's own, in a folder `engine`. Those of stage 0 are the same for any number of ranks; those of the
other stages are parts of ranks, and go through DeepSpeed's universal format, one folder a parameter, to fit others.
"""

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cel_dist.errors import RunError

FOLDER = "engine"

_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def initialise(engine: Any) -> None:
    """Give the optimizer of a DeepSpeed engine the state that it would make of its first step, so that a checkpoint has
    all of it at any time."""
    optimizer = engine.optimizer
    # Around ZeRO's own there is another one.
    inner = getattr(optimizer, "optimizer", optimizer)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        partitions = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    else:
        partitions = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for partition in partitions:
        moments = {moment: torch.zeros_like(partition) for moment in _MOMENTS}
        # A fused optimizer counts where it computes.
        inner.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}


def snapshot(engine: Any) -> dict[str, Any]:
    """Copy to the CPU what this rank has to save of a DeepSpeed engine; all ranks call this together.

    Returns:
        The content of files by name, for `torch.save`. Nothing in it changes when training goes on.
    """
    files: dict[str, Any] = {}

    def keep(state_dict: Any, path: str) -> None:
        files[Path(path).name] = _copied(state_dict)

    writer = engine.checkpoint_engine
    # DeepSpeed would write on its own, while the ranks wait for the slowest disk; a rank whose disk is full would leave
    # the others in a barrier.
    writer.save, writer.makedirs = keep, lambda path, exist_ok=False: None
    try:
        engine.save_checkpoint("not-written", tag=FOLDER, save_latest=False)
    finally:
        del writer.save, writer.makedirs
    return files


def restore(engine: Any, checkpoint: Path) -> None:
    """Put the files in `checkpoint/engine` into an engine of the ranks and the stage that wrote them.

    Raises:
        RunError: files are missing or damaged.
    """
    try:
        path, _ = engine.load_checkpoint(str(checkpoint), tag=FOLDER)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise RunError(f"checkpoint {checkpoint} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if path is None:
        raise RunError(f"checkpoint {checkpoint} holds no engine state")
    # The options of the optimizer come with its state, and another version of this project had others.
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in inner.param_groups:
        group.update(fused=True, foreach=None)
        for parameter in group["params"]:
            state = inner.state[parameter]
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)


def write_universal(checkpoint: Path, folder: Path, *, stage: int) -> None:
    """Convert the files in `checkpoint/engine`, written under ZeRO `stage`, to the universal format in `folder/engine`.

    One process does this. `folder` takes as much room as the checkpoint, twice while it is written.

    Raises:
        RunError: files are missing or damaged, or the folder cannot be written.
    """
    source, target = checkpoint / FOLDER, folder / FOLDER
    try:
        target.mkdir(parents=True)
        if stage == 0:
            _universal_from_stage_0(source, target)
        else:
            from deepspeed.checkpoint import ds_to_universal

            options = Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            # It reports to standard output and standard error as it goes.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(options)
            if stage == 3:
                _write_steps(target / "zero")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"checkpoint {checkpoint} cannot be converted for other ranks or stages: {reason}") from error


def restore_universal(engine: Any, folder: Path) -> None:
    """Put what `write_universal` wrote into an engine of any number of ranks and any stage; all ranks call this.

    Raises:
        RunError: files are missing or damaged, or belong to other parameters.
    """
    stage = engine.zero_optimization_stage()
    put = {0: _into_stage_0, 1: _into_partitions, 2: _into_partitions, 3: _into_stage_3}[stage]
    try:
        put(engine, folder / FOLDER / "zero")
        states = _model_states(folder / FOLDER)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"the converted checkpoint {folder} cannot be read: {reason}") from error
    engine.global_steps = states["global_steps"]
    for name, buffer in engine.module.named_buffers():
        if name in states["buffer_names"]:
            buffer.copy_(states["module"][name])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if type(value) is tuple:
        return tuple(_copied(item) for item in value)
    return value


def _load(path: Path) -> Any:
    # DeepSpeed's files hold classes of its own.
    return torch.load(path, map_location="cpu", weights_only=False)


def _model_states(folder: Path) -> dict[str, Any]:
    """The file with the buffers, which all ranks have alike."""
    states: dict[str, Any] = _load(min(folder.glob("*model_states.pt")))
    return states


def _universal_from_stage_0(source: Path, target: Path) -> None:
    """DeepSpeed's converter wants the parts of ranks, which stage 0 does not have."""
    states = _model_states(source)
    optimizer = states["optimizer"]
    names = [name for name in states["module"] if name not in states["buffer_names"]]
    indices = [index for group in optimizer["param_groups"] for index in group["params"]]
    # The encoder's parameters and then the loss's: in the order of the module, and in that of the optimizer's groups.
    for name, index in zip(names, indices, strict=True):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": states["module"][name].clone()}, folder / "fp32.pt")
        for moment in _MOMENTS:
            torch.save({"param": optimizer["state"][index][moment].clone()}, folder / f"{moment}.pt")
        torch.save(optimizer["state"][index]["step"], folder / "step.pt")
    states["optimizer"] = None
    torch.save(states, target / "mp_rank_00_model_states.pt")


def _write_steps(zero: Path) -> None:
    """Give each parameter its number of steps, which the converter notes once for all where stage 3 wrote."""
    step = _load(zero / "optimizer_state.pt")["optimizer_state_dict"]["state"][0]["step"]
    for file in zero.rglob("fp32.pt"):
        torch.save(step, file.with_name("step.pt"))


def _of_parameter(zero: Path, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter, and the optimizer's state of it, flat."""

    def tensor(state: str) -> Tensor:
        value = _load(zero / name / f"{state}.pt")
        # Bare where stage 3 wrote it.
        whole: Tensor = value["param"] if isinstance(value, dict) else value
        return whole.flatten()

    state = {moment: tensor(moment) for moment in _MOMENTS}
    state["step"] = torch.as_tensor(_load(zero / name / "step.pt"), dtype=torch.float32)
    return tensor("fp32"), state


@torch.no_grad()
def _into_stage_0(engine: Any, zero: Path) -> None:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            value, state = _of_parameter(zero, names[parameter])
            parameter.copy_(value.view_as(parameter))
            moments = {moment: state[moment].view_as(parameter).to(parameter.device) for moment in _MOMENTS}
            engine.optimizer.state[parameter] = {"step": state["step"].to(parameter.device), **moments}


@torch.no_grad()
def _into_partitions(engine: Any, zero: Path) -> None:
    """Stages 1 and 2, where a rank has one run of elements of every group.

    DeepSpeed's own way fails where a rank has no part of a group, as the loss's two numbers over two ranks.
    """
    optimizer = engine.optimizer
    for parameters, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        flat: dict[str, Tensor] = {moment: torch.zeros_like(partition) for moment in _MOMENTS}
        for parameter in parameters:
            value, state = _of_parameter(zero, optimizer.param_names[parameter])
            flat["step"] = state["step"].to(partition.device)
            if parameter._hp_mapping is None:
                continue
            source, place = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            for target, tensor in ((partition, value), *((flat[moment], state[moment]) for moment in _MOMENTS)):
                target.narrow(0, place.start, place.numel).copy_(tensor.narrow(0, source.start, source.numel))
        optimizer.optimizer.state[partition] = flat
    optimizer.update_lp_params()


@torch.no_grad()
def _into_stage_3(engine: Any, zero: Path) -> None:
    """Stage 3, where a rank has one run of elements of every parameter.

    DeepSpeed's own way takes the options of one group for all groups, and the moments of the later groups wrongly.
    """
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    for parameters, partition in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        flat: dict[str, Tensor] = {moment: torch.zeros_like(partition) for moment in _MOMENTS}
        begin = 0
        for parameter in parameters:
            value, state = _of_parameter(zero, optimizer.param_names[parameter])
            flat["step"] = state["step"].to(partition.device)
            size = parameter.partition_numel()
            first = min(torch.distributed.get_rank() * size, len(value))
            # The last ranks may have less, or nothing; the rest is padding.
            held = min(size, len(value) - first)
            for target, tensor in ((partition, value), *((flat[moment], state[moment]) for moment in _MOMENTS)):
                target.narrow(0, begin, held).copy_(tensor.narrow(0, first, held))
            parameter.ds_tensor.narrow(0, 0, held).copy_(value.narrow(0, first, held))
            begin += size
        optimizer.optimizer.state[partition] = flat
    optimizer.checkpoint_event_epilogue()
