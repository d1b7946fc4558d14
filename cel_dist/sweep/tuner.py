"""The search itself: Ray Tune with the searcher and the scheduler that a sweep names."""

import logging
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, ResumeConfig
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from cel_dist.errors import CelError, RunError
from cel_dist.ray_cluster import first_line
from cel_dist.sweep.ranks import bundles
from cel_dist.sweep.section import Parameter, SweepSection
from cel_dist.sweep.trial import Job, Trial

logger = logging.getLogger(__name__)

STATE = "tune"
"""Folder in that of the sweep with Ray's own record, from which a search goes on."""

# Seconds between two of those: what was reported in between, a search that goes on hears again.
_STATE_SECONDS = "2"


def search(job: Job, callbacks: Sequence[Callback], *, is_resumed: bool) -> list[Any]:
    """Run all trials; returns them as Ray knows them. Needs a connection to a cluster.

    Args:
        job: the sweep.
        callbacks: told what happens.
        is_resumed: whether to go on with what `STATE` has.

    Raises:
        CelError: a trial needs more than the cluster has.
        RunError: Ray failed.
    """
    section = job.sweep.section
    shares = bundles(section.ranks, section.cpus, section.gpus)
    _require_room(section, shares)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = _STATE_SECONDS
    # Its own files for TensorBoard and spreadsheets: a sweep has its own records.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scheduler = _scheduler(job)
    try:
        outcome = tune.run(
            tune.with_parameters(Trial, job=job),
            name=STATE,
            storage_path=str(job.sweep.folder),
            metric=section.metric,
            mode="min",
            config={}
            if section.search == "tpe"
            else {key: _domain(value, section) for key, value in section.space.items()},
            resources_per_trial=tune.PlacementGroupFactory(shares, strategy="PACK"),
            num_samples=1 if section.search == "grid" else section.num_trials,
            search_alg=_searcher(section),
            scheduler=scheduler,
            max_failures=section.retries,
            raise_on_failed_trial=False,
            verbose=0,
            callbacks=[*callbacks, *([_Rungs(scheduler)] if isinstance(scheduler, ASHAScheduler) else [])],
            resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if is_resumed else None,
        )
    except ray.exceptions.RayError as error:
        raise RunError(f"the Ray cluster was lost: {first_line(error)}; go on with 'cel sweep --resume'") from None
    return list(outcome.trials)


def _domain(parameter: Parameter, section: SweepSection) -> Any:
    """A parameter in the words of Ray Tune."""
    if section.search == "grid":
        assert parameter.points is not None
        return tune.grid_search([parameter.name_of(value) for value in parameter.points])
    if parameter.choice is not None:
        return tune.choice([parameter.name_of(value) for value in parameter.choice])
    low, high = parameter.bounds
    if parameter.integer is not None:
        return tune.randint(int(low), int(high) + 1)
    return tune.uniform(low, high) if parameter.uniform is not None else tune.loguniform(low, high)


def _searcher(section: SweepSection) -> Searcher | SearchAlgorithm:
    if section.search != "tpe":
        return BasicVariantGenerator(random_state=section.seed, max_concurrent=section.concurrent or 0)
    try:
        import optuna
    except ImportError:
        raise CelError("sweep.search=tpe needs Optuna; pip install 'cel_dist[sweep]', or search at random") from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = OptunaSearch(
        {setting: distribution(parameter) for setting, parameter in section.space.items()},
        metric=section.metric,
        mode="min",
        sampler=optuna.samplers.TPESampler(seed=section.seed, multivariate=True),
    )
    return ConcurrencyLimiter(searcher, section.concurrent) if section.concurrent else searcher


def distribution(parameter: Parameter) -> Any:
    """A parameter in the words of Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choice is not None:
        return CategoricalDistribution([parameter.name_of(value) for value in parameter.choice])
    low, high = parameter.bounds
    if parameter.integer is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=parameter.log_uniform is not None)


def _scheduler(job: Job) -> TrialScheduler:
    section, train = job.sweep.section, job.sweep.base.train
    if section.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            grace_period=section.grace_epochs,
            # No rung at the end, where a run ends by itself.
            max_t=max(train.epochs, section.grace_epochs + 1) - 0.5,
            reduction_factor=section.reduction,
            stop_last_trials=False,
        )
    if section.scheduler == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=section.grace_epochs)
    if section.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=section.perturb_epochs,
            hyperparam_mutations={
                setting: list(map(parameter.name_of, parameter.choice))
                if parameter.choice
                else _domain(parameter, section)
                for setting, parameter in section.space.items()
            },
            # A factor of 1.2 may lead out of the space.
            custom_explore_fn=_Within(section),
        )
    return FIFOScheduler()


class _Within:
    """Settings that a scheduler has moved, back within their bounds."""

    def __init__(self, section: SweepSection) -> None:
        self._section = section

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        moved = {key: parameter.within(config[key]) for key, parameter in self._section.space.items()}
        return {**config, **moved}


class _Rungs(Callback):  # type: ignore[misc]
    """Keeps what ASHA knows with the state of the search: Ray does not, and one that goes on would know nothing."""

    def __init__(self, scheduler: ASHAScheduler) -> None:
        self._scheduler = scheduler

    def get_state(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "asha")
            self._scheduler.save(str(path))
            return {"asha": path.read_bytes()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._scheduler.__dict__.update(pickle.loads(state["asha"]))


def _require_room(section: SweepSection, shares: list[dict[str, float]]) -> None:
    """Raise CelError where no trial could ever start: Ray would wait for more machines, without end."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        needed, available = sum(share.get(kind, 0.0) for share in shares), there.get(kind, 0.0)
        if needed > available + 1e-6:
            raise CelError(
                f"a trial of {section.ranks} ranks needs {needed:g} {kind}s, and the Ray cluster has {available:g}; "
                f"lower sweep.ranks or sweep.{kind.lower()}s, or name a larger cluster with --address"
            )
