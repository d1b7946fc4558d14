"""The page of one run."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cel_dist.data.files import atomic_write
from cel_dist.errors import CelError, RunError
from cel_dist.report.charts import COLOURS, DARK_COLOURS, PAGE_STYLES
from cel_dist.report.clips import CLIP_SECONDS, Clips
from cel_dist.report.figures import (
    Figure,
    det_figure,
    duration_figure,
    group_figure,
    map_figure,
    score_figure,
    training_figure,
)
from cel_dist.report.run_folder import Record, RunFolder, Scores

if TYPE_CHECKING:
    from cel_dist.evaluation.diagnostics import Diagnostics

PLOTS = "plots"
_REPORT_FILE = "report.html"
_NUM_HARDEST = 10
# Utterances of the training data whose audio is looked at: about a second's work.
_NUM_MEASURED = 256
_PACKAGES = ("cel_dist", "torch", "torchaudio", "deepspeed", "webdataset", "mlflow", "numpy")

Row = tuple[str, str]
"""What, and how much of it."""


def write_report(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, audio: bool = True
) -> Path:
    """Write the report of a run; returns its path.

    What it is made of is in `RunFolder.read`, and `evaluation/embeddings.npz` (`names` [N], `embeddings` [N, D] or
    [N, windows, D]), the shards and the audio of the validation list where they are on this machine. What is not
    there is left out.

    Args:
        run_dir: the run folder.
        out: file to write; without it `report.html` in the run folder, and the charts as files in its `plots/`.
        audio: put the first seconds of utterances into the page, as far as there is room, to be listened to.

    Raises:
        CelError: the folder holds no run, a file in it is damaged, or `out` cannot be a file.
        RunError: the report cannot be written.
    """
    run = RunFolder.read(run_dir)
    clips = Clips(run.audio_root if audio else None)
    # The hardest trials come before the map: there may not be room for the audio of all.
    hardest = _hardest(run.scores, clips) if run.scores is not None else []
    figures = _figures(run, clips)
    data, durations = _data(run)
    page = render(
        "run.html.j2",
        name=run.name,
        headline=_headline(run),
        facts=_facts(run),
        figures=figures,
        hardest=hardest,
        clips=clips.sources,
        clip_seconds=CLIP_SECONDS,
        diagnosis=_diagnosis(run.diagnostics) if run.diagnostics is not None else [],
        data=data,
        durations=durations,
        configuration=run.configuration,
        environment=_environment(),
    )
    if out is not None:
        return write_page(page, Path(out))
    drawn = [*figures, *([durations] if durations else [])]
    try:
        (run.folder / PLOTS).mkdir(exist_ok=True)
        for figure in drawn:
            with atomic_write(run.folder / PLOTS / figure.file) as file:
                file.write(figure.drawing)
    except OSError as error:
        raise RunError(f"cannot write into {run.folder / PLOTS}: {error.strerror}; {_REMEDY}") from None
    return write_page(page, run.folder / _REPORT_FILE)


_REMEDY = "check space and permissions, or name another file with --out"


def render(template: str, **content: Any) -> str:
    """A page; whatever comes from names, paths and settings is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        chart_styles=PAGE_STYLES,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        **content,
    )


def write_page(page: str, path: Path) -> Path:
    """Write a page as a whole or not at all.

    Raises:
        CelError: the path is a folder, or in none.
        RunError: it cannot be written.
    """
    if path.is_dir():
        raise CelError(f"{path} is a folder; name the file to write, as {path / _REPORT_FILE}")
    if not path.parent.is_dir():
        raise CelError(f"cannot write {path}: there is no folder {path.parent}; make it, or name another file")
    try:
        with atomic_write(path) as file:
            # A name that is no UTF-8 on disk must not keep the rest from being read.
            file.write(page.encode(errors="replace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; {_REMEDY}") from None
    return path


def _figures(run: RunFolder, clips: Clips) -> list[Figure]:
    figures = [training_figure([*run.records, *run.evaluations])]
    if run.scores is not None:
        figures += [det_figure({"": run.scores.ranked}), score_figure(run.scores)]
        if (embedded := run.embeddings()) is not None:
            figures.append(map_figure(*embedded, run.scores, clips))
    if run.diagnostics is not None:
        figures.append(group_figure(run.diagnostics))
    return [figure for figure in figures if figure is not None]


def _headline(run: RunFolder) -> list[Row]:
    """The few numbers that a reader looks for."""
    tiles = []
    if (best := run.best) is not None:
        if run.measured[0]["step"] == 0:
            tiles.append(("EER before training", f"{run.measured[0]['eer']:.2%}"))
        tiles.append((f"EER after {best['step']:,} steps", f"{best['eer']:.2%}"))
        if best.get("min_dcf") is not None:
            tiles.append(("minDCF there", f"{best['min_dcf']:.3f}"))
    if run.summary.get("seconds") is not None:
        tiles.append(("time", duration(run.summary["seconds"])))
    if run.summary.get("utterances_per_second"):
        tiles.append(("utterances per second", f"{run.summary['utterances_per_second']:,.0f}"))
    return tiles


def _facts(run: RunFolder) -> list[Row]:
    facts = [("run folder", str(run.folder))]
    if run.trained:
        last = run.trained[-1]
        parts = [f"{name} {last[name]:.4f}" for name in ("similarity", "uniformity", "accuracy") if name in last]
        facts.append(("steps", f"{last['step']:,} (epoch {last['epoch']})"))
        facts.append(("last loss", f"{last['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")))
    if (best := run.best) is not None:
        first, last = run.measured[0], run.measured[-1]
        if first["step"] == 0:
            facts.append(("before training", errors_of(first)))
        facts.append((f"best, step {best['step']}", errors_of(best)))
        if last is not best:
            facts.append((f"last, step {last['step']}", errors_of(last)))
    if (scores := run.scores) is not None:
        targets = int(scores.labels.sum())
        utterances = len({*scores.enrol, *scores.test})
        facts.append(
            (
                "validation trials",
                f"{targets:,} same speaker, {len(scores.labels) - targets:,} different speakers, "
                f"{utterances:,} utterances",
            )
        )
    if run.summary.get("model_uri"):
        facts.append(("MLflow model", run.summary["model_uri"]))
    if run.mlflow_run:
        facts.append(("MLflow run", run.mlflow_run))
    return facts


def errors_of(record: Record) -> str:
    """EER and minDCF of an evaluation, for people."""
    cost = record.get("min_dcf")
    return f"EER {record['eer']:.2%}" + (f", minDCF {cost:.3f}" if cost is not None else "")


def _hardest(scores: Scores, clips: Clips) -> list[dict[str, Any]]:
    """The target trials with the lowest scores, and the non-target trials with the highest."""
    threshold = scores.ranked.eer_threshold
    order = np.argsort(scores.scores, kind="stable")
    targets = scores.labels[order] == 1
    tables = []
    for title, rows, wrong in (
        ("Same speaker, scored lowest", order[targets][:_NUM_HARDEST], "rejected"),
        ("Different speakers, scored highest", order[~targets][::-1][:_NUM_HARDEST], "accepted"),
    ):
        trials = []
        for row in rows.tolist():
            score = float(scores.scores[row])
            sides = [(name, clips.number(name)) for name in (scores.enrol[row], scores.test[row])]
            is_wrong = (score < threshold) == (wrong == "rejected")
            trials.append({"score": f"{score:.3f}", "sides": sides, "verdict": wrong if is_wrong else "right"})
        tables.append({"title": title, "trials": trials})
    return tables


def _data(run: RunFolder) -> tuple[list[Row], Figure | None]:
    """What the training data are, and how long its utterances; nothing is read of who speaks."""
    place = run.setting("data", "shards")
    if not isinstance(place, str):
        return [], None
    rows = [("shards", place)]
    try:
        found = run.shards()
    except CelError as error:
        # They may have changed since; the run is what the report is about.
        return [*rows, ("not shown", str(error))], None
    if found is None:
        return [*rows, ("not shown", "the shards are not on the machine where this report was written")], None
    manifest, samples = found
    rows += [
        ("utterances", f"{manifest.samples:,}, {manifest.rejected:,} files rejected"),
        ("audio", f"{manifest.seconds / 3600:,.2f} hours, {manifest.audio_format}, {manifest.sample_rate} Hz"),
        ("files", f"{len(manifest.shards):,} shards, {sum(shard.bytes for shard in manifest.shards) / 2**30:,.2f} GiB"),
    ]
    if samples is None or not len(samples):
        return rows, None
    return [*rows, *_statistics(run, place)], duration_figure(samples)


def _statistics(run: RunFolder, place: str) -> list[Row]:
    """Levels, faults and duplicates of a sample of the training data, and what to do about them."""
    from cel_dist.config_file import load_config
    from cel_dist.data.statistics import Batches, statistics
    from cel_dist.data.statistics_rows import rows_of

    try:
        config = load_config(run.folder / "config.yaml")
        # One process: this may be a training process that is about to end.
        found = statistics(
            place, Batches.of(config), sample=_NUM_MEASURED, num_speakers=config.data.num_speakers, workers=1
        )
    except CelError as error:
        return [("not measured", str(error))]
    return [*rows_of(found), *(("worth acting on", f"{advice.found}: {advice.remedy}") for advice in found.advice)]


def _diagnosis(diagnostics: "Diagnostics") -> list[Row]:
    """What tells voice from channel, as (what, value)."""
    from cel_dist.evaluation.diagnostics import verdict

    rows = [*diagnostics.geometry_rows(), *diagnostics.control_rows()]
    rows += [("not shown", reason) for reason in diagnostics.not_shown]
    if diagnostics.control is not None:
        rows.append(("what it means", verdict(diagnostics.control)))
    return rows


def _environment() -> list[Row]:
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


def duration(seconds: float) -> str:
    """Time for people.

    >>> [duration(seconds) for seconds in (7.4, 245, 7390)]
    ['7.4 s', '4 min 05 s', '2 h 03 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
