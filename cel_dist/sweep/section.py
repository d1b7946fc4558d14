"""The section `sweep` of a configuration: what is searched, how, and with what."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from cel_dist.config import Config
from cel_dist.config_sections import Positive, Real, Section, Whole

# More whole numbers than these are not tried one by one.
_MOST_POINTS = 256
_GOLDEN = 0.381966


class Parameter(Section):
    """The values that a setting may take: exactly one of these."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these values."""
    uniform: tuple[Real, Real] | None = None
    """A number from the first to the second."""
    log_uniform: tuple[Real, Real] | None = None
    """The same, drawn evenly by its logarithm."""
    integer: tuple[Whole, Whole] | None = None
    """A whole number from the first to the second, both included."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("takes exactly one of choice, uniform, log_uniform, integer")
        if self.choice is None:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{given[0]}=[{low}, {high}] is empty; write the lower bound first")
            if self.log_uniform is not None and low <= 0:
                raise ValueError(f"log_uniform=[{low}, {high}] has no logarithm; bounds are above 0")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest number; of a `choice` there is none."""
        bounds = self.uniform or self.log_uniform or self.integer
        assert bounds is not None
        return bounds

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values by which it is known whether a configuration takes all: every one of a choice or of a short range of
        whole numbers, else the bounds and what lies between them, which is no whole number."""
        if self.points is not None and len(self.points) <= _MOST_POINTS:
            return self.points
        low, high = self.bounds
        between = low + (high - low) * _GOLDEN
        return (low, high, round(between) if self.integer is not None else between)

    def drawn(self, value: Any) -> Any:
        """A value from what a searcher calls it: one that is not a number, a word or nothing goes by its JSON, and
        numbers may be of types of their own."""
        if self.choice is not None:
            return next((own for own in self.choice if self.name_of(own) == value), value)
        return int(value) if self.integer is not None else float(value)

    def within(self, value: Any) -> Any:
        """The nearest value of these, for one that a scheduler has moved."""
        if self.choice is not None:
            return value
        low, high = self.bounds
        return min(max(round(value) if self.integer is not None else value, low), high)

    @staticmethod
    def name_of(value: Any) -> Any:
        """What a value of a choice is called by searchers, which take only what can be compared."""
        return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value

    @property
    def points(self) -> tuple[Any, ...] | None:
        """All values, if they can be counted."""
        if self.choice is not None:
            return self.choice
        return tuple(range(self.integer[0], self.integer[1] + 1)) if self.integer is not None else None


# Settings of one scheduler alone.
_SCHEDULERS = {"grace_epochs": ("asha", "median"), "reduction": ("asha",), "perturb_epochs": ("pbt",)}


class SweepSection(Section):
    """A search over settings."""

    space: Annotated[dict[str, Parameter], Field(min_length=1)]
    """What is searched: for each setting, by its dotted path, its values."""
    metric: Literal["eer", "min_dcf"] = "eer"
    """What is to be low, of the evaluations on `eval.trials`."""
    search: Literal["random", "grid", "tpe"] = "random"
    """How settings are drawn: at random, every combination once, or by the tree-structured Parzen estimator of Optuna,
    from the results so far."""
    trials: Positive | None = None
    """How many are drawn. Default: 20; with `grid`, as many as there are combinations."""
    scheduler: Literal["fifo", "asha", "median", "pbt"] = "asha"
    """Which trials go on: all; those in the best part of the ones that came as far (ASHA, Li et al. 2018, arXiv
    1810.05934); those better than the median of the averages so far (Golovin et al. 2017); or all, of which the worst
    take over weights and settings of the best on the way (PBT, Jaderberg et al. 2017, arXiv 1711.09846)."""
    grace_epochs: Positive = 1
    """Epochs that every trial gets (`asha`, `median`)."""
    reduction: Annotated[Whole, Field(ge=2)] = 3
    """Of so many trials one goes on at each rung, and rungs are so many times further (`asha`)."""
    perturb_epochs: Positive = 5
    """Epochs between two exchanges (`pbt`)."""
    ranks: Positive = 1
    """Ranks of a trial."""
    cpus: Annotated[Real, Field(ge=0.25)] = 1.0
    """Cores of a rank, and of the readers that it has."""
    gpus: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """GPUs of a rank: 1, or, for trials of one rank, the part of one that several trials share; 0 trains on cores."""
    concurrent: Positive | None = None
    """Most trials at once. Default: as many as there is room for."""
    retries: Annotated[Whole, Field(ge=0)] = 2
    """How often a trial that failed goes on from its newest checkpoint."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Seed of what is drawn."""

    @field_validator("space", mode="before")
    @classmethod
    def _with_dots(cls, space: Any) -> Any:
        """Sections within each other are as good as dotted paths, and are what an override makes."""
        return dict(_flatten(space)) if isinstance(space, Mapping) else space

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.search == "grid":
            endless = [key for key, parameter in self.space.items() if parameter.points is None]
            if endless:
                raise ValueError(
                    f"sweep.search=grid tries all values, and sweep.space.{endless[0]} has no end of them; give a "
                    "choice or an integer"
                )
            if self.trials is not None:
                raise ValueError("sweep.search=grid tries every combination once; leave out sweep.trials")
        if self.scheduler == "pbt" and self.search != "random":
            raise ValueError(
                f"sweep.scheduler=pbt changes settings by itself and goes with sweep.search=random, not {self.search}"
            )
        if self.scheduler == "pbt" and self.num_trials < 2:
            raise ValueError("sweep.scheduler=pbt compares trials; set sweep.trials to 2 or more")
        if self.scheduler == "pbt" and (self.concurrent or self.num_trials) < self.num_trials:
            raise ValueError(
                f"sweep.scheduler=pbt compares all {self.num_trials} trials on their way, and takes turns where there "
                "is no room for them; leave out sweep.concurrent"
            )
        for name, schedulers in _SCHEDULERS.items():
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and self.scheduler not in schedulers:
                raise ValueError(f"sweep.{name} is not used with sweep.scheduler={self.scheduler}; leave it out")
        if self.ranks > 1 and 0 < self.gpus < 1:
            raise ValueError(
                f"sweep.gpus={self.gpus}: trials may share a GPU, the {self.ranks} ranks of one may not; set "
                "sweep.gpus=1 or sweep.ranks=1"
            )
        return self

    def values_of(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by their paths, from what a searcher has drawn."""
        return {setting: parameter.drawn(drawn[setting]) for setting, parameter in self.space.items()}

    def drawn_as(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a searcher calls these settings; undoes `values_of`."""
        return {
            setting: parameter.name_of(values[setting]) if parameter.choice else values[setting]
            for setting, parameter in self.space.items()
        }

    @property
    def num_trials(self) -> int:
        """Trials in all."""
        if self.search != "grid":
            return self.trials or 20
        number = 1
        for parameter in self.space.values():
            number *= len(parameter.points or ())
        return number


class SweepConfig(Config):
    """The configuration of a sweep: that of a run, and the section `sweep`."""

    sweep: SweepSection


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> "list[tuple[str, Any]]":
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        is_section = isinstance(value, Mapping) and value and not set(value) & set(Parameter.model_fields)
        leaves += _flatten(value, f"{prefix}{name}.") if is_section else [(f"{prefix}{name}", value)]
    return leaves
