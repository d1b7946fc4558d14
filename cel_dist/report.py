"""The report of a run: one HTML file without outside resources, made from what lies in the run folder."""

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cel_dist.data.files import atomic_write
from cel_dist.errors import CelError, RunError

if TYPE_CHECKING:
    from cel_dist.evaluation.diagnostics import Diagnostics

Record: TypeAlias = Mapping[str, Any]

PLOTS = "plots"

_PACKAGES = ("cel_dist", "torch", "torchaudio", "deepspeed", "webdataset", "mlflow", "numpy")


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Attributes:
        title: heading.
        caption: how to read it.
        svg: the picture.
        file: its name in the folder `plots`.
        kind: `half` stands beside another one, `map` and `panels` take the whole width; panels scroll on a phone.
    """

    title: str
    caption: str
    svg: bytes
    file: str
    kind: Literal["half", "map", "panels"] = "half"

    @property
    def source(self) -> str:
        """The picture as a `data:` URI."""
        return _data_uri(self.svg)


@dataclass(frozen=True)
class Scores:
    """The scored trials of the best model, as `scores.txt` holds them: M trials by label, utterances and score."""

    labels: npt.NDArray[np.int64]
    enrol: list[str]
    test: list[str]
    scores: npt.NDArray[np.float64]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html`, and its pictures as files in `plots/`, into a run folder; returns the report's path.

    Read are `metrics.jsonl` and, where they exist, `evaluations.jsonl`, `summary.json`, `config.yaml`,
    `mlflow_run_id.txt`, `evaluation/scores.txt` (lines `label enrol test score`), `evaluation/embeddings.npz`
    (`names` [N], `embeddings` [N, D] or [N, windows, D]) and `evaluation/diagnostics.json`. What is not there is left
    out of the report.

    Raises:
        CelError: the folder holds no metrics, or a file in it is damaged.
        RunError: the report cannot be written.
    """
    import jinja2

    folder = Path(run_dir)
    records = _read_records(folder / "metrics.jsonl")
    evaluations = _read_records(folder / "evaluations.jsonl") if (folder / "evaluations.jsonl").exists() else []
    summary = _read_summary(folder / "summary.json")
    scores = _read_scores(folder / "evaluation" / "scores.txt")
    diagnostics = _read_diagnostics(folder / "evaluation")
    figures = _figures(folder, [*records, *evaluations], scores)
    if diagnostics is not None:
        figures.append(_group_figure(diagnostics))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        headline=_headline(evaluations, summary),
        facts=_facts(folder, records, evaluations, summary, scores),
        figures=figures,
        diagnosis=_diagnosis(diagnostics) if diagnostics is not None else [],
        configuration=_text(folder / "config.yaml"),
        environment=_environment(),
    )
    path = folder / "report.html"
    try:
        (folder / PLOTS).mkdir(exist_ok=True)
        for figure in figures:
            with atomic_write(folder / PLOTS / figure.file) as file:
                file.write(figure.svg)
        with atomic_write(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; check space and permissions") from None
    return path


def _headline(evaluations: Sequence[Record], summary: Record) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for, as (what, value)."""
    tiles = []
    if evaluations:
        best = min(evaluations, key=_eer)
        if evaluations[0]["step"] == 0:
            tiles.append(("EER before training", f"{_eer(evaluations[0]):.2%}"))
        tiles.append((f"EER after {best['step']} steps", f"{_eer(best):.2%}"))
    if summary.get("seconds") is not None:
        tiles.append(("time", _duration(summary["seconds"])))
    if summary.get("utterances_per_second"):
        tiles.append(("utterances per second", f"{summary['utterances_per_second']:,.0f}"))
    return tiles


def _facts(
    folder: Path, records: Sequence[Record], evaluations: Sequence[Record], summary: Record, scores: Scores | None
) -> list[tuple[str, str]]:
    """The summary table, as (what, value)."""
    facts = [("run folder", str(folder))]
    trained = [record for record in records if "loss" in record]
    if trained:
        last = trained[-1]
        facts.append(("steps", f"{last['step']:,} (epoch {last['epoch']})"))
        facts.append(("last loss", f"{last['loss']:.4f} ({_parts(last)})"))
    if evaluations:
        first, best, last = evaluations[0], min(evaluations, key=_eer), evaluations[-1]
        if first["step"] == 0:
            facts.append(("before training", _errors(first)))
        facts.append((f"best, step {best['step']}", _errors(best)))
        if last is not best:
            facts.append((f"last, step {last['step']}", _errors(last)))
    if scores is not None:
        targets = int(scores.labels.sum())
        others = len(scores.labels) - targets
        utterances = len({*scores.enrol, *scores.test})
        facts.append(
            (
                "validation trials",
                f"{targets:,} same speaker, {others:,} different speakers, {utterances:,} utterances",
            )
        )
    if summary.get("model_uri"):
        facts.append(("MLflow model", summary["model_uri"]))
    run_id = _text(folder / "mlflow_run_id.txt").strip()
    if run_id:
        facts.append(("MLflow run", run_id))
    return facts


def _figures(folder: Path, records: Sequence[Record], scores: Scores | None) -> list[Figure]:
    # Plotting takes a second to import, which a caller that only passes by need not wait for.
    from cel_dist.evaluation import plots
    from cel_dist.evaluation.geometry import unit_rows
    from cel_dist.metrics import eer_threshold

    figures = []
    if records:
        curves = plots.training_curves(records, picture="svg")
        figures.append(
            Figure(
                "Training",
                "What metrics.jsonl and evaluations.jsonl hold, over steps.",
                curves,
                "training.svg",
                "panels",
            )
        )
    if scores is None:
        return figures
    det = plots.det_plot({"": (scores.scores, scores.labels)}, picture="svg")
    text = "Misses against false alarms of the best model; the dot is the equal error rate."
    figures.append(Figure("Detection error trade-off", text, det, "det.svg"))
    threshold = eer_threshold(scores.scores, scores.labels)
    histogram = plots.score_histogram(scores.scores, scores.labels, threshold=threshold, picture="svg")
    text = "The further apart the two hills, the better. Trials right of the threshold are accepted."
    figures.append(Figure("Scores", text, histogram, "scores.svg"))
    embeddings = folder / "evaluation" / "embeddings.npz"
    if embeddings.exists():
        names, values = _read_embeddings(embeddings)
        if values.ndim == 3:
            values = unit_rows(values).astype(np.float32)
        drawn = plots.speaker_map(values, speakers_of(names, scores), picture="svg")
        text = (
            "Embeddings of the validation utterances, a colour a speaker: voices the encoder never heard in training."
        )
        figures.append(Figure("Map of held-out speakers", text, drawn, "speakers.svg", "map"))
    return figures


def _read_diagnostics(folder: Path) -> "Diagnostics | None":
    from cel_dist.evaluation.diagnostics import DIAGNOSTICS_FILE, Diagnostics

    path = folder / DIAGNOSTICS_FILE
    return Diagnostics.load(path) if path.exists() else None


def _group_figure(diagnostics: "Diagnostics") -> Figure:
    from cel_dist.evaluation import plots

    drawn = plots.group_errors(diagnostics.groups, diagnostics.control, picture="svg")
    text = (
        "Each part of the validation trials at a threshold of its own; the dashed line is the whole list. "
        f"Too few: fewer than {diagnostics.min_trials} trials of a class."
    )
    return Figure("Errors by group", text, drawn, "groups.svg", "map")


def _diagnosis(diagnostics: "Diagnostics") -> list[tuple[str, str]]:
    """What tells voice from channel, as (what, value)."""
    from cel_dist.evaluation.diagnostics import verdict

    rows = [*diagnostics.geometry_rows(), *diagnostics.control_rows()]
    rows += [("not shown", reason) for reason in diagnostics.not_shown]
    if diagnostics.control is not None:
        rows.append(("what it means", verdict(diagnostics.control)))
    return rows


def speakers_of(names: Sequence[str], scores: Scores) -> list[str]:
    """The speaker of each utterance: those that target trials connect are one voice, however their files are called.

    A speaker is called after the first folder of the paths if all of its utterances share one, else after the first of
    its utterances.

    >>> scores = Scores(np.array([1, 0]), ["a/1.wav", "b/1.wav"], ["a/2.wav", "a/2.wav"], np.array([0.0, -1.0]))
    >>> speakers_of(["a/1.wav", "a/2.wav", "b/1.wav"], scores)
    ['a', 'a', 'b']
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    place = {name: number for number, name in enumerate(names)}
    pairs = [
        (place[enrol], place[test])
        for label, enrol, test in zip(scores.labels.tolist(), scores.enrol, scores.test, strict=True)
        if label == 1 and enrol in place and test in place
    ]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(names), len(names)))
    _, voices = connected_components(graph, directed=False)
    called: dict[int, str] = {}
    for voice in np.unique(voices).tolist():
        members = [names[number] for number in np.flatnonzero(voices == voice).tolist()]
        folders = {Path(member).parts[0] for member in members if len(Path(member).parts) > 1}
        called[voice] = folders.pop() if len(folders) == 1 else members[0]
    return [called[voice] for voice in voices.tolist()]


def _environment() -> list[tuple[str, str]]:
    import torch

    rows = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    rows.append(("CPU cores", str(os.cpu_count())))
    if torch.cuda.is_available():
        rows.append(("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"))
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CelError(f"cannot read {path}: {error.strerror}; give the folder of a run that has begun") from None
    records = []
    # What follows the last line break was cut off in the middle of writing.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            record["step"], record["epoch"]
        except (ValueError, TypeError, KeyError):
            raise CelError(f"{path}, line {number}, is no record with a step and an epoch; remove that line") from None
        records.append(record)
    return records


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(_text(path) or "{}")
    except ValueError:
        raise CelError(f"{path} is not valid JSON; remove it, and the report does without") from None
    return summary if isinstance(summary, dict) else {}


def _read_scores(path: Path) -> Scores | None:
    from cel_dist.evaluation.trials import split_columns

    rows = [split_columns(line, 4) for line in _text(path).split("\n") if line]
    if not rows:
        return None
    try:
        labels, enrol, test, scores = zip(*rows, strict=True)
        return Scores(
            np.array([int(label) for label in labels]), list(enrol), list(test), np.array(scores, dtype=np.float64)
        )
    except ValueError:
        raise CelError(f"{path} has lines that are not 'label enrol test score'; evaluate again") from None


def _read_embeddings(path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["names"].tolist(), archive["embeddings"]
    except (OSError, ValueError, KeyError) as error:
        raise CelError(f"{path} does not hold names and embeddings ({error}); remove it or evaluate again") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _eer(record: Record) -> float:
    return float(record["eer"])


def _errors(record: Record) -> str:
    cost = record.get("min_dcf")
    return f"EER {_eer(record):.2%}" + (f", minDCF {cost:.3f}" if cost is not None else "")


def _parts(record: Record) -> str:
    names = [name for name in ("similarity", "uniformity", "accuracy") if name in record]
    return ", ".join(f"{name} {record[name]:.4f}" for name in names)


def _duration(seconds: float) -> str:
    """Time for people.

    >>> [_duration(seconds) for seconds in (7.4, 245, 7390)]
    ['7.4 s', '4 min 05 s', '2 h 03 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _data_uri(svg: bytes) -> str:
    # matplotlib's own font is not on every reader's machine; Verdana is its sibling, and serifs are for books.
    portable = svg.replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")
    return "data:image/svg+xml;base64," + base64.b64encode(portable).decode("ascii")
