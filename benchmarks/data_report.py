"""Ratios and tables of `benchmarks/data.py`."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_ways import Measured, Way


class Aim(NamedTuple):
    """A way over shards, the per-item way beside it, and how many times as many pairs a second it is to give."""

    way: Way
    beside: Way
    at_least: float | None


def _aim(audio_format: str, output: str, beside: str, at_least: float | None) -> Aim:
    return Aim(Way("local", audio_format, output), Way("files", audio_format, beside), at_least)


# A reader process of this project gives int16 segments, a worker of the per-item approach gives features: the first two
# rows compare what the two kinds of processes do, the next two the same output, the last two all work on a CPU.
AIMS = [
    _aim("wav", "int16", "features", 20.0),
    _aim("flac", "int16", "features", 3.0),
    _aim("wav", "int16", "int16", None),
    _aim("flac", "int16", "int16", None),
    _aim("wav", "features", "features", 2.0),
    _aim("flac", "features", "features", 2.0),
]
_SOURCES = {
    "local": "shards, local",
    "cache": "shards, cached",
    "http": "shards, HTTP, cache empty",
    "files": "per item, files",
}
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def ratio_of(aim: Aim, turns: list[dict[Way, Measured]]) -> dict:
    """Pairs a second and core of a way over those of the per-item way in the same turn: median, least and most."""
    ratios = sorted(turn[aim.beside].core_seconds / turn[aim.way].core_seconds for turn in turns)
    return {
        "format": aim.way.audio_format,
        "shards_to": aim.way.output,
        "per_item_to": aim.beside.output,
        "at_least": aim.at_least,
        "median": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }


def write(report: Mapping, folder: Path) -> None:
    """data.json and data.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        *_head(report["conditions"]),
        *_rates(report["table"]),
        *_ratios(report["ratios"]),
        *_stages(report["stages"], report["conditions"]),
        *_first_batches(report["table"]),
    ]
    (folder / "data.md").write_text("\n".join(lines) + "\n")


def _head(conditions: Mapping) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    return [
        "# The data plane, on one core",
        "",
        f"Written by `benchmarks/data.py` on {conditions['machine']}, {conditions['core']}; Python "
        f"{conditions['python']}, {versions}, libsndfile {conditions['libsndfile']}; served by {conditions['server']}. "
        f"{conditions['utterances']} utterances of speech-shaped noise, {conditions['mean_seconds']:.1f} s in the "
        f"mean; batches of {conditions['batch_size']} pairs of segments of {conditions['segment_samples']} samples, "
        "made in the measuring process; files in the page cache. "
        f"Medians of {conditions['turns']} turns, in each of which every way has a process of its own and runs for "
        f"{conditions['seconds']:g} s or more, over HTTP for one epoch. The machine is shared: compare the ratios.",
        "",
    ]


def _rates(table: list[Mapping]) -> list[str]:
    lines = [
        "Pairs a second and core count the time that all threads of the process spent on a core, pairs a second what "
        "passed; between them lies the wait for the disk, the server and other work on the machine. Read is what the "
        "process read from files, over HTTP with the check of what came; fetched is what came from the server. "
        "Features are those of segments augmented by profile 3. The per-item approach (`per_item.py`) "
        "decodes whole files, and for features reads a room and a noise a segment, which the bank has mapped.",
        "",
        "| from | format | to | pairs/s a core | pairs/s | KiB read a pair | KiB fetched a pair | KiB of a member |",
        "| --- | --- | --- " + "| ---: " * 5 + "|",
    ]
    for row in table:
        cells = [
            _SOURCES[row["source"]],
            row["audio_format"].upper(),
            row["output"],
            f"{1 / row['core_seconds']:.0f}",
            f"{1 / row['seconds']:.0f}",
            f"{row['bytes_read'] / 1024:.0f}",
            f"{row['bytes_fetched'] / 1024:.0f}",
            f"{row['member_bytes'] / 1024:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _ratios(ratios: list[Mapping]) -> list[str]:
    lines = [
        "Ratio of pairs a second and core, local shards over the per-item approach in the same turn. A reader process "
        "stops at int16, because the training device does the rest; a worker of the per-item approach does all: these "
        "are the first two rows, and the aims of 20 and 3 are theirs. In the next two both sides stop at int16. No "
        "such gain can be had there: copying two segments into a batch is a good part of reading a short WAV, and of "
        "FLAC all that can be saved is the decoding of what lies outside the segments.",
        "",
        "| format | shards to | per item to | ratio | least | most | aim |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in ratios:
        aim = "" if row["at_least"] is None else f"{row['at_least']:g}"
        figures = " | ".join(f"{row[name]:.2f}" for name in ("median", "least", "most"))
        lines.append(
            f"| {row['format'].upper()} | {row['shards_to']} | {row['per_item_to']} | {figures} | {aim} |",
        )
    return [*lines, ""]


def _stages(stages: Mapping, conditions: Mapping) -> list[str]:
    lines = [
        "Cost of the stages behind the reader, a whole batch at once; on the CPU the time of the core, on a GPU what "
        "passed, with what is read from the bank.",
        "",
        "| device | augmentation, µs a pair | log-mel, µs a pair |",
        "| --- | ---: | ---: |",
    ]
    for device, costs in stages.items():
        lines.append(f"| {_DEVICES[device]} | {1e6 * costs['augmentation']:.1f} | {1e6 * costs['log_mel']:.1f} |")
    gpu = conditions["gpu"]
    return [*lines, "", "Nothing here was measured on a GPU." if gpu is None else f"The GPU is one {gpu}.", ""]


def _first_batches(table: list[Mapping]) -> list[str]:
    lines = [
        "Time to the first batch in a fresh process, without the start of the interpreter. One window of shards holds "
        "the whole corpus, so that with an empty cache the first batch waits for nearly all of them.",
        "",
        "| from | format | to | imports s | then to the first batch s |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in table:
        times = f"{row['import_seconds']:.2f} | {row['first_batch_seconds']:.3f}"
        lines.append(f"| {_SOURCES[row['source']]} | {row['audio_format'].upper()} | {row['output']} | {times} |")
    return lines
