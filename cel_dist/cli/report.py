"""`cel report`."""

from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit


@app.command(epilog="Example: cel report runs/first, or cel report runs/first runs/second --out comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write. One run: RUN/report.html if not given; several: comparison.html.",
            show_default=False,
        ),
    ] = None,
    audio: Annotated[
        bool,
        typer.Option(
            "--audio/--no-audio",
            help="Put short clips of the validation audio into the page, 8 MiB at most. A comparison has none.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run, or compare several, as one HTML page that needs nothing else."""
    from cel_dist.report import write_comparison, write_report

    if len(runs) == 1:
        path = write_report(runs[0], out, audio=audio)
    else:
        path = write_comparison(runs, out or Path("comparison.html"))
    size = path.stat().st_size
    emit(
        {"report": str(path), "runs": [str(run) for run in runs], "bytes": size},
        f"wrote {path} ({size / 1e6:.1f} MB)",
        as_json=as_json,
    )
