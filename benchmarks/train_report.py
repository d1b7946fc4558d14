"""Tables of `benchmarks/train.py`."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = {
    "read": "waiting for segments",
    "augment": "augmentation",
    "features": "log-mel",
    "encoder forward": "encoder, forward",
    "loss forward": "loss, forward",
    "backward": "backward",
    "check": "gradient norm, agreement of the ranks",
    "optimizer": "optimizer, running statistics",
}


def write(report: Mapping[str, Any], folder: Path) -> str:
    """train-DEVICE-PRECISION.json and .md in `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"train-{report['conditions']['device']}-{report['conditions']['precision']}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    page = "\n".join(
        [*_head(report["conditions"]), *_wholes(report), *_ceilings(report), *_budget(report), *_work(report)]
    )
    (folder / f"{name}.md").write_text(page + "\n")
    return page


def _head(conditions: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    return [
        f"# A training step in {conditions['precision']}, on {'a GPU' if conditions['device'] == 'cuda' else 'a CPU'}",
        "",
        f"Written by `benchmarks/train.py` on {conditions['machine']}; Python {conditions['python']}, {versions}. "
        f"{conditions['encoder']}, {conditions['batch']} utterances a step, two views of {conditions['frames']} "
        f"frames, augmentation profile 3, {conditions['precision']}; {conditions['utterances']} utterances of "
        f"speech-shaped noise as WAV. {conditions['rounds']} rounds, in each of which every way has a process of its "
        f"own and takes {conditions['steps']} steps. Medians over all steps; the machine is shared: compare the "
        "ratios, which are those of a round.",
        "",
    ]


def _wholes(report: Mapping[str, Any]) -> list[str]:
    batch = report["conditions"]["batch"]
    lines = [
        "| way | utterances/s | ms a step | waiting for data, ms | peak MiB | this project gives times as many |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    ours = report["ours"]
    for name, turns in [("this project", ours), *report["published"].items()]:
        step, waited = _median(turns, "whole"), _median(turns, "waited")
        ratios = [
            statistics.median(theirs["whole"]) / statistics.median(own["whole"])
            for own, theirs in zip(ours, turns, strict=True)
        ]
        peak = max(turn["peak_bytes"] for turn in turns) / 2**20
        told = "" if turns is ours else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {batch / step:.1f} | {1e3 * step:.0f} | {1e3 * waited:.1f} | {peak:.0f} | {told} |")
    return [*lines, ""]


def _ceilings(report: Mapping[str, Any]) -> list[str]:
    batch = report["conditions"]["batch"]
    lines = [
        "The ceiling is the encoder alone, forward and backward, on features that are on the device. Whole steps were "
        "taken by turns with it here, one after the other without a break above.",
        "",
        "| ranks | whole, utterances/s | ceiling, utterances/s | share of the ceiling |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for ranks, turns in (("1", report["ours"]), *report["more_ranks"].items()):
        whole, ceiling = _median(turns, "by_turns"), _median(turns, "encoder_alone")
        lines.append(f"| {ranks} | {batch / whole:.1f} | {batch / ceiling:.1f} | {100 * ceiling / whole:.1f} % |")
    return [*lines, ""]


def _budget(report: Mapping[str, Any]) -> list[str]:
    batch, turns = report["conditions"]["batch"], report["ours"]
    whole = _median(turns, "by_turns")
    steps = [step for turn in turns for step in turn["parts"]]
    of_part = {name: statistics.median(step[name] for step in steps) for name in PARTS}
    total = sum(of_part.values())
    lines = [
        "Parts, timed with a synchronisation around each, in steps by turns with whole ones.",
        "",
        "| part | ms a step | share of the whole | utterances/s of it alone |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, told in PARTS.items():
        seconds = of_part[name]
        alone = f"{batch / seconds:.0f}" if seconds > 1e-6 else ""
        lines.append(f"| {told} | {1e3 * seconds:.1f} | {100 * seconds / whole:.1f} % | {alone} |")
    lines.append(f"| sum of the parts | {1e3 * total:.1f} | {100 * total / whole:.1f} % | |")
    syncs = turns[-1].get("syncs")
    waits = "" if syncs is None else f" The host waits for the GPU {syncs} times a step."
    return [*lines, "", f"The whole step takes {1e3 * whole:.1f} ms.{waits}", ""]


def _work(report: Mapping[str, Any]) -> list[str]:
    machine, conditions = report["machine"], report["conditions"]
    precision = "bf16" if conditions["precision"] == "bf16" else "fp32"
    rate, copy = machine["rates"][f"matrix_{precision}"], machine["rates"]["copy"]
    work = machine["multiply_adds"]
    ceiling = conditions["batch"] / _median(report["ours"], "encoder_alone")
    return [
        "The work of the encoder for an utterance, two views forward and backward, counted by torch's dispatcher; "
        "bytes are those of all inputs and outputs of all operations, of which caches spare a part. Rates are the best "
        "of six repetitions.",
        "",
        "| | an utterance | the machine, a second | utterances/s that this allows | the encoder alone reaches |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| multiply-adds ({precision}) | {work / 1e9:.2f} G | {rate / 1e9:.0f} G | {rate / work:.1f} | "
        f"{100 * ceiling * work / rate:.0f} % |",
        f"| bytes | {machine['bytes'] / 1e6:.0f} MB | {copy / 1e9:.1f} GB | {copy / machine['bytes']:.1f} | "
        f"{100 * ceiling * machine['bytes'] / copy:.0f} % |",
        "",
        "Matrix products in multiply-adds a second: "
        + ", ".join(f"{dtype} {_giga(machine['rates'][f'matrix_{dtype}'])}" for dtype in ("fp32", "bf16"))
        + ".",
    ]


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.3g} G"


def _median(turns: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(value for turn in turns for value in turn[name])
