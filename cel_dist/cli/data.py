"""`cel prepare` and `cel check`: audio to shards and banks, and back to a list of faults."""

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cel_dist.cli.app import JsonOption, app, emit, suggest
from cel_dist.cli.completion import complete_recipes
from cel_dist.cli.progress import progress_bar
from cel_dist.cli.recipes import report, survey_of
from cel_dist.errors import CelError

if TYPE_CHECKING:
    from cel_dist.data.survey import Survey

# Options of shards that mean nothing for a bank.
_SHARD_OPTIONS = (
    *("list_file", "labels", "audio_format", "samples_per_shard", "seed", "ray_address", "min_seconds", "prefix"),
)
_FAULTS_SHOWN = 20
_FLAGS = {"list_file": "list", "audio_format": "format", "ray_address": "ray"}

logger = logging.getLogger(__name__)


@app.command(epilog="Example: cel prepare corpus/audio --list corpus/train.txt --out shards")
def prepare(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of WAV, FLAC, OGG, MP3, M4A ... files.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write. An interrupted run into it is continued.")] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Take only the files named here, one path relative to SRC a line.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Lines 'path speaker'; stored for fine-tuning, never read by self-supervision.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_recipes,
            help="SRC is this public corpus as it is distributed: voxceleb1, voxceleb2, librispeech, voices, musan or "
            "rirs_noises. Takes its training part, with speakers; the last two become banks.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="With --recipe: say what to download and how it must lie, and compare what is there with the "
            "published numbers. Reads no audio; exit 1 if they differ.",
        ),
    ] = False,
    audio_format: Annotated[
        Literal["wav", "flac"], typer.Option("--format", help="wav is read faster, flac takes half the space.")
    ] = "wav",
    samples_per_shard: Annotated[int, typer.Option(help="Source files a shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the order, which is shuffled once, globally.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="all cores")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Spread the shards over a Ray cluster: 'auto', HOST:PORT, ray://HOST:PORT, or 'local', which starts "
            "one on this machine. SRC and OUT must be on a file system that all its machines share.",
        ),
    ] = None,
    min_seconds: Annotated[float, typer.Option(help="Reject files that are shorter.")] = 1.0,
    prefix: Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")] = "train",
    bank: Annotated[
        bool, typer.Option("--bank", help="Write a bank of noise, speech, music and rir folders instead of shards.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a tree or list of audio files into shards to train on, or into a bank of noises and rooms."""
    survey = None if recipe is None else survey_of(recipe, source)
    if dry_run:
        if survey is None:
            raise CelError("--dry-run compares a public corpus with its published numbers; name it with --recipe")
        report(survey, as_json=as_json)
        return
    if out is None:
        raise CelError("there is nowhere to write to; give --out FOLDER")
    if survey is not None:
        if list_file is not None or labels is not None:
            raise CelError("--recipe knows files and speakers and does not go with --list and --labels; leave them out")
        if bank and not survey.recipe.is_bank:
            raise CelError(f"{survey.recipe.title} is speech to train on, not for a bank; leave out --bank")
        for found in survey.parts:
            if not found.is_as_published:
                logger.warning("%s, %s: %s", survey.recipe.title, found.part.name, found.difference)
    if bank or (survey is not None and survey.recipe.is_bank):
        _refuse_shard_options(context)
        _prepare_bank(source, out, survey, workers, as_json=as_json)
        return

    from cel_dist.data.prepare import prepare as prepare_shards

    # Ray reports lost workers on stdout, which is for the result.
    with redirect_stdout(sys.stderr), progress_bar("Preparing") as progress:
        result = prepare_shards(
            source,
            out,
            list_file=list_file,
            labels=labels,
            utterances=None if survey is None else survey.training_speakers(),
            audio_format=audio_format,
            samples_per_shard=samples_per_shard,
            seed=seed,
            workers=workers,
            ray_address=ray_address,
            min_seconds=min_seconds,
            prefix=prefix,
            progress=progress,
        )
    summary = {
        "samples": result.samples,
        "shards": result.shards,
        "rejected": result.rejected,
        "rejects": str(result.rejects),
    }
    text = f"{out}: {result.samples} utterances in {result.shards} shards; {result.rejected} files rejected"
    emit(summary, f"{text} ({result.rejects})", as_json=as_json)
    suggest(f"cel train configs/small.yaml data.shards={out} data.bank=BANK run.dir=runs/first", as_json=as_json)


def _refuse_shard_options(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in _SHARD_OPTIONS}
    # By name: the enumeration is click's own or the copy inside typer, depending on typer's version.
    given = [name for name, how in sources.items() if how is not None and how.name == "COMMANDLINE"]
    if given:
        flag = _FLAGS.get(given[0], given[0].replace("_", "-"))
        raise CelError(f"--{flag} is for shards and does not go with a bank; leave it out")


def _prepare_bank(source: Path, out: Path, survey: "Survey | None", workers: int | None, *, as_json: bool) -> None:
    from cel_dist.data.prepare_bank import prepare_bank

    chosen = None if survey is None else survey.clips()
    with progress_bar("Reading clips") as progress:
        clips = prepare_bank(source, out, clips=chosen, workers=workers, progress=progress)
    kinds = ", ".join(f"{number} {category}" for category, number in clips.clips.items())
    summary = {
        "samples": sum(clips.clips.values()),
        "shards": 0,
        "clips": clips.clips,
        "skipped": clips.skipped,
        "rejected": clips.rejected,
        "rejects": str(clips.rejects),
    }
    emit(summary, f"bank {out}: {kinds}; {clips.rejected} files rejected ({clips.rejects})", as_json=as_json)
    suggest(f"cel train configs/small.yaml data.shards=SHARDS data.bank={out} run.dir=runs/first", as_json=as_json)


@app.command(epilog="Example: cel check shards")
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="Folder that 'cel prepare' wrote: shards or a bank.")
    ],
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="all cores")] = None,
    index: Annotated[
        bool,
        typer.Option("--index", help="First write the index anew from the tars; makes a manifest if there is none."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify counts, checksums and audio of a folder of shards or a bank; exit 1 if there is any fault."""
    from cel_dist.data.check import check as find_faults
    from cel_dist.data.reindex import rebuild_index

    if index:
        with progress_bar("Indexing") as progress:
            rebuild_index(folder, workers=workers, progress=progress)
    with progress_bar("Checking") as progress:
        faults = find_faults(folder, workers=workers, progress=progress)
    lines = [str(fault) for fault in faults[:_FAULTS_SHOWN]]
    if len(faults) > _FAULTS_SHOWN:
        lines.append(f"... and {len(faults) - _FAULTS_SHOWN} more; --json lists all")
    if faults:
        lines.append(f"{len(faults)} faults; delete the files named and run the same 'cel prepare' again")
    summary = {"ok": not faults, "faults": [fault._asdict() for fault in faults]}
    emit(summary, "\n".join(lines) or f"{folder} is whole", as_json=as_json)
    if faults:
        raise typer.Exit(code=1)
