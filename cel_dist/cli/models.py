"""`cel models`: what is in the MLflow registry, and what becomes of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cel_dist.cli.app import JsonOption, emit, models_app
from cel_dist.cli.progress import progress_bar
from cel_dist.errors import CelError, RunError

if TYPE_CHECKING:
    from cel_dist.tracking.catalogue import Version

TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database.",
        show_default="$MLFLOW_TRACKING_URI, else sqlite:///mlflow.db",
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")]
VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", help="Number of a version of it.", min=1)]


@models_app.command("list", epilog="Example: cel models list --tracking-uri http://tracking.example:5000")
def list_models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this model.", show_default=False)] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """List registered models and their versions, newest first."""
    from cel_dist.tracking.catalogue import list_versions

    found = list_versions(tracking_uri, name)
    emit({"versions": [version.summary() for version in found]}, _table(found), as_json=as_json)


@models_app.command("show", epilog="Example: cel models show cel@champion")
def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="NAME/3 or NAME@alias; NAME is its champion, else its newest.")
    ],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the card of a version; with --json all that is known of it."""
    from cel_dist.tracking.catalogue import find_version, stored_description

    version = find_version(model, tracking_uri)
    values = {**version.summary(), "card": version.card}
    if as_json:
        values["description"] = stored_description(version, tracking_uri)
    origin = f"from run {version.run_id}" if version.run_id else "registered by hand"
    head = " ".join([version.uri, *(f"@{alias}" for alias in version.aliases)])
    emit(values, f"{head}, {version.created}, {origin}\n\n{version.card or 'It has no card.'}", as_json=as_json)


@models_app.command("register", epilog="Example: cel models register runs/cel --name cel")
def register(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run, checkpoint or model folder, published .model file, MLflow URI.")
    ],
    name: Annotated[str, typer.Option(help="In the registry; made if there is none.")],
    experiment: Annotated[str, typer.Option(help="For a model that is from no run that this MLflow knows.")] = "cel",
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a model in MLflow as a new version of NAME. The first one becomes its champion."""
    from cel_dist.tracking.catalogue import find_version
    from cel_dist.tracking.registration import register_model

    uri = register_model(model, name, tracking_uri, experiment=experiment)
    version = find_version(uri, tracking_uri)
    emit(version.summary(), " ".join([uri, *(f"@{alias}" for alias in version.aliases)]), as_json=as_json)


@models_app.command(
    "promote", epilog="Example: cel models promote cel 3 --if-better-on corpus/test_trials.txt --root corpus"
)
def promote(
    name: NameArgument,
    version: VersionArgument,
    alias: Annotated[str, typer.Option(help="That the version is to hold.")] = "champion",
    if_better_on: Annotated[
        Path | None,
        typer.Option(metavar="TRIALS", help="Only if its EER on this list is lower than that of the present holder."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder to which the paths in the list are relative.", show_default=False)
    ] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an alias to a version. Where it had to be better and is not, nothing changes and the exit code is 1."""
    from cel_dist.tracking import catalogue

    if (if_better_on is None) != (root is None):
        raise CelError("--if-better-on TRIALS and --root DIR belong together; give both, or neither")
    with progress_bar("Embedding") as progress:
        done = catalogue.promote(
            name, version, alias, tracking_uri, trials=if_better_on, root=root or Path(), progress=progress
        )
    text = f"'{alias}' of {name} is version {version}"
    if done.former == version:
        text += ", as before"
    elif done.former is not None:
        text += f"; before it was {done.former}"
    else:
        text += "; nobody held it before" + (", so nothing was compared" if if_better_on else "")
    if done.eer is not None and done.former_eer is not None:
        text += f" (EER {done.eer:.2%} instead of {done.former_eer:.2%} on {if_better_on})"
    values = {"name": name, "alias": alias, "version": version, "former": done.former}
    emit({**values, "eer": done.eer, "former_eer": done.former_eer}, text, as_json=as_json)


@models_app.command("pull", epilog="Example: cel models pull models:/cel@champion --out models/champion")
def pull(
    uri: Annotated[str, typer.Argument(metavar="URI", help="models:/NAME@alias, models:/NAME/3 or runs:/ID/model.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; it is there whole, or not at all.")],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a model out of MLflow into a folder that needs no MLflow any more."""
    from cel_dist.model import SpeakerModel
    from cel_dist.model_folder import copy_model_folder, refuse_other_content
    from cel_dist.tracking import fetch_model

    refuse_other_content(out)
    folder = fetch_model(uri, tracking_uri)
    # A damaged download is found before anything is written.
    encoder = SpeakerModel.load_folder(folder, "cpu").description.encoder
    copy_model_folder(folder, out)
    emit(
        {"model": str(out), "uri": uri, "encoder": encoder.name, "embedding_dim": encoder.embedding_dim},
        f"{uri}: {encoder.name}, {encoder.embedding_dim} dimensions, is in {out}",
        as_json=as_json,
    )


@models_app.command("diff", epilog="Example: cel models diff models:/cel/2 models:/cel/3")
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Any MODEL.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Any MODEL.")],
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in what two models differ: encoder, features, scoring, settings, data, metrics, weights."""
    from cel_dist.tracking.comparison import compare_models

    found = compare_models(first, second, tracking_uri)
    lines = [f"{path}: {_shown(one)} | {_shown(other)}" for path, (one, other) in found.differing.items()]
    lines.append("the weights are the same" if found.same_weights else "the weights differ")
    if not found.same_back_end:
        lines.append("mean or cohort of the back end differ")
    same = {"same_weights": found.same_weights, "same_back_end": found.same_back_end}
    values = {"a": first, "b": second, "differing": found.differing, **same}
    emit(values, "\n".join(lines), as_json=as_json)


@models_app.command("delete", epilog="Example: cel models delete cel 2")
def delete(
    name: NameArgument,
    version: VersionArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the version holds an alias.")] = False,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a version out of the registry. The stored model stays in its run; 'mlflow gc' is what removes files."""
    from cel_dist.tracking.catalogue import delete_version, find_version

    found = find_version(f"{name}/{version}", tracking_uri)
    if not yes:
        if not sys.stdin.isatty():
            raise CelError(f"nobody can be asked whether to delete {found.uri}; add --yes")
        if not typer.confirm(f"Delete {found.uri} of {found.created}?", err=True):
            raise RunError(f"{found.uri} was not deleted")
    left = delete_version(name, version, tracking_uri, force=force)
    stays = f"models:/{found.model_id}" if found.model_id else None
    text = f"deleted {found.uri}; "
    text += f"versions left: {', '.join(map(str, left))}" if left else f"it was the last one, and '{name}' is gone, too"
    text += f"; the stored model stays as {stays}" if stays else ""
    values = {"deleted": found.uri, "aliases": list(found.aliases), "versions_left": left, "stored_model": stays}
    emit(values, text, as_json=as_json)


def _table(versions: "list[Version]") -> str:
    if not versions:
        return "No model is registered. 'cel train' registers its best one, 'cel models register' any."
    rows = [("model", "version", "aliases", "encoder", "EER", "95 %", "created")]
    for version in versions:
        tags = version.tags
        eer = f"{float(tags['cel.eer']):.2%}" if "cel.eer" in tags else "-"
        between = " to ".join(f"{float(end):.2%}" for end in tags.get("cel.eer_interval", "").split()) or "-"
        encoder = " ".join(tags[key] for key in ("cel.encoder", "cel.embedding_dim") if key in tags) or "-"
        aliases = ", ".join(version.aliases) or "-"
        rows.append((version.name, str(version.version), aliases, encoder, eer, between, version.created[:16]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
