"""`cel doctor`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cel_dist.cli.app import JsonOption, app, emit
from cel_dist.cli.progress import progress_bar

if TYPE_CHECKING:
    from cel_dist.doctor import Check

_COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


@app.command(epilog="Example: cel doctor --config configs/small.yaml")
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="Examine for this configuration: its tracking server, its precision, its run folder."),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            envvar="CEL_DOCTOR_TIMEOUT",
            help="Longest that a check may take; they run side by side.",
        ),
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Try everything that training needs on this machine, and say what to do about each fault.

    Exit code 1 if there is a fault, which stops training or 'cel demo'. What is marked as a note stops neither.
    """
    from cel_dist.doctor import Settings, examine

    wanted: dict[str, Any] = {"timeout_seconds": timeout}
    if config is not None:
        from cel_dist.config_file import load_config

        read = load_config(config)
        wanted |= {
            "tracking": read.tracking.enabled,
            "tracking_uri": read.tracking.uri,
            "precision": read.train.precision,
            "folder": str(read.run.dir),
        }
    with progress_bar("Examining") as progress:
        checks = examine(Settings(**wanted), progress)
    num_faults = sum(check.state == "fault" for check in checks)
    if not as_json and sys.stdout.isatty():
        _print_table(checks)
    else:
        summary = {"ok": num_faults == 0, "checks": [asdict(check) for check in checks]}
        emit(summary, "\n".join(_lines(checks)), as_json=as_json)
    if not as_json:
        print(_conclusion(num_faults))
    if num_faults:
        raise typer.Exit(code=1)


def _conclusion(num_faults: int) -> str:
    if not num_faults:
        return "Training and 'cel demo' can run here."
    return f"{num_faults} {'fault stops' if num_faults == 1 else 'faults stop'} training or 'cel demo' here."


def _lines(checks: "list[Check]") -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            lines.append(f"{'':<5}  {'':<{width}}  -> {check.remedy}")
    return lines


def _print_table(checks: "list[Check]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="dim")
        table.add_row(Text(check.state, style=_COLOURS[check.state]), Text(check.name), found)
    Console().print(table)
