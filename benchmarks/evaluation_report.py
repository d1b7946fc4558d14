"""Tables of `benchmarks/evaluation.py`."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# All of VoxCeleb1: utterances and hours, as its authors state them.
VOXCELEB1_HOURS = 352


def write(report: Mapping[str, Any], folder: Path) -> str:
    """evaluation.json and .md in `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    page = "\n".join([*_head(report["conditions"]), *_embedding(report), *_preparation(report), *_scoring(report)])
    (folder / "evaluation.md").write_text(page + "\n")
    return page


def _head(conditions: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    mean = conditions["audio_seconds"] / conditions["utterances"]
    return [
        "# Evaluation and preparation",
        "",
        f"Written by `benchmarks/evaluation.py` on {conditions['gpu'] or 'no GPU'}, {conditions['machine']}; Python "
        f"{conditions['python']}, {versions}, libsndfile {conditions['libsndfile']}. {conditions['utterances']} "
        f"utterances of speech-shaped noise, {mean:.1f} s in the mean, lengths log-normal between 4 and 145 s. "
        f"Medians of {conditions['turns']} turns, in each of which every way has a process of its own; files in the "
        "page cache. The machine is shared: compare the ratios, which are those of a turn.",
        "",
    ]


def _embedding(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "Embeddings of whole utterances, Fast ResNet-34, fp32. The ceiling is the encoder alone: the same passes by "
        "the same threads, with features that are there already.",
        "",
        "| files | way | embeddings/s | hours of audio a second | peak MiB | share of the ceiling |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, way, turns, share in _rows(report["embedding"], "encoder alone"):
        peak = max(turn["peak_bytes"] for turn in turns) / 2**20
        lines.append(f"| {name} | {way} | {_rates(report, turns)} | {peak:.0f} | {share} |")
    hours = VOXCELEB1_HOURS
    rate = report["conditions"]["audio_seconds"] / _median(report["embedding"]["wav"]["ours"])
    return [
        *lines,
        "",
        f"Computed from these, not measured: the {hours} h of VoxCeleb1 would take {hours / rate:.1f} h.",
        "",
    ]


def _preparation(report: Mapping[str, Any]) -> list[str]:
    first = next(iter(report["preparation"].values()))["to wav"][0]
    lines = [
        f"Preparation by {first['workers']} processes, one a core, which are there already, beside decoding alone "
        "of the same files by as many.",
        "",
        "| files | way | utterances/s | hours of audio a second | share of decoding alone |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, way, turns, share in _rows(report["preparation"], "decoding alone"):
        lines.append(f"| {name} | {way.replace('to ', 'shards of ')} | {_rates(report, turns)} | {share} |")
    return [*lines, ""]


def _scoring(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "Scores, EER and minDCF of trials over 4708 embeddings of 512 dimensions, drawn at random, in lists as long as "
        "those of VoxCeleb1.",
        "",
        "| as long as | s |",
        "| --- | ---: |",
    ]
    return [*lines, *(f"| {name} | {statistics.median(turns):.2f} |" for name, turns in report["scoring"].items())]


def _rows(files: Mapping[str, Mapping[str, Any]], ceiling: str) -> Iterator[tuple[str, str, Sequence[Any], str]]:
    """Of each way with each kind of files: the kind, the way, its turns, and their share of the ceiling."""
    for name, ways in files.items():
        for way, turns in ways.items():
            yield name.upper(), way, turns, _ratio(ways[ceiling], turns)


def _rates(report: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> str:
    conditions, seconds = report["conditions"], _median(turns)
    return f"{conditions['utterances'] / seconds:.1f} | {conditions['audio_seconds'] / seconds / 3600:.3f}"


def _ratio(ceiling: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]]) -> str:
    if turns is ceiling:
        return ""
    ratios = [100 * best["seconds"] / turn["seconds"] for best, turn in zip(ceiling, turns, strict=True)]
    return f"{statistics.median(ratios):.0f} % ({min(ratios):.0f} to {max(ratios):.0f})"


def _median(turns: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(turn["seconds"] for turn in turns)
