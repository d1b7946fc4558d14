"""Pictures of an evaluation and of a training run, as bytes for files and reports alike.

Only figure objects are used, never pyplot, so that nothing global changes and no display is needed.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from cel_dist.evaluation.control import Control
from cel_dist.evaluation.groups import Group
from cel_dist.metrics import RankedTrials

Format: TypeAlias = Literal["png", "svg"]

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#666666"
_DET_TICKS = (0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_PIXELS_A_DEVIATE = 400
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    # The same numbers give the same SVG, byte by byte.
    "svg.hashsalt": "cel",
    "svg.fonttype": "none",
}


def det_plot(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, picture: Format = "png") -> bytes:
    """Detection error trade-off: misses against false alarms on normal-deviate axes (Martin et al. 1997), EER marked.

    Args:
        curves: name to (scores [M], labels [M]); an empty name leaves only the EER in the legend.
        picture: format of the result.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 5.0), layout="constrained")
        axes = figure.subplots()
        smallest = 0.2
        for colour, (name, (scores, labels)) in zip(_cycle(len(curves)), curves.items(), strict=True):
            ranked = RankedTrials(scores, labels)
            false_accepts, false_rejects, _ = ranked.det_points
            targets = ranked.is_target
            # Below one error in this list nothing was measured: the curve ends at the margin.
            floor = 0.5 / max(targets.sum(), (~targets).sum())
            smallest = min(smallest, floor)
            rate = ranked.eer
            legend = f"{name}: EER {rate:.2%}" if name else f"EER {rate:.2%}"
            x, y = (ndtri(np.clip(rates, floor, 1 - floor)) for rates in (false_accepts, false_rejects))
            x, y = _visible(x, y)
            axes.plot(x, y, color=colour, linewidth=1.8, label=legend)
            corner = ndtri(np.clip(rate, floor, 1 - floor))
            axes.plot([corner], [corner], "o", color=colour, markersize=6)
        ticks = [tick for tick in _DET_TICKS if tick >= smallest]
        low, high = ndtri(max(smallest, _DET_TICKS[0])), ndtri(_DET_TICKS[-1])
        axes.plot([low, high], [low, high], color=_GREY, linewidth=0.8, linestyle=":")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([ndtri(tick) for tick in ticks], labels=[f"{100 * tick:g}" for tick in ticks])
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set(xlabel="false acceptance (%)", ylabel="false rejection (%)")
        axes.legend(loc="upper right")
        return render(figure, picture)


def score_histogram(
    scores: ArrayLike, labels: ArrayLike, *, threshold: float | None = None, picture: Format = "png"
) -> bytes:
    """Densities of the scores of target and of non-target trials, with the threshold between them.

    Args:
        scores: [M].
        labels: [M], 1 for target trials.
        threshold: drawn as a line if given.
        picture: format of the result.
    """
    values = np.asarray(scores, dtype=np.float64)
    targets = np.asarray(labels) == 1
    num_bins = int(np.clip(np.sqrt(len(values)), 10, 60))
    edges = np.histogram_bin_edges(values, bins=num_bins).tolist()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        kinds = (("different speakers", ~targets, _COLOURS[1]), ("same speaker", targets, _COLOURS[0]))
        for name, chosen, colour in kinds:
            text = f"{name} ({chosen.sum()} trials)"
            density, _ = np.histogram(values[chosen], edges, density=True)
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(density, edges, color=colour, linewidth=1.6, label=text)
        if threshold is not None:
            axes.axvline(threshold, color=_GREY, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
        axes.set(xlabel="score", ylabel="density")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, columnspacing=1.2, handlelength=1.4)
        return render(figure, picture)


def group_errors(groups: Sequence[Group], control: Control | None = None, *, picture: Format = "png") -> bytes:
    """Equal error rates of parts of a list as bars, with the numbers of trials, and of the control.

    Args:
        groups: the whole list first.
        control: its rates are drawn if it is there.
        picture: format of the result.
    """
    bars = []
    kinds = list(dict.fromkeys(group.by for group in groups))
    for group in groups:
        shown = "too few trials" if group.eer is None else f"{group.eer:.2%}"
        note = f"{shown}  ({group.targets} / {group.non_targets})"
        bars.append((kinds.index(group.by), group.label, group.eer, note))
    if control is not None:
        quiet = f"quietest {control.quiet_share:.0%} of frames"
        rates = (
            (f"{quiet}: spectrum", control.spectrum_eer),
            (f"{quiet}: whitened", control.whitened_eer),
            (f"{quiet}: model", control.quiet_model_eer),
            ("all frames: whitened spectrum", control.all_frames_eer),
        )
        bars += [(len(kinds), name, rate, f"{rate:.2%}") for name, rate in rates]
    with mpl.rc_context(STYLE):
        # A gap between two kinds of parts.
        places = [number + 0.5 * kind for number, (kind, *_) in enumerate(bars)]
        figure = Figure(figsize=(7.4, 1.1 + 0.3 * (places[-1] + 1)), layout="constrained")
        axes = figure.subplots()
        for place, (kind, _, rate, note) in zip(places, bars, strict=True):
            colour = _GREY if kind == len(kinds) else _COLOURS[kind % len(_COLOURS)]
            axes.barh(place, 100 * (rate or 0.0), height=0.75, color=colour, alpha=0.8)
            # Its white ground keeps the line of the whole list out of the text.
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            at = (100 * (rate or 0.0), place)
            axes.annotate(note, at, (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=ground)
        if groups[0].eer is not None:
            axes.axvline(100 * groups[0].eer, color=_GREY, linestyle="--", linewidth=1.0)
        axes.set_yticks(places, [name for _, name, *_ in bars])
        axes.grid(visible=False, axis="y")
        axes.set_ylim(places[-1] + 0.7, -0.7)
        largest = max([rate for _, _, rate, _ in bars if rate is not None], default=0.5)
        axes.set_xlim(0, max(150 * largest, 1.0))
        axes.set_xlabel("EER (%), in brackets the target / non-target trials")
        return render(figure, picture)


def _visible(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve [P] without the points that would fall on the pixel of the one before."""
    pixels = np.rint(np.stack([x, y]) * _PIXELS_A_DEVIATE)
    moved = np.append(True, (pixels[:, 1:] != pixels[:, :-1]).any(axis=0))
    moved[-1] = True
    return x[moved], y[moved]


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def render(figure: Figure, picture: Format) -> bytes:
    """A figure as the bytes of a file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=120, metadata={"Date": None} if picture == "svg" else None)
    return buffer.getvalue()
