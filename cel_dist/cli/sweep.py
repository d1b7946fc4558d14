"""`cel sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit
from cel_dist.cli.completion import complete_settings


@app.command(
    epilog="Examples: cel sweep configs/sweep_cel.yaml data.shards=shards data.bank=bank eval.trials=trials.txt "
    "eval.root=corpus run.dir=runs/sweep; cel sweep configs/sweep_cel.yaml --address auto sweep.trials=100"
)
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file with a section sweep; see configs/sweep_cel.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that replace those of the file.",
            autocompletion=complete_settings,
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster: auto, HOST:PORT, or local for one of this machine alone.")
    ] = "local",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in run.dir; trials that are over stay as they are.")
    ] = False,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the model of the best trial in MLflow under this name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search over settings with Ray Tune; every trial is a training run of its own, of one or more ranks."""
    from cel_dist.sweep.run import run_sweep
    from cel_dist.sweep.settings import load_sweep
    from cel_dist.sweep.table import told

    loaded = load_sweep(config, overrides or [])
    result = run_sweep(loaded, address=address, resume=resume, register_as=register)
    best = result["best"]
    text = (
        f"best {result['metric']} {best['best']:.4f}: trial {best['id']} with {told(best['values'])}\n"
        f"its configuration {result['files']['best']}, its model {best['run_dir']}/model, all trials "
        f"{result['files']['page']}"
    )
    if result["model_uri"]:
        text += f"\nregistered as {result['model_uri']}"
    emit(result, text, as_json=as_json)
