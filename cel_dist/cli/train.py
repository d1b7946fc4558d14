"""`cel train`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit, suggest
from cel_dist.cli.completion import complete_settings
from cel_dist.errors import CelError


@app.command(
    epilog="Examples: cel train configs/small.yaml --nproc 2 data.shards=shards data.bank=bank run.dir=runs/a; "
    "cel train configs/cel.yaml --hostfile hosts --dry-run"
)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that replace those of the file.",
            autocompletion=complete_settings,
        ),
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on each node, through the deepspeed launcher.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes of the job, a line 'name slots=N' each.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue what is in run.dir; none: start anew; or a checkpoint folder.")
    ] = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace five steps into run.dir/profile; train.profile_steps=N for N.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(help="How often to start a run again that failed, from its newest checkpoint.")
    ] = 0,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start this node of the hostfile alone; run the command on every node.")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(help="With --no-ssh: which node of the hostfile this is, from 0.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first node, where the ranks of all nodes meet.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option(help="Its port. Default: 29500 with --hostfile, else any that is free.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that starts the ranks, and start nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an encoder, on one process or, with --nproc or --hostfile, on many.

    Exit code 75: the run was asked to end (SIGTERM, SIGUSR1), wrote a checkpoint, and goes on when started again.
    """
    settings = overrides or []
    if profile:
        # In front, so that a number of steps that was given counts.
        settings = ["train.profile_steps=5", *settings]
    is_launched = nproc is not None or hostfile is not None
    if not is_launched:
        # All of them are about processes, of which this one is the only one.
        for option, is_given in {
            "--max-restarts": max_restarts,
            "--no-ssh": no_ssh,
            "--node-rank": node_rank is not None,
            "--master-addr": master_addr is not None,
            "--master-port": master_port is not None,
            "--dry-run": dry_run,
        }.items():
            if is_given:
                raise CelError(
                    f"{option} needs processes to start; say how many with --nproc, or where with --hostfile"
                )
        from cel_dist.config_file import load_config
        from cel_dist.training.trainer import train as train_here

        summary = asdict(train_here(load_config(config, settings), resume))
    else:
        from cel_dist.launcher import Placement, launch, planned_command

        if no_ssh != (node_rank is not None):
            raise CelError("--no-ssh and --node-rank belong together: this node's place in the hostfile, from 0")
        placement = Placement(nproc, hostfile, node_rank, master_addr, master_port)
        if dry_run:
            command = planned_command(config, settings, placement, resume=resume)
            emit({"command": command}, shlex.join(command), as_json=as_json)
            return
        summary = launch(config, settings, placement, resume=resume, max_restarts=max_restarts)
    if summary["steps"] is None:
        emit(summary, f"the ranks of this node are done; run folder {summary['run_dir']}", as_json=as_json)
        return
    eer = "no validation list" if summary["eer"] is None else f"validation EER {100 * summary['eer']:.2f} %"
    emit(summary, f"{summary['steps']} steps, {eer}; run folder {summary['run_dir']}", as_json=as_json)
    report = "" if summary.get("report") is None else f"; its report is {summary['report']}"
    suggest(
        f"cel evaluate --model {shlex.quote(summary['run_dir'])} --trials TEST.txt --root AUDIO{report}",
        as_json=as_json,
    )
