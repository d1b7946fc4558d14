"""The figures of a report: curves, error trade-off, scores, the map of speakers, errors by group, durations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.report.charts import Axis, Chart, as_file, series_look, shortened
from cel_dist.report.clips import Clips
from cel_dist.report.run_folder import Scores, speakers_of

if TYPE_CHECKING:
    from cel_dist.evaluation.diagnostics import Diagnostics
    from cel_dist.metrics import RankedTrials

Records = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]

_MAX_CURVE_POINTS = 400
_MAX_MAP_POINTS = 500
_MAX_NAMED_SPEAKERS = 24
_DET_TICKS = (0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_GOLDEN_ANGLE = 137.508

# Title, name of the y axis, measures, and whether it begins at zero.
_PANELS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Loss", "", ("loss", "similarity", "uniformity"), False),
    ("EER on validation trials", "EER (%)", ("eer",), True),
    ("Accuracy and alignment", "", ("accuracy", "alignment"), False),
    ("Validation: alignment, uniformity", "", ("eval_alignment", "eval_uniformity"), False),
    ("Learning rate", "", ("lr",), True),
    ("Scale of the logits", "", ("w", "scale"), False),
    ("Margin", "", ("margin",), True),
    ("Gradient norm", "", ("grad_norm",), True),
    ("Speed", "utterances per second", ("utterances_per_second",), True),
)
_COMPARED_PANELS: tuple[tuple[str, str, str, bool], ...] = (
    ("Loss", "", "loss", False),
    ("EER on validation trials", "EER (%)", "eer", True),
    ("Accuracy", "", "accuracy", False),
    ("Speed", "utterances per second", "utterances_per_second", True),
)


@dataclass(frozen=True)
class Figure:
    """Charts with their words.

    Attributes:
        title: heading.
        caption: how to read them.
        charts: one, or some of one size.
        file: name of the drawing in the folder `plots`.
        kind: `half` stands beside another one, `wide` takes the whole width, `panels` stand side by side.
    """

    title: str
    caption: str
    charts: Sequence[Chart]
    file: str
    kind: Literal["half", "wide", "panels"] = "half"

    @property
    def drawing(self) -> bytes:
        """All charts as one SVG file."""
        return as_file(self.charts)


def training_figure(records: Records) -> Figure | None:
    """The course of training: every measure that `records` (with `step`) hold; None if there are none."""
    charts, thinned = [], False
    for title, label, names, from_zero in _PANELS:
        series = {name: points for name in names if (points := _series(records, name))}
        if series:
            charts.append(_curves(title, label, series, from_zero=from_zero))
            thinned |= any(len(points) > _MAX_CURVE_POINTS for points in series.values())
    if not charts:
        return None
    caption = "What metrics.jsonl and evaluations.jsonl hold, over steps."
    if thinned:
        caption += f" Of more than {_MAX_CURVE_POINTS} points the lowest and highest of each stretch are drawn."
    return Figure("Training", caption, charts, "training.svg", "panels")


def compared_figure(runs: Mapping[str, Records]) -> Figure | None:
    """The courses of several runs over each other; None if no two points can be drawn."""
    charts = []
    for title, label, measure, from_zero in _COMPARED_PANELS:
        series = {run: points for run, records in runs.items() if (points := _series(records, measure))}
        if series:
            charts.append(_curves(title, label, series, from_zero=from_zero, names=list(runs), width=540))
    if not charts:
        return None
    return Figure("Training", "The same measure of all runs, over steps.", charts, "training.svg", "panels")


def _series(records: Records, name: str) -> Points:
    factor = 100.0 if name == "eer" else 1.0
    found = ((float(record["step"]), record.get(name)) for record in records)
    # JSON of Python knows NaN, a chart does not.
    return [(step, factor * float(value)) for step, value in found if value is not None and math.isfinite(value)]


def _curves(
    title: str,
    label: str,
    series: Mapping[str, Points],
    *,
    from_zero: bool,
    names: Sequence[str] | None = None,
    width: float = 360,
) -> Chart:
    names = list(series) if names is None else names
    looks = {name: series_look(names.index(name)) for name in series}
    drawn = {name: _thinned(points) for name, points in series.items()}
    every = [point for points in drawn.values() for point in points]
    x = Axis.around("step", [step for step, _ in every], whole=True)
    y = Axis.around(label, [value for _, value in every], from_zero=from_zero)
    legend = [(looks[name][0], shortened(name), looks[name][1]) for name in series] if len(names) > 1 else ()
    chart = Chart(title, x, y, width=width, legend=legend)
    for name, points in drawn.items():
        look, dash = looks[name]
        chart.line(points, look, dash=dash)
        if len(points) <= 30:
            for point in points:
                chart.dot(*point, look, 2.5)
    unit = " %" if label.endswith("(%)") else ""
    values: dict[float, list[tuple[str, float]]] = {}
    for name, points in drawn.items():
        for step, value in points:
            values.setdefault(step, []).append((name, value))
    for step in sorted(values):
        lines = [f"{'EER' if name == 'eer' else name} {value:.4g}{unit}" for name, value in values[step]]
        chart.point(step, values[step][0][1], "\n".join([f"step {step:.0f}", *lines]))
    return chart


def _thinned(points: Points) -> Points:
    """A course with its peaks in at most so many points."""
    if len(points) <= _MAX_CURVE_POINTS:
        return points
    kept: set[int] = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), _MAX_CURVE_POINTS // 2 - 1):
        values = [points[number][1] for number in part]
        kept |= {int(part[int(np.argmin(values))]), int(part[int(np.argmax(values))])}
    return [points[number] for number in sorted(kept)]


def det_figure(trials: "Mapping[str, RankedTrials]", names: Sequence[str] = ()) -> Figure:
    """Detection error trade-off on normal-deviate axes (Martin et al. 1997), with the equal error rates.

    Args:
        trials: run to its scored trials.
        names: of all runs of a comparison, which give the colours; none for the report of one run.
    """
    smallest, curves = 0.2, []
    for name, ranked in trials.items():
        false_accepts, false_rejects, thresholds = ranked.det_points
        targets = int(ranked.is_target.sum())
        # Below one error in this list nothing was measured: the curve ends at the margin.
        floor = 0.5 / max(targets, len(ranked.is_target) - targets)
        smallest = min(smallest, floor)
        x, y = (ndtri(np.clip(rates, floor, 1 - floor)) for rates in (false_accepts, false_rejects))
        eer = ranked.eer
        corner = float(ndtri(np.clip(eer, floor, 1 - floor)))
        curves.append((name, eer, corner, x, y, false_accepts, false_rejects, thresholds))
    ends = float(ndtri(max(smallest, _DET_TICKS[0]))), float(ndtri(_DET_TICKS[-1]))
    ticks = [(float(ndtri(tick)), f"{100 * tick:g}") for tick in _DET_TICKS if tick >= smallest]
    axes = [Axis(f"{what} (%)", *ends, ticks) for what in ("false acceptance", "false rejection")]
    looks = [series_look(names.index(name) if names else 0) for name in trials]
    legend = [
        (look, f"{shortened(name)}: EER {eer:.2%}" if names else f"EER {eer:.2%}", dash)
        for (look, dash), (name, eer, *_) in zip(looks, curves, strict=True)
    ]
    chart = Chart("", axes[0], axes[1], 440, 400, legend, nearest="xy")
    chart.line([(ends[0], ends[0]), (ends[1], ends[1])], "guide")
    for (look, dash), (name, eer, corner, x, y, accepts, rejects, thresholds) in zip(looks, curves, strict=True):
        inside = np.flatnonzero((x <= ends[1]) & (y <= ends[1]) & (x >= ends[0]) & (y >= ends[0]))
        places = [chart.at(float(x[number]), float(y[number])) for number in inside]
        kept, last = [], (-9.0, -9.0)
        for number, place in zip(inside.tolist(), places, strict=True):
            if math.dist(place, last) >= 1 or number == inside[-1]:
                kept.append(number)
                last = place
        chart.line([(float(x[number]), float(y[number])) for number in kept], look, dash=dash)
        chart.dot(corner, corner, look, 4.5)
        head = [name] if names else []
        for number in kept:
            chart.point(
                float(x[number]),
                float(y[number]),
                "\n".join(
                    [
                        *head,
                        f"threshold {thresholds[number]:.3f}",
                        f"false acceptance {accepts[number]:.2%}",
                        f"false rejection {rejects[number]:.2%}",
                    ]
                ),
            )
        chart.point(corner, corner, "\n".join([*head, f"EER {eer:.2%}"]))
    what = "the best model of each run" if names else "the best model"
    caption = f"Misses against false alarms of {what}; the dot is the equal error rate."
    return Figure("Detection error trade-off", caption, [chart], "det.svg", "wide" if names else "half")


def score_figure(scores: Scores) -> Figure:
    """Densities of the scores of both classes, with the threshold of the equal error rate."""
    values, targets = scores.scores, scores.labels == 1
    edges = np.histogram_bin_edges(values, bins=int(np.clip(np.sqrt(len(values)), 10, 60)))
    kinds = (("different speakers", ~targets, "c1"), ("same speaker", targets, "c0"))
    counts = [np.histogram(values[chosen], edges)[0] for _, chosen, _ in kinds]
    shares = [100 * count / max(count.sum(), 1) for count in counts]
    x = Axis.around("score", [float(edges[0]), float(edges[-1])])
    y = Axis.around("trials of the class (%)", [0.0, float(max(share.max() for share in shares))])
    legend = [(look, f"{name} ({int(chosen.sum()):,})".replace(",", " "), "") for name, chosen, look in kinds]
    threshold = scores.ranked.eer_threshold
    legend.append(("guide", f"threshold {threshold:.3f}", ""))
    chart = Chart("", x, y, 440, 400, legend)
    for (_, _, look), share in zip(kinds, shares, strict=True):
        stairs = _stairs(edges, share)
        chart.area([(float(edges[0]), 0.0), *stairs, (float(edges[-1]), 0.0)], look)
        chart.line(stairs, look)
    chart.line([(threshold, 0.0), (threshold, y.high)], "guide")
    for number in range(len(edges) - 1):
        chart.point(
            float(edges[number] + edges[number + 1]) / 2,
            float(max(share[number] for share in shares)),
            f"score {edges[number]:.3f} to {edges[number + 1]:.3f}\n"
            + "\n".join(f"{name}: {count[number]} trials" for (name, _, _), count in zip(kinds, counts, strict=True)),
        )
    caption = "The further apart the two hills, the better. Trials right of the threshold are accepted."
    return Figure("Scores", caption, [chart], "scores.svg")


def _stairs(edges: npt.NDArray[Any], heights: npt.NDArray[Any]) -> Points:
    return [
        (float(edge), float(height))
        for number, height in enumerate(heights)
        for edge, height in ((edges[number], height), (edges[number + 1], height))
    ]


def map_figure(names: Sequence[str], embeddings: npt.NDArray[np.float32], scores: Scores, clips: Clips) -> Figure:
    """Two-dimensional t-SNE map of embeddings [N, D], a colour and a shape a speaker; up to 24 are named."""
    from cel_dist.evaluation.projection import neighbour_map

    speakers = speakers_of(names, scores)
    chosen = np.unique(np.linspace(0, len(names) - 1, num=min(len(names), _MAX_MAP_POINTS)).astype(int))
    places = neighbour_map(embeddings[chosen])
    places = places / max(float(np.abs(places).max()), 1e-30)
    across = Axis("", float(places[:, 0].min()) - 0.04, float(places[:, 0].max()) + 0.04, ())
    up = Axis("", float(places[:, 1].min()) - 0.04, float(places[:, 1].max()) + 0.06, ())
    chart = Chart("", across, up, 640, 420, has_axes=False, nearest="xy")
    known = sorted({speakers[number] for number in chosen})
    looks = {speaker: (number * _GOLDEN_ANGLE % 360, number) for number, speaker in enumerate(known)}
    for number, (x, y) in zip(chosen.tolist(), places.tolist(), strict=True):
        chart.symbol(x, y, *looks[speakers[number]])
        chart.point(x, y, f"{names[number]}\nspeaker {speakers[number]}", clips.number(names[number]))
    if len(known) <= _MAX_NAMED_SPEAKERS:
        own = np.array([speakers[number] for number in chosen])
        for speaker in known:
            centre = np.median(places[own == speaker], axis=0)
            chart.text(float(centre[0]), float(centre[1]) + 0.035, shortened(speaker, 24), look="small")
    caption = f"{len(chosen)} utterances of {len(known)} speakers (t-SNE), a colour a speaker"
    if len(chosen) < len(names):
        caption += f", evenly chosen of {len(names)}"
    caption += ": voices the encoder never heard in training. Point at one for its name"
    caption += ", click to listen." if any(clip is not None for *_, clip in chart.hover) else "."
    return Figure("Map of held-out speakers", caption, [chart], "speakers.svg", "wide")


def group_figure(diagnostics: "Diagnostics") -> Figure:
    """Equal error rates of parts of the list as bars, and of the control."""
    rows: list[tuple[str, float | None, str, str]] = []
    kinds = list(dict.fromkeys(group.by for group in diagnostics.groups))
    for group in diagnostics.groups:
        counts = f"{group.targets} target, {group.non_targets} non-target trials"
        rows.append((group.label, group.eer, series_look(kinds.index(group.by))[0], counts))
        if group.eer is not None and group.false_rejects is not None and group.false_accepts is not None:
            counts += (
                f"\nat the threshold of all: {group.false_rejects:.2%} rejected, {group.false_accepts:.2%} accepted"
            )
            rows[-1] = (*rows[-1][:3], counts)
    if (control := diagnostics.control) is not None:
        quiet = f"quietest {control.quiet_share:.0%} of frames"
        rates = (
            (f"{quiet}: spectrum", control.spectrum_eer),
            (f"{quiet}: whitened", control.whitened_eer),
            (f"{quiet}: model", control.quiet_model_eer),
            ("all frames: whitened", control.all_frames_eer),
        )
        rows += [(name, rate, "c6", "control: next to no voice") for name, rate in rates]
    largest = max([rate for _, rate, *_ in rows if rate is not None], default=0.5)
    x = Axis.around("EER (%)", [0.0, 130 * largest])
    y = Axis("", len(rows) - 0.4, -0.6, [(float(place), name) for place, (name, *_) in enumerate(rows)])
    chart = Chart("", x, y, 640, 62 + 24.0 * len(rows), nearest="xy")
    for place, (name, rate, look, note) in enumerate(rows):
        chart.bar(place, 100 * (rate or 0.0), look, 15)
        words = "  too few trials" if rate is None else f"  {rate:.2%}"
        chart.text(100 * (rate or 0.0), place + 0.17, words, anchor="start")
        chart.point(100 * (rate or 0.0), place, f"{name}\n{words.strip()}\n{note}")
    if diagnostics.groups and (whole := diagnostics.groups[0].eer) is not None:
        chart.line([(100 * whole, len(rows) - 0.4), (100 * whole, -0.6)], "guide")
    caption = (
        "Each part of the validation trials at a threshold of its own; the dashed line is the whole list. "
        f"Too few: fewer than {diagnostics.min_trials} trials of a class."
    )
    return Figure("EER by condition", caption, [chart], "groups.svg", "wide")


def duration_figure(samples: npt.NDArray[np.int64]) -> Figure:
    """How long the utterances [N] of the training data are; up to the 99.5th percentile one by one."""
    seconds = samples / SAMPLE_RATE
    top = float(np.quantile(seconds, 0.995))
    edges = np.linspace(float(seconds.min()), max(top, float(seconds.min()) + 0.1), 31)
    counts, _ = np.histogram(np.minimum(seconds, edges[-1]), edges)
    x = Axis.around("duration (s)", [float(edges[0]), float(edges[-1])])
    y = Axis.around("utterances", [0.0, float(counts.max())])
    chart = Chart("", x, y, 640, 240)
    stairs = _stairs(edges, counts)
    chart.area([(float(edges[0]), 0.0), *stairs, (float(edges[-1]), 0.0)], "c2")
    chart.line(stairs, "c2")
    for number, count in enumerate(counts.tolist()):
        middle = float(edges[number] + edges[number + 1]) / 2
        chart.point(middle, count, f"{edges[number]:.1f} to {edges[number + 1]:.1f} s\n{count} utterances")
    caption = "Utterances of the training data by duration"
    caption += "; the last bin holds all longer ones, too." if float(seconds.max()) > edges[-1] else "."
    return Figure("Durations", caption, [chart], "durations.svg", "wide")
