"""Pictures of a sweep, as SVG: parallel coordinates, importances, and what each epoch bought."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cel_dist.evaluation.plots import STYLE, render
from cel_dist.sweep.outcomes import Outcome
from cel_dist.sweep.section import Parameter
from cel_dist.sweep.table import short

# Dark is low, which is good.
_MAP = "viridis"
_LABEL: dict[str, Any] = {
    "va": "center",
    "fontsize": 8,
    "bbox": {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
}


def parallel_coordinates(outcomes: Sequence[Outcome], space: Mapping[str, Parameter], metric: str) -> bytes:
    """A line a trial, through its settings to what it reached; the best is drawn last and bold."""
    measured = sorted((outcome for outcome in outcomes if outcome.best is not None), key=_best, reverse=True)
    settings = list(space)
    heights = {setting: _Axis(space[setting]) for setting in settings}
    values = [_best(outcome) for outcome in measured]
    scale: Any = Normalize(min(values), max(max(values), min(values) + 1e-9))
    colours: Any = ScalarMappable(scale, _MAP)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 1.7 * (len(settings) + 1)), 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        for outcome in measured:
            place = [heights[setting].height(outcome.values[setting]) for setting in settings]
            place.append(float(scale(_best(outcome))))
            is_best = outcome is measured[-1]
            axes.plot(
                range(len(place)),
                place,
                color=colours.to_rgba(_best(outcome)),
                linewidth=3 if is_best else 1.2,
                alpha=0.9,
            )
        for number, setting in enumerate(settings):
            axes.axvline(number, color="#888888", linewidth=0.8)
            axes.text(number, 1.09, setting, ha="center", va="bottom", fontsize=9)
            for height, label in heights[setting].ticks():
                axes.text(number + 0.03, height, label, zorder=5, **_LABEL)
        axes.axvline(len(settings), color="#888888", linewidth=0.8)
        axes.text(len(settings), 1.09, metric, ha="center", va="bottom", fontsize=9)
        for height, value in ((0.0, min(values)), (1.0, max(values))):
            axes.text(len(settings) + 0.03, height, f"{value:.4f}", zorder=5, **_LABEL)
        axes.set_xlim(-0.2, len(settings) + 0.5)
        axes.set_ylim(-0.05, 1.2)
        return render(figure, "svg")


def importances(shares: Mapping[str, float]) -> bytes:
    """A bar a setting."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 0.9 + 0.35 * len(shares)), layout="constrained")
        axes = figure.subplots()
        names = sorted(shares, key=lambda name: shares[name])
        axes.barh(names, [shares[name] for name in names], color="#0072B2")
        axes.set_xlabel("share of the differences")
        axes.grid(visible=False, axis="y")
        return render(figure, "svg")


def budget(curves: Mapping[str, Sequence[tuple[float, float]]], best: str | None, metric: str) -> bytes:
    """What each trial had reached after how many epochs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for trial, points in curves.items():
            if not points:
                continue
            epochs, values = zip(*points, strict=True)
            is_best = trial == best
            axes.plot(
                epochs, values, color="#D55E00" if is_best else "#888888", linewidth=2.5 if is_best else 1.0,
                marker="o", markersize=3, zorder=3 if is_best else 2, label=f"best ({trial})" if is_best else None,
            )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric)
        if best is not None and curves.get(best):
            axes.legend()
        return render(figure, "svg")


class _Axis:
    """Where the values of a setting stand on its axis, from 0 to 1."""

    def __init__(self, parameter: Parameter) -> None:
        self._choice = [str(value) for value in parameter.choice] if parameter.choice is not None else None
        self._is_log, self._is_whole = parameter.log_uniform is not None, parameter.integer is not None
        if self._choice is None:
            self._low, self._high = parameter.bounds

    def height(self, value: Any) -> float:
        if self._choice is not None:
            return self._choice.index(str(value)) / max(1, len(self._choice) - 1)
        low, high, value = np.log([self._low, self._high, value]) if self._is_log else (self._low, self._high, value)
        return float((value - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        if self._choice is not None:
            return [(number / max(1, len(self._choice) - 1), name) for number, name in enumerate(self._choice)]
        if self._is_whole:
            return [(self.height(value), short(value)) for value in (int(self._low), int(self._high))]
        middle = (self._low * self._high) ** 0.5 if self._is_log else (self._low + self._high) / 2
        return [(self.height(value), short(float(value))) for value in (self._low, middle, self._high)]


def _best(outcome: Outcome) -> float:
    assert outcome.best is not None
    return outcome.best
