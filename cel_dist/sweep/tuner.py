"""The search itself: Ray Tune with the searcher and the scheduler that a sweep names."""

import logging
import math
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
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
from cel_dist.sweep.outcomes import Outcome
from cel_dist.sweep.ranks import bundles
from cel_dist.sweep.section import Parameter, SweepSection
from cel_dist.sweep.state import is_sound
from cel_dist.sweep.trial import Job, Trial

logger = logging.getLogger(__name__)

STATE = "tune"
"""Folder in that of the sweep with Ray's own record, from which a search goes on."""

# Seconds between two of those: what was reported in between, a search that goes on hears again.
_STATE_SECONDS = "2"


def search(job: Job, callbacks: Sequence[Callback], former: Sequence[Outcome] = ()) -> list[Any]:
    """Run all trials; returns them as Ray knows them. Needs a connection to a cluster.

    Args:
        job: the sweep.
        callbacks: told what happens.
        former: the trials of a sweep that goes on. It does with what Ray's record has; where there is none, or a
            damaged one, the trials that are over are told to a new one.

    Raises:
        CelError: a trial needs more than the cluster has.
        RunError: Ray failed.
    """
    section = job.sweep.section
    shares = bundles(section.ranks, section.cpus, section.gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    require_room(shares, nodes)
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if num_gpus and not section.gpus:
        logger.warning("the Ray cluster has %g GPUs, and trials use none of them; set sweep.gpus=1", num_gpus)
    state = job.sweep.folder / STATE
    is_resumed = is_sound(state, section)
    if not is_resumed:
        shutil.rmtree(state, ignore_errors=True)
    searcher, num_samples = _searcher(section, [] if is_resumed else former)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = _STATE_SECONDS
    # Its own files for TensorBoard and spreadsheets: a sweep has its own records.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Pages of traceback of what is told in a line.
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Which trials failed or are left is told from the outcomes.
    logging.getLogger("ray.tune.tune").addFilter(_is_news)
    # Actors of trials are not used again: what they hold of a run goes with them.
    warnings.filterwarnings("ignore", "Consider boosting PBT performance")
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
            num_samples=num_samples,
            search_alg=searcher,
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


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Trials did not complete")


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


def _searcher(section: SweepSection, former: Sequence[Outcome]) -> tuple[Searcher | SearchAlgorithm, int]:
    """What draws settings, after it was told what is known of former trials, and how often it is to draw."""
    if section.search != "tpe":
        variants = BasicVariantGenerator(random_state=section.seed, max_concurrent=section.concurrent or 0)
        if former:
            # The same seed draws the same settings; with the same names they find the runs that are there.
            variants._uuid_prefix = former[0].id.rpartition("_")[0] + "_"
        return variants, 1 if section.search == "grid" else section.num_trials
    try:
        import optuna
    except ImportError:
        raise CelError("sweep.search=tpe needs Optuna; pip install 'cel_dist[sweep]', or search at random") from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    over = [outcome for outcome in former if outcome.is_over]
    searcher = OptunaSearch(
        {setting: distribution(parameter) for setting, parameter in section.space.items()},
        metric=section.metric,
        mode="min",
        sampler=optuna.samplers.TPESampler(seed=section.seed, multivariate=True),
        points_to_evaluate=[section.drawn_as(outcome.values) for outcome in former if not outcome.is_over],
    )
    for outcome in over:
        if outcome.last is not None:
            searcher.add_evaluated_point(section.drawn_as(outcome.values), outcome.last)
    limited = ConcurrencyLimiter(searcher, section.concurrent) if section.concurrent else searcher
    return limited, section.num_trials - len(over)


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
        return MedianStoppingRule(
            time_attr="epoch",
            grace_period=section.grace_epochs,
            # Trials that wait do not take turns with those that run: each turn is a start of all ranks.
            min_time_slice=math.inf,
        )
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


def require_room(shares: list[dict[str, float]], nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that a trial could start if nothing else ran; Ray would wait for more machines, without end.

    Args:
        shares: bundles of a trial; each lies on one machine.
        nodes: resources of the machines.

    Raises:
        CelError: it could not.
    """
    for kind in ("CPU", "GPU"):
        needed, available = (sum(one.get(kind, 0.0) for one in those) for those in (shares, nodes))
        if needed > available + 1e-6:
            raise CelError(
                f"a trial of {len(shares) - 1} ranks needs {needed:g} {kind}s, and the Ray cluster has {available:g}; "
                f"lower sweep.ranks or sweep.{kind.lower()}s, or name a larger cluster with --address"
            )
    free = [dict(node) for node in nodes]
    for share in sorted(shares, key=lambda share: -share["CPU"]):
        fitting = [node for node in free if all(node.get(kind, 0.0) > there - 1e-6 for kind, there in share.items())]
        if not fitting:
            what = " and ".join(f"{there:g} {kind}s" for kind, there in share.items())
            raise CelError(
                f"the {len(shares) - 1} ranks of a trial do not fit on the {len(nodes)} machines of the Ray cluster, "
                f"where {what} for one of them cannot be had on one machine; lower sweep.cpus or sweep.ranks, or name "
                "another cluster with --address"
            )
        node = min(fitting, key=lambda node: node["CPU"])
        for kind, there in share.items():
            node[kind] -= there
