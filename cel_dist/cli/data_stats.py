"""`cel data stats`: what is in a folder of shards, and what to do about it before training."""

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cel_dist.cli.app import JsonOption, data_app, emit
from cel_dist.cli.progress import progress_bar

if TYPE_CHECKING:
    from cel_dist.data.statistics import Statistics

_BAR = 40


# With a callback, a group of one command stays a group.
@data_app.callback()
def data() -> None:
    """Look into prepared data."""


@data_app.command(epilog="Example: cel data stats shards --config configs/small.yaml --speakers 1000")
def stats(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder that 'cel prepare' wrote, or its URL.")],
    config: Annotated[
        Path | None, typer.Option(help="Take segments, batch, policy for short utterances and cache from here.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Utterances of a global batch.", show_default="that of the configuration")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, help="Most utterances whose audio is measured; lengths are those of all.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    speakers: Annotated[
        int | None,
        typer.Option(min=1, help="About how many people speak, for the expected rate of false negatives."),
    ] = None,
    use_labels: Annotated[
        bool, typer.Option("--use-labels", help="Count that rate by the speakers in the index instead.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores")] = None,
    as_json: JsonOption = False,
) -> None:
    """Lengths, levels, clipping, silence, bandwidth and duplicates of shards, and what to do about them."""
    from cel_dist.config_sections import DataSection, TrainSection
    from cel_dist.data.folder import DEFAULT_CACHE, Access
    from cel_dist.data.statistics import Batches, statistics

    batches, section = Batches(batch_size=TrainSection().batch_size), DataSection(shards=shards)
    if config is not None:
        from cel_dist.config_file import load_config

        read = load_config(config)
        section = read.data
        batches = Batches.of(read)
    if batch_size is not None:
        batches = Batches(batches.segment_samples, batch_size, batches.short, batches.segments)
    access = Access(
        verify=section.verify == "sha256",
        cache=section.cache_dir or DEFAULT_CACHE,
        cache_bytes=round(section.cache_gib * 2**30),
        patience=section.patience_seconds,
    )
    with progress_bar("Measuring") as progress:
        found = statistics(
            shards,
            batches,
            access=access,
            sample=sample,
            seed=seed,
            num_speakers=speakers or section.num_speakers,
            use_labels=use_labels,
            workers=workers,
            progress=progress,
        )
    emit(found.to_dict(), "\n".join(_text(found)), as_json=as_json)


def _text(found: "Statistics") -> list[str]:
    from cel_dist.data.statistics_rows import rows_of

    duration, *others = (f"{what:<19}{value}" for what, value in rows_of(found))
    lines = [f"{found.location}: {found.utterances} utterances, {found.hours:.2f} h", "", duration, *_histogram(found)]
    lines += ["", *others, *_examples(found)]
    for advice in found.advice:
        lines += ["", f"! {advice.found}", f"  -> {advice.remedy}"]
    return lines if found.advice else [*lines, "", "nothing that calls for action"]


def _histogram(found: "Statistics") -> list[str]:
    edges, counts = found.duration_edges, found.duration_counts
    shown = [number for number, count in enumerate(counts) if count]
    lines = []
    for begin, end, count in list(zip_longest(edges, edges[1:], counts))[shown[0] : shown[-1] + 1]:
        label = f"{begin:g} - {end:g} s" if end is not None else f"{begin:g} s -"
        bar = "#" * -(-_BAR * count // max(counts))
        lines.append(f"  {label:>11}  {count:>9}  {bar}".rstrip())
    return lines


def _examples(found: "Statistics") -> list[str]:
    copies = found.duplicates
    lines = [f"  same audio       {' = '.join(group)}" for group in copies.exact_examples[:5]]
    lines += [f"  same sound       {' ~ '.join(pair)}" for pair in copies.similar_examples[:5]]
    hidden = max(0, len(copies.exact_examples) - 5) + max(0, len(copies.similar_examples) - 5)
    return [*lines, "  --json lists more"] if hidden else lines
