"""`cel train`."""

from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit


@app.command(epilog="Example: cel train configs/small.yaml --nproc 2 data.shards=shards data.bank=bank run.dir=runs/a")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on each node, through the deepspeed launcher.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes of the job, a line 'name slots=N' each.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue what is in run.dir; none: start anew; or a checkpoint folder.")
    ] = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace five steps into run.dir/profile; train.profile_steps=N for N.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an encoder, on one process or, with --nproc or --hostfile, on many."""
    settings = overrides or []
    if profile:
        # In front, so that a number of steps that was given counts.
        settings = ["train.profile_steps=5", *settings]
    if nproc is None and hostfile is None:
        from dataclasses import asdict

        from cel_dist.config_file import load_config
        from cel_dist.training.trainer import train as train_here

        summary = asdict(train_here(load_config(config, settings), resume))
    else:
        from cel_dist.launcher import launch

        summary = launch(config, settings, num_ranks=nproc, hostfile=hostfile, resume=resume)
    eer = "no validation list" if summary["eer"] is None else f"validation EER {100 * summary['eer']:.2f} %"
    emit(summary, f"{summary['steps']} steps, {eer}; run folder {summary['run_dir']}", as_json=as_json)
