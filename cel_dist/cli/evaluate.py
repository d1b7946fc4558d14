"""`cel evaluate`, `cel embed`, `cel verify`, `cel import-published`: using a trained model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit
from cel_dist.cli.progress import progress_bar

ModelOption = Annotated[
    str,
    typer.Option(
        help="Run, checkpoint or model folder, published .model file, or MLflow URI such as models:/cel@champion."
    ),
]


@app.command(
    epilog="Example: cel evaluate --model runs/cel --trials corpus/trials.txt --root corpus --out runs/cel/test"
)
def evaluate(
    model: ModelOption,
    trials: Annotated[
        Path, typer.Option(help="Trials file: lines 'label enrol test' (1 or 0), or 'enrol test target|nontarget'.")
    ],
    root: Annotated[Path, typer.Option(help="Folder to which the paths in the trials file are relative.")],
    frames: Annotated[
        int, typer.Option(help="0 scores whole utterances; else windows of so many frames of 10 ms, 16 or more.")
    ] = 0,
    windows: Annotated[int, typer.Option(help="Windows an utterance; only with --frames.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for scores.txt, det.png and scores.png.", show_default="evaluation/TRIALS"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the model, with threshold and calibration from these trials, to DIR; for whole utterances.",
        ),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show errors by sex, session, duration and age, and how the embeddings lie. A table with tabs and a "
            "header of 'path' and any of speaker, session, sex, seconds, age; or lines 'path speaker'.",
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Score the same trials from the quietest tenth of the frames, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on a list of trials: equal error rate, minimum detection cost, scores and plots."""
    from cel_dist.data.files import require_folder_or_nothing
    from cel_dist.errors import CelError
    from cel_dist.evaluation import Trials, diagnose, score_without_voice
    from cel_dist.evaluation import evaluate as run_evaluation
    from cel_dist.evaluation.metadata import Metadata
    from cel_dist.model import load_model

    if calibrate and frames:
        raise CelError("--calibrate is for whole utterances, which 'cel verify' compares; leave out --frames")
    out = out or Path("evaluation") / trials.stem
    for folder in filter(None, (out, calibrate)):
        require_folder_or_nothing(folder)
    listed = Trials.read(trials)
    described = None
    if metadata is not None:
        # Before the embedding, which may take an hour.
        described = Metadata.read(metadata, listed.files)
        described.check(listed)
    loaded = load_model(model)
    with progress_bar("Embedding") as progress:
        result = run_evaluation(loaded, listed, root, frames=frames, windows=windows, progress=progress)
    paths = result.write(out)
    diagnostics = None
    if metadata is not None or control:
        without_voice = None
        if control:
            with progress_bar("Control") as progress:
                without_voice = score_without_voice(loaded, root, listed, result.scores, progress=progress)
        diagnostics = diagnose(result, described, without_voice)
        paths |= diagnostics.write(out)
    if calibrate:
        loaded.calibrate(result.threshold, result.calibration).save(calibrate)
    costs = "  ".join(f"minDCF({prior}) {cost:.4f}" for prior, cost in result.min_dcf.items())
    text = [
        f"EER {result.eer:.2%}  {costs}  ({len(result.trials)} trials, {len(result.trials.files)} utterances)",
        *([diagnostics.text()] if diagnostics else []),
        *(f"{kind}: {path}" for kind, path in paths.items()),
        *([f"calibrated model: {calibrate}"] if calibrate else []),
    ]
    values = {**result.summary(), **{kind: str(path) for kind, path in paths.items()}}
    if diagnostics:
        values["diagnostics"] = diagnostics.model_dump(mode="json")
    if calibrate:
        values["calibrated_model"] = str(calibrate)
    emit(values, "\n".join(text), as_json=as_json)


@app.command(epilog="Example: cel embed --model runs/cel corpus/eval --out embeddings.npz")
def embed(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Audio files, or folders of them.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="NPZ file to write: names [N], embeddings float32 [N, D].")],
    as_json: JsonOption = False,
) -> None:
    """Turn audio files into unit embeddings."""
    from cel_dist.evaluation import write_embeddings
    from cel_dist.model import load_model

    loaded = load_model(model)
    with progress_bar("Embedding") as progress:
        names = write_embeddings(loaded, paths, out, progress=progress)
    dimension = loaded.description.encoder.embedding_dim
    emit(
        {"out": str(out), "utterances": len(names), "embedding_dim": dimension},
        f"{len(names)} embeddings of {dimension} dimensions: {out}",
        as_json=as_json,
    )


@app.command(epilog="Example: cel verify --model models:/cel@champion alice.wav unknown.wav")
def verify(
    enrol: Annotated[Path, typer.Argument(help="Audio of the known speaker.")],
    test: Annotated[Path, typer.Argument(help="Audio of the speaker in question.")],
    model: ModelOption,
    as_json: JsonOption = False,
) -> None:
    """Tell whether two recordings are of the same speaker."""
    from cel_dist.model import load_model

    result = load_model(model).verify(enrol, test)
    text = f"score {result.score:.4f}"
    if result.probability is not None:
        text += f", probability of the same speaker {result.probability:.1%}"
    if result.same is None:
        text += (
            "\nThis model has no threshold, so there is no decision. Measure one with 'cel evaluate --model MODEL "
            "--trials FILE --root DIR --calibrate OUT', then verify with '--model OUT'."
        )
    else:
        text += f": {'same' if result.same else 'different'} speaker{'' if result.same else 's'}"
        text += f" (threshold {result.threshold:.4f})"
    emit(asdict(result), text, as_json=as_json)


@app.command(epilog="Example: cel import-published cel_fastresnet34.model --out models/published")
def import_published(
    file: Annotated[Path, typer.Argument(metavar="FILE.model", help="Checkpoint of the published implementation.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    as_json: JsonOption = False,
) -> None:
    """Make a model of this project from a published CEL checkpoint."""
    from cel_dist.model import load_published

    loaded = load_published(file)
    loaded.save(out)
    encoder = loaded.description.encoder
    emit(
        {"model": str(out), "encoder": encoder.name, "embedding_dim": encoder.embedding_dim},
        f"{encoder.name}, {encoder.embedding_dim} dimensions: {out}",
        as_json=as_json,
    )
