"""Cost of one rank's share of the global loss: tiles with hand-derived gradients beside materialised autograd.

    python benchmarks/global_loss.py                       # the table of results/global_loss.md, some minutes
    python benchmarks/global_loss.py --largest 8192        # smaller batches only
    python benchmarks/global_loss.py --ring                # one share of K = 1 048 576, block by block, too
    python benchmarks/global_loss.py --row 65536 256 64    # this row again, with K, d and W; the others stay
    python benchmarks/global_loss.py --matmul bf16         # the products of the tiles in bf16; its own result files
    python benchmarks/global_loss.py --table               # the files again from what was measured

On a GPU the results are `global_loss_cuda.*`; products other than fp32 are named too, as in `global_loss_cuda_bf16.*`.

One process computes what a rank of W does: its b = K / W rows against all K, forward and backward, A-Cont and PoN. The
rows of the other ranks are drawn beforehand and given to both ways; sending them is not in the times. What the other
ranks would send in the exchange is this rank's own, which costs the same. Every measurement has a process of its own,
so that its peak memory is its own; the two ways take turns.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cel_dist.distributed import let_idle_threads_sleep
from cel_dist.losses.exchange import Block, Exchange
from cel_dist.losses.precision import MatmulName, Products
from cel_dist.losses.similarity import SIMILARITIES
from cel_dist.losses.terms import Settings, global_terms
from cel_dist.losses.tiles import TileSize

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = Settings(SIMILARITIES["angular_contrastive"], "pon")
BATCHES = (1024, 4096, 16384, 65536)
RING_ROWS, RING_BATCH = 256, 1 << 20
# Autograd keeps about this many matrices of b x K numbers; beyond the limit it is not tried.
MATRICES, LARGEST_BYTES = 6, 12 << 30
# Pairs b x K beyond which one step is long enough to be timed, and one turn enough.
LONG = 1 << 26
TURNS = 5


class OthersGiven(Exchange):
    """The exchange as one rank of W sees it, with the rows of the others drawn beforehand."""

    def __init__(self, world_size: int, others: Tensor | None) -> None:
        super().__init__(None, "gather")
        self._size = world_size
        self._others = others

    @property
    def world_size(self) -> int:
        return self._size

    def agree(self, x: Tensor, has_ids: bool, problem: str = "") -> None:
        pass

    def share(self, x: Tensor, ids: Tensor | None) -> "GivenRows":
        return GivenRows(x, self._others, self._size)

    def gather_vectors(self, vector: Tensor) -> Tensor:
        return vector.expand(self._size, -1).clone()


class GivenRows:
    """All rows in one block, or block by block as a ring delivers them.

    Every block of the ring is the one before, rolled into a new buffer, so that there are three of them beside the own
    rows for a moment, where a real ring holds its own and two.
    """

    def __init__(self, x: Tensor, others: Tensor | None, world_size: int) -> None:
        self._x, self._others, self._world_size = x, others, world_size

    def __iter__(self):
        if self._others is not None:
            yield Block(self._others, torch.arange(len(self._others), device=self._x.device), 0)
            return
        rows = len(self._x)
        coming = self._x.clone()
        for turn in range(self._world_size):
            first = turn * rows
            yield Block(coming, torch.arange(first, first + rows, device=coming.device), first)
            # Other rows for the next turn; drawing them would take longer than the loss.
            coming = torch.roll(coming, 1, dims=-1)


def materialised(x: Tensor, rows: Tensor, w: Tensor) -> Tensor:
    """The same share with every pair in memory; the gradient of the gathered rows is part of it."""
    own, everything = F.normalize(x, dim=-1), F.normalize(rows, dim=-1)
    target = torch.arange(len(x), device=x.device)
    similarity = 0.5 * (
        F.cross_entropy(w * own[:, 0] @ everything[:, 1].T, target)
        + F.cross_entropy(w * own[:, 1] @ everything[:, 0].T, target)
    )
    uniformity = 0.0
    for view in (0, 1):
        potentials = torch.exp(4 * (own[:, view] @ everything[:, view].T) - 4)
        uniformity = uniformity + 0.5 * (potentials.sum() - len(x)).log()
    return similarity + uniformity


def measure(
    way: str, batch: int, dim: int, world_size: int, device: str, repeats: int, matmul: str
) -> dict[str, float]:
    """Median seconds of forward and backward, and the memory that they took beyond what was there before.

    `matmul` is that of the tiles; autograd has fp32 products in any case.
    """
    generator = torch.Generator().manual_seed(0)
    share = batch // world_size
    ring = way == "ring"
    rows = torch.randn(share if ring else batch, 2, dim, generator=generator).to(device)
    w = torch.tensor([10.0], device=device, requires_grad=True)
    x = rows[:share].clone().requires_grad_()
    rows.requires_grad_(way == "materialised")
    exchange = OthersGiven(world_size, None if ring else rows)
    settings = dataclasses.replace(SETTINGS, products=Products(matmul))

    def step() -> None:
        if way == "materialised":
            materialised(x, rows, w).backward()
        else:
            global_terms(x, w, None, None, exchange, settings).loss.backward()
        x.grad = w.grad = rows.grad = None

    # A small step first: libraries take their own memory once.
    small = torch.randn(64, 2, dim, device=device, requires_grad=True)
    global_terms(small, w, None, None, OthersGiven(1, small.detach()), settings).loss.backward()
    materialised(small, small.detach().requires_grad_(), w).backward()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = memory(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "mebibytes": (memory(device) - before) / 2**20}


def memory(device: str) -> float:
    """Bytes at the peak so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_own_process(*arguments: object, repeats: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *map(str, arguments), "--repeats", str(repeats)]
    command += ["--device", options.device, "--matmul", options.matmul]
    environment = dict(os.environ)
    let_idle_threads_sleep(environment)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def measured_row(batch: int, dim: int, world_size: int, options: argparse.Namespace) -> dict:
    """Both ways by turns: medians of the turns, and of the ratios of the two ways in the same turn."""
    share = batch // world_size
    ways = ["tiles"] + (["materialised"] if 4 * MATRICES * share * batch <= LARGEST_BYTES else [])
    is_long = share * batch > LONG
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(1 if is_long else TURNS):
        for way in ways:
            repeats = 1 if is_long else options.repeats
            turns[way].append(in_own_process(way, batch, dim, world_size, repeats=repeats, options=options))
    row: dict = {"K": batch, "d": dim, "W": world_size, "b": share, "tiles": None, "materialised": None}
    for way, found in turns.items():
        row[way] = {name: statistics.median(turn[name] for turn in found) for name in ("seconds", "mebibytes")}
    if len(ways) == 2:
        pairs = zip(turns["materialised"], turns["tiles"], strict=True)
        ratios = sorted(plain["seconds"] / tiles["seconds"] for plain, tiles in pairs)
        row["ratio"] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    return row | {"turns": len(turns["tiles"]), "tile": TileSize.of(torch.device(options.device))}


def traffic(batch: int, dim: int, world_size: int) -> dict[str, dict[str, int]]:
    """Collectives of a step, and the fp32 words that this rank gives to them; sample ids are two words a row.

    Tiles: an all-gather of b rows, b (2 d + 2), and the exchange, 2 b + 8 in fp64. Autograd: the same all-gather, and
    backward a reduce-scatter of the gradient of all rows, 2 d K; what it needs besides for scalars is not counted.
    """
    share, alone = batch // world_size, world_size == 1
    gathered = share * (2 * dim + 2)
    words = {"tiles": gathered + 2 * (2 * share + 8), "materialised": gathered + 2 * dim * batch}
    return {
        "collectives": dict.fromkeys(words, 0 if alone else 2),
        "words": dict.fromkeys(words, 0) if alone else words,
    }


def conditions_here(options: argparse.Namespace) -> dict:
    """What a number holds for."""
    on_gpu = options.device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "turns": TURNS,
        "products": options.matmul,
        "device": options.device,
    }


def files_of(options: argparse.Namespace) -> Path:
    """Path of the result files, without their suffix."""
    name = "global_loss" + ("_cuda" if options.device == "cuda" else "")
    return options.results / (name + ("" if options.matmul == "fp32" else f"_{options.matmul}"))


def write(report: dict, files: Path) -> None:
    """The report as .json, .md and .png."""
    report["table"] = [row | traffic(row["K"], row["d"], row["W"]) for row in report["table"]]
    conditions, table, ring = report["conditions"], report["table"], report["ring"]
    files.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# One rank's share of the global loss",
        "",
        f"Written by `benchmarks/global_loss.py` on {conditions['machine']}, torch {conditions['torch']}, "
        f"{conditions['threads']} threads, products of the tiles in {conditions['products']}, autograd in fp32: A-Cont "
        "and PoN, forward and backward, of b = K / W rows against K of dimension d. In a turn both ways run, one after "
        "the other, in own processes. Rows whose ratio has a "
        f"range are medians of {conditions['turns']} turns, the others one turn. Memory is the peak beyond the "
        "gathered rows. The machine is shared: compare the ratios.",
        "",
        "A step of the tiles is one all-gather, of b (2 d + 2) words from each rank (sample ids are two words a row), "
        "and one exchange, of 2 b + 8 numbers in fp64; no collective runs backward. Autograd through the same "
        "all-gather sends the gradient of all rows back, a reduce-scatter to which every rank gives 2 d K words; an "
        "all-reduce would move twice that. Words are those of fp32 that one rank gives to the collectives of a step. "
        "Sending is not timed.",
        "",
        "| K | d | W | b | tile | tiles s | autograd s | ratio | tiles MiB | autograd MiB | share "
        "| tiles collectives | tiles words | autograd collectives | autograd words |",
        "| ---: " * 15 + "|",
    ]
    for row in table:
        tiles, plain = row["tiles"], row["materialised"]
        tile = " x ".join(map(str, row["tile"]))
        cells = [*(str(row[name]) for name in ("K", "d", "W", "b")), tile, f"{tiles['seconds']:.3f}"]
        if plain is None:
            cells += ["does not fit", "", f"{tiles['mebibytes']:.0f}", "", ""]
        else:
            ratio = row["ratio"]
            spread = f" ({ratio['least']:.2f} to {ratio['most']:.2f})" if row["turns"] > 1 else ""
            cells += [
                f"{plain['seconds']:.3f}",
                f"{ratio['median']:.2f}{spread}",
                f"{tiles['mebibytes']:.0f}",
                f"{plain['mebibytes']:.0f}",
                f"{tiles['mebibytes'] / max(plain['mebibytes'], 1):.1%}",
            ]
        cells += [str(row[name][way]) for way in ("tiles", "materialised") for name in ("collectives", "words")]
        lines.append(f"| {' | '.join(cells)} |")
    if ring:
        lines += [
            "",
            f"Ring: b = {RING_ROWS} rows against K = {RING_BATCH}, d = 256, blocks as the ring delivers them "
            f"(the sending itself left out): {ring['seconds']:.0f} s, {ring['mebibytes']:.0f} MiB beyond the own rows.",
        ]
    # Results of before there was a choice of device are those of a CPU.
    if conditions.get("device", "cpu") != "cuda":
        lines += ["", "Nothing here was measured on a GPU."]
    lines += ["", f"![Time and memory against K]({files.name}.png)"]
    files.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(table, files.with_suffix(".png"))


def draw(table: list[dict], file: Path) -> None:
    """Time and memory against K, both logarithmic, for d = 256."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {1: "tab:blue", 8: "tab:orange", 64: "tab:green"}
    for axis, quantity, label in zip(axes, ("seconds", "mebibytes"), ("seconds", "MiB beyond the rows"), strict=True):
        for world_size, colour in colours.items():
            rows = [row for row in table if row["W"] == world_size and row["d"] == 256]
            for way, style in (("tiles", "o-"), ("materialised", "s--")):
                rows = [row for row in rows if row[way]]
                values = [max(row[way][quantity], 0.1 if quantity == "mebibytes" else 0) for row in rows]
                name = f"{'tiles' if way == 'tiles' else 'autograd'}, W = {world_size}"
                axis.loglog([row["K"] for row in rows], values, style, color=colour, label=name, base=10)
        axis.set_xlabel("utterances in the global batch K")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("One rank's share of the global loss, d = 256")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=BATCHES[-1], metavar="K")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ring", action="store_true", help="measure the share of K = 1 048 576 too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matmul", choices=get_args(MatmulName), default="fp32", help="products of the tiles")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the files again")
    parser.add_argument("--row", nargs=3, type=int, metavar=("K", "D", "W"), help="measure one row again")
    parser.add_argument("--one", nargs=4, metavar=("WAY", "K", "D", "W"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, batch, dim, world_size = options.one
        found = measure(way, int(batch), int(dim), int(world_size), options.device, options.repeats, options.matmul)
        print(json.dumps(found))
        return
    files, here = files_of(options), conditions_here(options)
    report: dict = {"conditions": here, "table": [], "ring": None}
    if options.table or options.row:
        report = json.loads(files.with_suffix(".json").read_text())
    if options.table:
        write(report, files)
        return
    if others := {name for name, value in report["conditions"].items() if value != here[name]} - {"turns"}:
        parser.error(
            f"{', '.join(sorted(others))} differ from those of {files}.json; a table has one set of conditions"
        )
    rows = (
        [tuple(options.row)]
        if options.row
        else [
            (batch, dim, world_size)
            for dim in (256, 512)
            for batch in BATCHES
            if batch <= options.largest
            for world_size in (1, 8, 64)
        ]
    )
    table: list[dict] = []
    for row in rows:
        table.append(measured_row(*row, options))
        print(table[-1], flush=True)
    report["table"] = [row for row in report["table"] if (row["K"], row["d"], row["W"]) not in rows] + table
    report["table"].sort(key=lambda row: (row["d"], row["K"], row["W"]))
    if options.ring:
        ring = ("ring", RING_BATCH, 256, RING_BATCH // RING_ROWS)
        report["ring"] = in_own_process(*ring, repeats=1, options=options)
    write(report, files)


if __name__ == "__main__":
    main()
