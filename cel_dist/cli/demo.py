"""`cel demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit


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
    text = f"""
  EER on unheard speakers   before {100 * result.eer_before:.1f} %   after {100 * result.eer_after:.1f} %
  time                      {result.seconds / 60:.1f} min
  training speed            {result.utterances_per_second:.1f} utterances/s

  report          {result.report}
  run folder      {result.run_dir}
  model           {result.model_uri}
  all runs        mlflow ui --backend-store-uri {result.tracking_uri}
  compare voices  cel verify --model {result.run_dir} ONE.wav OTHER.wav
"""
    emit(asdict(result), text, as_json=as_json)
