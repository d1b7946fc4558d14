"""The tables of `results/scaling.md`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(report: dict[str, Any], file: Path) -> None:
    """All of it as Markdown."""
    parts = [_conditions(report), _counts(report), _times(report), _words(report), _loss(report), _model(report)]
    file.write_text("\n\n".join(part for part in parts if part) + "\n")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, head)), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---:"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conditions(report: dict[str, Any]) -> str:
    conditions = report["conditions"]
    busy = " Other processes were running." if conditions["busy"] else ""
    return (
        "# What a training step sends, and what that costs\n\n"
        f"Written by `benchmarks/scaling.py` on {conditions['machine']}, torch {conditions['torch']}, DeepSpeed "
        f"{conditions['deepspeed']}, gloo over the loopback, a thread a rank.{busy} docs/scaling.md says what follows "
        "from it.\n\n"
        "W ranks with b utterances each, K = W b, V = 2 views, d = 512, P parameters; the published loss (A-Prot and "
        "PoN). A word is one of fp32, 4 bytes."
    )


def _settings(row: dict[str, Any]) -> str:
    names = {"stage": "engine.zero_stage", "exchange": "loss.exchange", "batch_norm": "encoder.batch_norm"}
    found = [f"{names[name]}={row[name]}" for name in names if name in row]
    return ", ".join([*found, *(["encoder.views=joint"] if row.get("joint") else [])]) or "as shipped"


def _counts(report: dict[str, Any]) -> str:
    wrong = sum(tuple(row["counted"]) != tuple(row["formula"]) for row in report["compared"])
    rows = [
        (row["W"], _settings(row), row["part"], row["kind"], *row["counted"], *row["formula"])
        for row in report["compared"]
    ]
    agreement = {
        f"{s['number']} {s['kind']} of {s['given']} bytes in all"
        for row in report["counts"]
        for s in row["sent"]
        if s["part"] == "agreement"
    }
    counted = report["conditions"]["counted"]
    return (
        f"## Counted\n\nOne step of the training loop, its fourth, with b = {counted['b']} utterances of "
        f"{counted['frames']} frames a rank: collectives, and the bytes that a rank gives to them, beside the formulas "
        f"of `scaling_words.py`. {len(rows) - wrong} of {len(rows)} rows agree to the byte; all ranks give the "
        "same.\n\n"
        + _table(("W", "settings", "part", "kind", "number", "bytes", "number, formula", "bytes, formula"), rows)
        + "\n\nBeside these the training loop itself asks all ranks whether everyone has a batch and whether loss and "
        f"gradient are finite, which is in no formula: {'; '.join(sorted(agreement)) or 'nothing'}."
    )


def _times(report: dict[str, Any]) -> str:
    if not report["times"]:
        return ""
    timed, rows = report["conditions"]["timed"], []
    alone = {_settings(row): row["seconds"][0] for row in report["times"] if row["W"] == 1}
    for row in report["times"]:
        median, least, most = row["seconds"]
        share = row["collectives_share"]
        rows.append(
            (
                row["W"],
                _settings(row),
                f"{median:.2f} ({least:.2f} to {most:.2f})",
                f"{alone[_settings(row)] / median:.0%}",
                "" if row["W"] == 1 else f"{share:.0%}",
            )
        )
    return (
        f"## Timed\n\nWeak scaling: b = {timed['b']} utterances of {timed['frames']} frames on every rank, whatever "
        f"the number of ranks. Median (least to most) of {timed['steps']} steps after two that warm up, data included. "
        "The share of the collectives is that of three more steps under the profiler, waiting for slower ranks "
        "included. **4 ranks have 2 cores**: their efficiency cannot be above 50 %, and a rank that waits for a core "
        "looks like a slow network. This says what the software costs where sending is nearly free; it says nothing "
        "about a network.\n\n" + _table(("W", "settings", "seconds a step", "efficiency", "in collectives"), rows)
    )


def _words(report: dict[str, Any]) -> str:
    names = ("batch norm", "loss, rows", "loss, exchange", "gradients", "parameters", "running statistics")
    rows = []
    for row in report["model"]["words"]:
        for stage in (0, 1, 3):
            words = row[f"stage {stage}"]
            cells = [f"{words.get(name, 0):,}".replace(",", " ") for name in names]
            ring = f"{row['ring']:,}".replace(",", " ")
            rows.append((row["encoder"], row["W"], stage, *cells, ring, words["collectives"]))
    return (
        "## Words that a rank sends a step\n\nFormulas, b = 256, every collective around a ring: an all-gather of n "
        "words from each rank sends (W - 1) n, an all-reduce 2 n (W - 1) / W, a reduce-scatter n (W - 1) / W. A ring "
        "through the ranks in their order leaves a machine once, so **what leaves a machine is what one of its ranks "
        "sends**, however many it has. `loss.exchange=ring` replaces the rows of the loss by those in its column.\n\n"
        + _table(("encoder", "W", "ZeRO", *names, "rows, ring", "collectives"), rows)
    )


def _loss(report: dict[str, Any]) -> str:
    rows = [
        (
            row["b"],
            row["W"],
            row["K"],
            f"{row['gathered_mebibytes']:.0f}",
            f"{row['ring_mebibytes']:.1f}",
            f"{1e3 * row['products_seconds']:.2f}",
            f"{1e3 * row['encoder_seconds']:.0f}",
        )
        for row in report["model"]["loss"]
    ]
    work = report["flops"]
    accelerator = report["model"]["accelerator"]
    encoders = {name: count for name, count in work.items() if name != "loss"}
    return (
        "## What grows with the global batch\n\nOn a rank: the rows of all ranks in memory, or three blocks of a ring; "
        f"the matrix products of the loss, {work['loss']:.0f} b K d operations (counted), at "
        f"{accelerator['loss_rate'] / 1e12:.0f} TFLOP/s; beside them the encoder, forward and backward, at "
        f"{accelerator['encoder_rate'] / 1e12:.0f} TFLOP/s. Operations of an utterance, counted: "
        + ", ".join(f"{count / 1e9:.1f} GFLOP for {name}" for name, count in encoders.items())
        + ".\n\n"
        + _table(
            ("b", "W", "K", "gathered MiB", "ring MiB", "products of the loss ms", "Fast ResNet-34 ms"),
            rows,
        )
    )


def efficiency_rows(report: dict[str, Any], share: int = 256) -> list[str]:
    """Rows of the table of docs/scaling.md: a network and an encoder, and the efficiency by the number of ranks."""
    grid = [row for row in report["model"]["grid"] if row["b"] == share]
    rows = []
    for network in report["model"]["networks"]:
        for encoder in report["model"]["encoders"]:
            same = [r for r in grid if (r["network"], r["encoder"]) == (network["name"], encoder["name"])]
            cells = [f"{row['efficiency']:.0%}" for row in sorted(same, key=lambda row: row["W"])]
            size = f"{encoder['parameters'] / 1e6:.1f} million"
            rows.append(f"| {' | '.join([network['name'], size, *cells])} |")
    return rows


def _model(report: dict[str, Any]) -> str:
    found = report["model"]
    accelerator = found["accelerator"]
    text = [
        "## Efficiency on stated networks",
        "A model, not a measurement: the time of the encoder, which a rank alone would take as well, over that of the "
        f"step. Assumed: an accelerator that sustains {accelerator['encoder_rate'] / 1e12:.0f} TFLOP/s on the encoder "
        f"and {accelerator['loss_rate'] / 1e12:.0f} on the products of the loss in fp32, "
        f"{1e6 * accelerator['launch_seconds']:.0f} us to start a collective, rounds logarithmic in W, bytes around a "
        "ring, nothing overlapping, and the networks below. "
        "In brackets what costs most beside the encoder.",
        _table(
            (
                "network",
                "accelerators a machine",
                "latency inside us",
                "GB/s inside",
                "latency between us",
                "GB/s a machine",
            ),
            (
                (
                    network["name"],
                    network["per_node"],
                    f"{1e6 * network['inside_seconds']:.0f}",
                    f"{network['inside_rate'] / 1e9:.0f}",
                    f"{1e6 * network['between_seconds']:.0f}",
                    f"{network['between_rate'] / 1e9:g}",
                )
                for network in found["networks"]
            ),
        ),
    ]
    sizes = {encoder["name"]: encoder["parameters"] for encoder in found["encoders"]}
    cells = {
        (r["encoder"], r["network"], r["b"], r["W"]): f"{r['efficiency']:.0%} ({r['worst']})" for r in found["grid"]
    }
    shares, worlds = (sorted({key[place] for key in cells}) for place in (2, 3))
    for encoder in sizes:
        text.append(f"### {encoder}, {sizes[encoder] / 1e6:.1f} million parameters")
        rows = [
            (network["name"], share, *(cells[encoder, network["name"], share, world] for world in worlds))
            for network in found["networks"]
            for share in shares
        ]
        text.append(_table(("network", "b", *(f"W = {world}" for world in worlds)), rows))
    names = sorted({name for row in found["variants"] for name in row["seconds"]})
    text.append("### What a setting changes\n\nW = 256, b = 256; milliseconds of sending, by part.")
    rows = [
        (
            row["encoder"],
            row["network"],
            row["change"],
            f"{row['efficiency']:.0%}",
            *(f"{1e3 * row['seconds'].get(name, 0):.1f}" for name in names),
        )
        for row in found["variants"]
    ]
    text.append(_table(("encoder", "network", "setting", "efficiency", *names), rows))
    return "\n\n".join(text)
