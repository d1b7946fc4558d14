"""The configuration of a run: typed, checked, and the only description of what can be set.

A YAML file holds what differs from the defaults below; `key=value` overrides use the same dotted paths. Every field
says what it does in its description, and combinations that cannot work are refused in `Config.check_combinations`.
"""

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cel_dist.errors import CelError


def _not_a_boolean(value: Any) -> Any:
    # Python counts true as 1, and YAML reads on, off, yes and no as true and false.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


NotABoolean = BeforeValidator(_not_a_boolean)
Whole = Annotated[int, NotABoolean]
Real = Annotated[float, NotABoolean]
Positive = Annotated[Whole, Field(gt=0)]
Decibels = Annotated[Real, Field(ge=-100, le=100)]
Range = tuple[Decibels, Decibels]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors, numbers are finite, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class RunSection(Section):
    """Where a run lives and what it is called."""

    dir: Path = Path("runs/cel")
    """Folder of the run: configuration, metrics, checkpoints, best model and report. One folder, one run."""
    name: str | None = None
    """Name of the run in MLflow. Default: the name of its folder."""


class DataSection(Section):
    """The stream of segment pairs."""

    shards: Path
    """Folder written by `cel prepare`."""
    bank: Path | None = None
    """Noise and room bank written by `cel prepare --bank`; profiles above 0 need one."""
    workers: Annotated[Whole, Field(ge=0, le=1024)] = 1
    """Reader processes per rank; 0 reads in the training process."""
    short: Literal["drop", "overlap", "repeat"] = "drop"
    """Utterances shorter than two segments: leave out, let the segments overlap, or repeat the audio until two fit."""
    num_speakers: Positive | None = None
    """An estimate of the number of speakers, for the expected rate of false negatives in the log; where the shards
    have labels it is counted. Training does not use it."""
    segment_frames: Annotated[Whole, Field(ge=16, le=60_000)] = 180
    """Length of a segment in frames of 10 ms; 180 frames are 29 040 samples."""


class AugmentSection(Section):
    """Augmentation of both views, with the published ranges."""

    profile: Annotated[Literal[0, 1, 2, 3], NotABoolean] = 3
    """0 none, 1 noise, 2 a room for a quarter of the segments and noise for the others, 3 room and noise."""
    noise_snr_db: Range = (0.0, 15.0)
    """SNR of noises."""
    speech_snr_db: Range = (13.0, 20.0)
    """SNR of other voices."""
    music_snr_db: Range = (5.0, 15.0)
    """SNR of music."""
    rir_gain_db: Range = (-7.0, 3.0)
    """Gain g of a room response; its amplitude is multiplied by 10^(0.1 g), as published."""


class EncoderSection(Section):
    """The network from features to an embedding."""

    name: str = "fast_resnet34"
    """Registered name of the encoder."""
    embedding_dim: Annotated[Whole, Field(gt=0, le=65_536)] = 512
    """Size D of the embedding."""
    views: Literal["separate", "joint"] = "separate"
    """One forward pass a view, so that batch-norm statistics are per view (published), or one joint pass."""
    batch_norm: Literal["global", "per_rank"] = "global"
    """Statistics of batch norm in training: of all ranks, or of each rank alone (published)."""
    init: str | None = None
    """A model (folder, checkpoint, published file or MLflow URI) whose encoder weights are the start."""


class LossSection(Section):
    """The equilibrium of a similarity loss and the uniformity loss."""

    similarity: Literal["angular_prototypical", "angular_contrastive", "prototypical", "ge2e"] = "angular_prototypical"
    """The loss that pulls the views of an utterance together."""
    pairs: Literal["pon", "apn", "an"] = "pon"
    """The pairs whose distance uniformity maximises: within a view, all, or all but the positives."""
    t: Annotated[Real, Field(gt=0)] = 2.0
    """Temperature of the uniformity loss."""
    lambda_s: Annotated[Real, Field(ge=0)] = 1.0
    """Weight of the similarity loss."""
    lambda_u: Annotated[Real, Field(ge=0)] = 1.0
    """Weight of the uniformity loss."""
    exchange: Literal["auto", "gather", "ring"] = "auto"
    """How a rank comes by the embeddings of the others: all at once, or block by block around a ring of neighbours,
    which takes less memory; `auto` gathers while that takes less than a tenth of what is free."""
    matmul: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the factors in the matrix products of the loss; sums are fp32 in any case."""


class TrainSection(Section):
    """How long, how large, how exact."""

    batch_size: Annotated[Whole, Field(ge=2)] = 200
    """Utterances in the global batch K, over all ranks."""
    epochs: Positive = 500
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many steps even if epochs are left."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Seed of everything that is drawn: initial weights, order, segments, augmentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Encoder arithmetic; bf16 is autocast, and features, loss and parameters stay fp32 in either case."""
    encode_chunks: Positive = 1
    """Parts in which a rank encodes its rows, for batches larger than its memory; above 1 it costs one more forward
    pass, and batch norm takes its statistics from a part."""
    threads: Annotated[Whole, Field(gt=0, le=4096)] | None = None
    """CPU threads of a rank. Default: the cores that the process may use, divided by the ranks of the machine."""
    log_every: Positive = 10
    """Steps between two lines in the log, `metrics.jsonl` and MLflow."""


class OptimSection(Section):
    """Adam and its learning rate."""

    lr: Annotated[Real, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["step", "cosine"] = "step"
    """`step` multiplies by `decay` every `decay_epochs` (published); `cosine` falls to `min_lr` at the last step."""
    decay: Annotated[Real, Field(gt=0, le=1)] = 0.95
    """Factor of the step schedule."""
    decay_epochs: Positive = 10
    """Epochs between two decays of the step schedule."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps of linear warm-up before either schedule."""
    min_lr: Annotated[Real, Field(ge=0)] = 0.0
    """Final learning rate of the cosine schedule."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Decoupled weight decay of the encoder; never applied to the loss parameters."""
    clip_norm: Annotated[Real, Field(ge=0)] = 0.0
    """Gradient norm to clip to; 0 is off."""


class EngineSection(Section):
    """DeepSpeed."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], NotABoolean] = 0
    """ZeRO stage: what is partitioned over the ranks (1 optimizer state, 2 gradients too, 3 parameters too)."""


class CheckpointSection(Section):
    """When a checkpoint is written and which are kept."""

    every_steps: Positive = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep, besides the best one."""


class EvalSection(Section):
    """Validation during training; the list that chooses the model must not be the test list."""

    trials: Path | None = None
    """Trials file (`label enrol test`); without one the last model is the best."""
    root: Path | None = None
    """Folder to which the paths in the trials file are relative."""
    every_epochs: Positive = 1
    """Epochs between two evaluations; there is always one after the last step."""
    at_start: bool = True
    """Evaluate the untrained encoder too."""


class TrackingSection(Section):
    """MLflow."""

    enabled: bool = True
    """Record the run in MLflow; `metrics.jsonl` is written in either case."""
    uri: str | None = None
    """Tracking server or database. Default: $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the current folder."""
    experiment: str = "cel"
    """Name of the experiment."""
    register_as: str | None = "cel"
    """Register the best encoder under this model name when training ends; null does not register it."""


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection = RunSection()
    data: DataSection
    augment: AugmentSection = AugmentSection()
    encoder: EncoderSection = EncoderSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def check_combinations(self) -> "Config":
        """Refuse what cannot work together, naming the field to change."""
        if self.augment.profile > 0 and self.data.bank is None:
            raise ValueError(
                f"augment.profile={self.augment.profile} needs data.bank; write one with 'cel prepare SRC --bank --out "
                "BANK' or set augment.profile=0"
            )
        for name in ("noise_snr_db", "speech_snr_db", "music_snr_db", "rir_gain_db"):
            low, high = getattr(self.augment, name)
            if low > high:
                raise ValueError(f"augment.{name}=({low}, {high}) is empty; write the lower bound first")
        if self.loss.lambda_s == 0 and self.loss.lambda_u == 0:
            raise ValueError("loss.lambda_s and loss.lambda_u are both 0, so nothing is learned; raise one of them")
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}; lower it")
        if (self.eval.trials is None) != (self.eval.root is None):
            raise ValueError("eval.trials and eval.root go together; set both or neither")
        return self

    @property
    def segment_samples(self) -> int:
        """Samples T of a segment: hop 160 a frame, and 240 for the rest of the last window."""
        return self.data.segment_frames * 160 + 240


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check the result.

    Args:
        path: the YAML file.
        overrides: dotted assignments such as `train.batch_size=64`; values are YAML.

    Raises:
        CelError: the file is missing, not text or not a mapping, an override is malformed, a key is there twice or
            unknown (the nearest valid one is named), a value has the wrong type or range, or two settings exclude each
            other.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CelError(f"cannot read the configuration {path}: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise CelError(f"the configuration {path} is not UTF-8 text; save it as UTF-8, or name a YAML file") from None
    try:
        tree = _read_yaml(text, (), str(path))
    except _YAML_ERRORS as error:
        raise CelError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise CelError(f"{path} holds a {type(tree).__name__}, not sections of settings; see configs/ for examples")
    for override in overrides:
        _assign(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Check a nested mapping of settings; `source` names it in errors. Raises CelError as `load_config` does."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_describe(detail) for detail in error.errors()[:5])
        raise CelError(f"configuration {source}: {problems}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one.

    >>> config = parse_config({"data": {"shards": "s"}, "augment": {"profile": 0}}, "example")
    >>> parse_config(yaml.safe_load(dump_config(config)), "again") == config
    True
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML without dates: no setting is one, and a run may well be named after the day."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class declares it so)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# The last three are what PyYAML lets through for a number or a tag that its own patterns accept and Python does not.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError)
_STRING_TAG = "tag:yaml.org,2002:str"
_SCALAR_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")


def _read_yaml(text: str, path: tuple[str, ...], source: str) -> Any:
    """The value of a YAML text that is to become the setting at `path`, or the whole tree if that is empty."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, path, source, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, path: tuple[str, ...], source: str, seen: set[int]) -> None:
    """Refuse keys that are there twice, and take numbers as written where text is wanted: `run.name: 007`."""
    # An alias leads to a node again, and may lead to itself.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            inner, line = (*path, str(key.value)), key.start_mark.line + 1
            if inner[-1] in lines:
                raise CelError(
                    f"{source}: '{'.'.join(inner)}' is set in line {lines[inner[-1]]} and again in line {line}; remove "
                    "one"
                )
            lines[inner[-1]] = line
            _check_node(value, inner, source, seen)
    elif node.tag in _SCALAR_TAGS and path in _text_settings():
        node.tag = _STRING_TAG


@cache
def _text_settings() -> frozenset[tuple[str, str]]:
    return frozenset(
        (section, name)
        for section, part in Config.model_fields.items()
        for name, field in part.annotation.model_fields.items()  # type: ignore[union-attr]
        if {str, Path} & {field.annotation, *get_args(field.annotation)}
    )


def _assign(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise CelError(f"override '{override}' is not of the form key=value, for example train.batch_size=64")
    *sections, leaf = key.split(".")
    try:
        value = _read_yaml(text, (*sections, leaf), f"override '{override}'")
    except _YAML_ERRORS:
        value = text
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise CelError(f"override '{override}': '{section}' is a value, not a section")
        node = child
    node[leaf] = value


def _describe(detail: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    path = ".".join(location)
    if detail["type"] == "extra_forbidden":
        valid = [".".join([*location[:-1], name]) for name in _fields_at(location[:-1])]
        nearest = difflib.get_close_matches(path, valid + _all_paths(), n=1, cutoff=0.0)
        return f"unknown key '{path}'; did you mean '{nearest[0]}'?"
    if detail["type"] == "missing":
        return f"'{path}' is required; set it in the file or as an override"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"'{path}': {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}"


def _fields_at(location: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in location:
        field = model.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _all_paths() -> list[str]:
    paths = []
    for name, field in Config.model_fields.items():
        candidates = [field.annotation, *get_args(field.annotation)]
        for section in candidates:
            if isinstance(section, type) and issubclass(section, BaseModel):
                paths += [f"{name}.{leaf}" for leaf in section.model_fields]
    return paths
