"""A sweep as its configuration says, checked before anything starts, and the configuration of each of its trials."""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import all_paths, assign, parse_as, parse_config, read_settings
from cel_dist.distributed import World
from cel_dist.errors import CelError
from cel_dist.sweep.section import Parameter, SweepConfig, SweepSection
from cel_dist.tracking.connection import resolve_uri, sqlite_file
from cel_dist.training.start import FIXED

Values = Mapping[str, Any]
"""Settings of a trial by their dotted paths."""

RESOLVED = "sweep.yaml"
"""File in the folder of a sweep with all of its settings."""

_NOT_SEARCHED = ("run", "tracking", "checkpoint")


@dataclass(frozen=True)
class Sweep:
    """A search.

    Attributes:
        section: what is searched, and how.
        base: the configuration that trials have in common; its `run.dir` is the folder of the sweep.
        settings: the same, as sections within each other.
        folder: where the sweep lives, as all processes call it, whatever their working folders.
        tracking_uri: the tracking server or database, the same.
    """

    section: SweepSection
    base: Config
    settings: Mapping[str, Any]
    folder: Path
    tracking_uri: str

    def of_trial(self, values: Values, run_dir: Path, name: str, parent_run: str | None = None) -> Config:
        """The configuration of a run of a trial.

        Args:
            values: what was drawn.
            run_dir: folder of the run.
            name: in MLflow.
            parent_run: MLflow run of the sweep.

        Raises:
            CelError: the values do not fit each other.
        """
        tree = copy.deepcopy(dict(self.settings))
        told = f"the trial {json.dumps(dict(values))}"
        fixed: dict[str, Any] = {
            "run.dir": str(run_dir),
            "run.name": name,
            "tracking.register_as": None,
            "tracking.uri": self.tracking_uri,
            "tracking.parent_run": parent_run,
        }
        if self.base.train.threads is None:
            # Ranks would take all cores of the machine, on which other trials run.
            fixed["train.threads"] = max(1, int(self.section.cpus))
        for path, value in {**values, **fixed}.items():
            assign(tree, path, value, told)
        config = parse_config(tree, told)
        World(0, self.section.ranks).rows(config.rows, config.labels.utterances if config.labels.use else 1)
        return config


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read and check the configuration of a sweep.

    Raises:
        CelError: as `load_config`; there is no section `sweep`, it searches what is no setting or cannot be searched,
            or a value that it may draw is refused.
    """
    tree = read_settings(path, overrides)
    if "sweep" not in tree:
        raise CelError(f"{path} has no section 'sweep', which says what is searched; see configs/sweep_cel.yaml")
    section = parse_as(SweepConfig, tree, str(path)).sweep
    settings = {name: value for name, value in tree.items() if name != "sweep"}
    base = parse_config(settings, str(path))
    sweep = Sweep(section, base, settings, base.run.dir.absolute(), _absolute(resolve_uri(base.tracking.uri)))
    if base.eval.trials is None:
        raise CelError(f"a sweep compares trials by sweep.metric={section.metric}; set eval.trials and eval.root")
    for setting, parameter in section.space.items():
        _check(sweep, setting, parameter)
    return sweep


def _absolute(uri: str) -> str:
    database = sqlite_file(uri)
    return f"sqlite:///{database}" if database else uri


def _check(sweep: Sweep, setting: str, parameter: Parameter) -> None:
    where = f"sweep.space.{setting}"
    paths = all_paths()
    if setting not in paths:
        nearest = difflib.get_close_matches(setting, paths, n=1, cutoff=0.0)[0]
        raise CelError(f"{where}: there is no setting '{setting}'; did you mean '{nearest}'?")
    if setting.partition(".")[0] in _NOT_SEARCHED:
        raise CelError(f"{where}: the sweep sets {setting.partition('.')[0]}.* itself; search another setting")
    if sweep.section.scheduler == "pbt" and (setting in FIXED or setting.startswith("data.")):
        raise CelError(
            f"{where}: a run cannot change {setting} on its way, which sweep.scheduler=pbt does; take another scheduler"
        )
    for value in parameter.samples:
        try:
            sweep.of_trial({setting: value}, sweep.folder, "check")
        except CelError as error:
            raise CelError(f"{where}={value} cannot be searched: {error}") from None
