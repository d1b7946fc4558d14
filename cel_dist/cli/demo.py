"""`cel demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit

if TYPE_CHECKING:
    from cel_dist.demo import DemoResult


@app.command(epilog="Example: cel demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo"),
    corpus: Annotated[
        Path | None, typer.Option(help="Audio to use: a folder of 'cel corpus synth', or SPEAKER/... folders.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Go through the whole system once: corpus, shards, two-rank training, evaluation, report, registered model."""
    from cel_dist.cli.progress import progress_bar
    from cel_dist.demo import run_demo

    with progress_bar("corpus") as progress:
        result = run_demo(out, corpus, progress=progress)
    emit(asdict(result), demo_text(result), as_json=as_json)


def demo_text(result: "DemoResult") -> str:
    """What the command prints for people; lines indented by four are for a shell."""
    lines = [
        "",
        f"  EER on unheard speakers   before {100 * result.eer_before:.1f} %   after {100 * result.eer_after:.1f} %",
        f"  time                      {result.seconds / 60:.1f} min",
        f"  training speed            {result.utterances_per_second:.1f} utterances/s",
        "",
        f"  report      {result.report} (its EERs are those of the validation speakers, who chose the model)",
        f"  run folder  {result.run_dir}",
        f"  model       {result.model_uri} in {result.tracking_uri}",
    ]
    for purpose, command in result.commands.items():
        lines += ["", f"  To {purpose}:", f"    {command}"]
    return "\n".join([*lines, ""])
