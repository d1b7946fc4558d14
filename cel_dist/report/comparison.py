"""The page of several runs beside each other."""

import os
from collections.abc import Sequence
from pathlib import Path

from cel_dist.config_file import flat
from cel_dist.errors import CelError
from cel_dist.report.charts import series_look
from cel_dist.report.figures import compared_figure, det_figure
from cel_dist.report.page import duration, render, write_page
from cel_dist.report.run_folder import RunFolder

# What names a run and where it is recorded differs always and says nothing.
_NOT_COMPARED = ("run.", "tracking.")


def write_comparison(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write a page that compares runs: results, settings that differ, curves and error trade-offs over each other.

    Args:
        run_dirs: two run folders or more.
        out: the file.

    Returns:
        Its path.

    Raises:
        CelError: fewer than two runs, one of them twice, a folder that holds no run or a damaged file, or `out` cannot
            be a file.
        RunError: the page cannot be written.
    """
    if len(run_dirs) < 2:
        raise CelError("a comparison needs two run folders or more; give another one")
    seen: set[Path] = set()
    for place in map(Path, run_dirs):
        if place.resolve() in seen:
            raise CelError(f"the run {place} is given twice; give every run once")
        seen.add(place.resolve())
    runs = [RunFolder.read(place) for place in run_dirs]
    names = _names([run.folder.resolve() for run in runs])
    by_name = dict(zip(names, runs, strict=True))
    trials = {name: run.scores.ranked for name, run in by_name.items() if run.scores is not None}
    figures = [
        compared_figure({name: [*run.records, *run.evaluations] for name, run in by_name.items()}),
        det_figure(trials, names) if trials else None,
    ]
    lists = {(tuple(run.scores.enrol), tuple(run.scores.test)) for run in runs if run.scores is not None}
    page = render(
        "comparison.html.j2",
        name=f"{len(runs)} runs",
        runs=[{"name": name, "look": series_look(number)[0]} for number, name in enumerate(names)],
        results=_results(runs),
        settings=_differing(runs),
        are_lists_equal=len(lists) < 2,
        figures=[figure for figure in figures if figure is not None],
        clips=[],
    )
    return write_page(page, Path(out))


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart.

    >>> _names([Path("/runs/a/one"), Path("/runs/b/one")])
    ['a/one', 'b/one']
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _results(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Measures of all runs, a row each; a dash where one was not taken."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        best, first = run.best or {}, run.measured[0] if run.measured else {}
        last = run.trained[-1] if run.trained else {}
        before = first.get("eer") if first.get("step") == 0 else None
        values = (
            ("EER before training", before, "{:.2%}".format),
            ("best EER", best.get("eer"), "{:.2%}".format),
            ("minDCF there", best.get("min_dcf"), "{:.3f}".format),
            ("at step", best.get("step"), "{:,}".format),
            ("steps", last.get("step"), "{:,}".format),
            ("last loss", last.get("loss"), "{:.4f}".format),
            ("utterances per second", run.summary.get("utterances_per_second"), "{:,.1f}".format),
            ("time", run.summary.get("seconds"), duration),
        )
        for what, value, text in values:
            rows.setdefault(what, []).append("\N{EN DASH}" if value is None else text(value))
    return [(what, row) for what, row in rows.items() if set(row) != {"\N{EN DASH}"}]


def _differing(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, as they stand in `config.yaml`."""
    flattened = [{name: _shown(value) for name, value in flat(run.settings)} for run in runs]
    every = dict.fromkeys(name for settings in flattened for name in settings)
    rows = [(name, [settings.get(name, "\N{EN DASH}") for settings in flattened]) for name in every]
    return [(name, row) for name, row in rows if len(set(row)) > 1 and not name.startswith(_NOT_COMPARED)]


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
