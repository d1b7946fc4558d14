"""What a sweep found: the best configuration, how much each setting mattered, pictures, and a page with all of it."""

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from cel_dist.config_file import assign
from cel_dist.data.files import write_files
from cel_dist.sweep import plots
from cel_dist.sweep.outcomes import ENDED, Outcome, best_of, curve
from cel_dist.sweep.section import SweepSection
from cel_dist.sweep.settings import Sweep
from cel_dist.sweep.table import short

logger = logging.getLogger(__name__)

BEST = "best.yaml"
PAGE = "sweep.html"
_MIN_TRIALS = 4


@dataclass(frozen=True)
class Summary:
    """What a sweep found.

    Attributes:
        best: the trial with the lowest value; None if none was evaluated.
        importances: share of each setting in the differences between trials; empty with fewer than four trials, or if
            they do not differ.
        files: what was written, by kind.
    """

    best: Outcome | None
    importances: dict[str, float]
    files: dict[str, Path]


def summarise(sweep: Sweep, outcomes: Sequence[Outcome], runs: Mapping[str, Sequence[Path]]) -> Summary:
    """Write `best.yaml`, `sweep.html` and its pictures into the folder of the sweep.

    Args:
        sweep: the search.
        outcomes: its trials.
        runs: the run folders of each, in their order.

    Raises:
        RunError: the folder cannot be written.
    """
    section = sweep.section
    best = best_of(outcomes)
    if best is None:
        return Summary(None, {}, {})
    shares = importances(section, outcomes)
    curves = {outcome.id: curve(runs[outcome.id], section.metric) for outcome in outcomes}
    pictures = {
        "Settings and what they reached": plots.parallel_coordinates(outcomes, section.space, section.metric),
        "What each epoch bought": plots.budget(curves, best.id, section.metric),
    }
    if shares:
        pictures["How much each setting mattered"] = plots.importances(shares)
    page = _page(sweep, outcomes, best, shares, pictures)
    contents = {"best": (BEST, [best_settings(sweep, best).encode()]), "page": (PAGE, [page.encode()])}
    return Summary(best, shares, write_files(sweep.folder, contents, "the summary"))


def best_settings(sweep: Sweep, best: Outcome) -> str:
    """A configuration with the settings of the best trial, as `cel train` takes it."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(sweep.settings)))
    for setting, value in {**best.values, "run.dir": str(sweep.base.run.dir / "best")}.items():
        assign(tree, setting, value, BEST)
    told = f"# Trial {best.id}: {sweep.section.metric} {best.best:.6f}; its run is {best.run_dir}.\n"
    if best.origins:
        told += "# It had other settings before these: see its runs.\n"
    return told + yaml.safe_dump(tree, sort_keys=False)


def importances(section: SweepSection, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of each setting in the differences between trials (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255, as
    Optuna has it), highest first; empty where that cannot be told."""
    try:
        import optuna
    except ImportError:
        logger.info("without Optuna it is not told how much each setting mattered: pip install 'cel_dist[sweep]'")
        return {}
    from cel_dist.sweep.tuner import distribution

    measured = [outcome for outcome in outcomes if outcome.best is not None and outcome.status in ENDED]
    if len(measured) < _MIN_TRIALS or len({outcome.best for outcome in measured}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    distributions = {setting: distribution(parameter) for setting, parameter in section.space.items()}
    for outcome in measured:
        values = section.drawn_as(outcome.values)
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=outcome.best))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return {
        name: float(share)
        for name, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def _page(
    sweep: Sweep,
    outcomes: Sequence[Outcome],
    best: Outcome,
    shares: Mapping[str, float],
    pictures: Mapping[str, bytes],
) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cel_dist", "sweep"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    ordered = sorted(outcomes, key=lambda outcome: (outcome.best is None, outcome.best, outcome.id))
    return environment.get_template("sweep.html.j2").render(
        name=sweep.folder.name,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        metric=sweep.section.metric,
        section=sweep.section,
        best=best,
        outcomes=ordered,
        settings=list(sweep.section.space),
        short=short,
        shares=shares,
        pictures={
            title: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for title, svg in pictures.items()
        },
    )
