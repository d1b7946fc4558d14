"""`cel models export`."""

from pathlib import Path
from typing import Annotated, cast

import typer

from cel_dist.cli.app import JsonOption, emit, models_app
from cel_dist.cli.progress import progress_bar


@models_app.command(
    epilog="Example: cel models export models:/cel@champion --out exported --format onnx --format safetensors"
)
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run, checkpoint or model folder, published .model file, or MLflow URI such as models:/cel@champion.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, new or of an earlier export in the same formats.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="safetensors|onnx|torch",
            help="Model folder, ONNX graph, or torch.export program; several times for several.",
            show_default="safetensors and onnx",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as files that run elsewhere, each checked against the model on ten lengths.

    ONNX and torch files take waveforms (float32, 16 kHz, full scale 1.0), front end included, and return unit
    embeddings. Threshold, calibration and back end are in model.json and back_end.safetensors beside them.
    """
    from cel_dist.export import Format, export_model
    from cel_dist.model import load_model

    chosen = cast(list[Format], formats or ["safetensors", "onnx"])
    loaded = load_model(model, "cpu")
    with progress_bar("Exporting") as progress:
        exported = export_model(loaded, out, chosen, progress=progress)
    encoder = loaded.description.encoder
    lines = [
        f"{name}: {path} (embeddings within {exported.differences[name]:.1e} of the model's)"
        for name, path in exported.files.items()
    ]
    emit(
        {
            "out": str(out),
            "files": {name: str(path) for name, path in exported.files.items()},
            "differences": exported.differences,
            "embedding_dim": encoder.embedding_dim,
        },
        "\n".join([f"{encoder.name}, {encoder.embedding_dim} dimensions: {out}", *lines]),
        as_json=as_json,
    )
