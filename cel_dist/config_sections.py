"""The settings of a run, section by section, each with what it does; `config` has what must fit together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _not_a_boolean(value: Any) -> Any:
    # Python counts true as 1, and YAML reads on, off, yes and no as true and false.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def is_registrable(name: str) -> bool:
    """Whether MLflow's registry takes this name for a model, and `models:/NAME@alias` can hold it.

    >>> is_registrable("cel"), is_registrable("cel/2")
    (True, False)
    """
    is_plain = name == name.strip() and name.isprintable() and 0 < len(name) <= 250
    # MLflow takes them for paths.
    is_path = name == "." or name.startswith("..")
    return is_plain and not is_path and not set(name) & set("/:@")


def _registrable(name: str) -> str:
    if not is_registrable(name):
        raise PydanticCustomError("name", "Input should be the name of a model, without '/', ':' and '@'")
    return name


NotABoolean = BeforeValidator(_not_a_boolean)
Whole = Annotated[int, NotABoolean]
Real = Annotated[float, NotABoolean]
Positive = Annotated[Whole, Field(gt=0)]
Decibels = Annotated[Real, Field(ge=-100, le=100)]
Range = tuple[Decibels, Decibels]
Speed = Annotated[Real, Field(ge=0.5, le=2)]


ENCODERS = (*("ecapa_tdnn_1024", "ecapa_tdnn_512", "fast_resnet34", "resnet34", "tdnn", "vggvox"),)
SIMILARITIES = ("angular_prototypical", "angular_contrastive", "prototypical", "ge2e")
CLASSIFIERS = ("softmax", "cosface", "arcface", "adacos")


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
    plugins: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")], ...] = ()
    """Python modules that register encoders, augmentations or similarity losses, as `my_package.my_module`: installed,
    or files in the working folder. Packages with entry points need not be named."""


class DataSection(Section):
    """The stream of segment pairs."""

    shards: Annotated[str, Field(min_length=1)]
    """Folder written by `cel prepare`, or the URL of one: `http://`, `https://`, `s3://` or `file://`."""
    bank: Path | None = None
    """Noise and room bank written by `cel prepare --bank`; profiles above 0 need one."""
    workers: Annotated[Whole, Field(ge=0, le=1024)] | None = None
    """Reader processes per rank; 0 reads in the training process. Default: 1; on a CPU none for local shards of
    WAV, of which a batch takes milliseconds to read, and a process seconds to start."""
    prefetch_mib: Annotated[Real, Field(ge=0)] = 64.0
    """About how much the reader processes of a rank read ahead, in shared memory; each reads at least a batch ahead."""
    window_shards: Positive = 16
    """Shards whose utterances are shuffled together. An epoch goes through the shards window by window, in another
    order and with other windows each time; more need more cache where shards are remote."""
    remainder: Literal["drop", "wrap"] = "drop"
    """The end of an epoch that does not fill a batch: leave it out, or fill up from the beginning of the epoch."""
    max_fault_rate: Annotated[Real, Field(ge=0, le=1)] = 0.001
    """Share of a rank's utterances of an epoch that may be unreadable, rounded up; beyond it training stops."""
    verify: Literal["size", "sha256"] = "size"
    """What is compared with the manifest before local shards are read; downloaded ones are always compared whole."""
    cache_dir: Path | None = None
    """Folder on a disk of the machine for shards that are remote or compressed; all processes of it share one.
    Default: `~/.cache/cel_dist`."""
    cache_gib: Annotated[Real, Field(gt=0)] = 50.0
    """Most that the cache may hold; what was longest unused goes first."""
    patience_seconds: Annotated[Real, Field(gt=0)] = 300.0
    """Seconds without any progress after which a download is given up."""
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
    speeds: Annotated[tuple[Speed, ...], Field(min_length=1)] = (1.0,)
    """Speeds at which utterances are played, for example 0.9, 1.0 and 1.1; one of them is drawn for each utterance of a
    batch. All its segments share it, because another speed is another voice: the pitch changes, too."""
    time_masks: Annotated[Whole, Field(ge=0, le=100)] = 0
    """SpecAugment: stretches of frames of every segment's features that are set to 0, the mean; 0 is off."""
    time_mask_frames: Positive = 5
    """Most frames of such a stretch; the number is drawn from 0 on."""
    freq_masks: Annotated[Whole, Field(ge=0, le=100)] = 0
    """SpecAugment: ranges of mel bands of every segment's features that are set to 0; 0 is off."""
    freq_mask_bands: Positive = 10
    """Most mel bands of such a range; the number is drawn from 0 on."""
    extra: dict[str, dict[str, Any] | None] = {}
    """Augmentations of plug-ins, by their registered names, each with its own settings; they follow speed, room and
    noise, in this order."""


class FeaturesSection(Section):
    """The front end: log-mel spectrogram, FFT 512, Hann window 400, hop 160, instance norm over time."""

    num_mels: Annotated[Literal[40, 80], NotABoolean] = 40
    """Mel bands between 0 and 8000 Hz; 40 as published."""


class EncoderSection(Section):
    """The network from features to an embedding."""

    name: Annotated[str, Field(json_schema_extra={"anyOf": [{"enum": [*ENCODERS]}, {"type": "string"}]})] = (
        "fast_resnet34"
    )
    """Registered name of the encoder; `cel encoders` lists them, those of plug-ins among them."""
    embedding_dim: Annotated[Whole, Field(gt=0, le=65_536)] = 512
    """Size D of the embedding."""
    pooling: Literal["default", "tap", "sap", "stats", "asp"] = "default"
    """From frames to one vector: their mean, the mean by self-attention, mean and standard deviation, or these by
    attention. `default` is that of the encoder's paper."""
    views: Literal["separate", "joint"] = "separate"
    """One forward pass a view, so that batch-norm statistics are per view (published), or one joint pass."""
    batch_norm: Literal["global", "per_rank"] = "global"
    """Statistics of batch norm in training: of all ranks, or of each rank alone (published)."""
    init: str | None = None
    """A model (folder, checkpoint, published file or MLflow URI) whose encoder weights are the start."""


class LabelsSection(Section):
    """Training with the speakers of the shards: batches of N speakers x M utterances, a segment of each."""

    use: bool = False
    """Train with labels. Off, nothing that trains knows who speaks."""
    utterances: Positive = 2
    """Utterances M of a speaker in a batch, which has train.batch_size / M speakers."""
    max_segments: Positive = 100
    """Most utterances of a speaker in an epoch, others each time."""
    too_few: Literal["repeat", "drop"] = "repeat"
    """Speakers with fewer than M utterances: take other segments of the same ones, or leave the speakers out."""
    speeds_are_speakers: bool = False
    """Count a voice at another speed (`augment.speeds`) as the voice of another speaker, for a loss that classifies."""


class HeadSection(Section):
    """Class weights and margin of the losses that classify: softmax, cosface, arcface, adacos."""

    margin: Annotated[Real, Field(ge=0, lt=2)] = 0.2
    """Margin of `cosface` (of the cosine) and `arcface` (of the angle, in radians)."""
    margin_from_epoch: Annotated[Real, Field(ge=0)] = 0.0
    """Epoch up to which the margin is 0."""
    margin_until_epoch: Annotated[Real, Field(ge=0)] = 0.0
    """Epoch from which the margin is `margin`; it grows linearly between the two."""
    scale: Annotated[Real, Field(gt=0)] = 30.0
    """Scale of the cosines of `cosface` and `arcface`."""
    sub_centres: Positive = 1
    """Centres of a speaker (`cosface`, `arcface`), of which the nearest counts; more take noisy labels apart."""
    weights: Literal["replicated", "sharded"] = "replicated"
    """Class weights whole on every rank (or cut up by ZeRO), or on each rank those of some classes, outside of ZeRO:
    then no step sends them or takes room for all; a checkpoint, which has them with the names, does for a moment."""
    init: str | None = None
    """A checkpoint of a run with labels, or its run folder, whose class weights are the start of the speakers that it
    has, by name; new ones are drawn."""


class LossSection(Section):
    """The equilibrium of a similarity loss and the uniformity loss."""

    similarity: Annotated[
        str, Field(json_schema_extra={"anyOf": [{"enum": [*SIMILARITIES, *CLASSIFIERS]}, {"type": "string"}]})
    ] = "angular_prototypical"
    """The loss that pulls the views of an utterance together, or with `labels.use` the utterances of a speaker:
    `angular_prototypical`, `angular_contrastive`, `prototypical`, `ge2e`, or one of a plug-in. `softmax`, `cosface`,
    `arcface` and `adacos` classify speakers, and need labels."""
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
    """Precision of the factors in the matrix products of the loss; sums are fp32 in any case. Those of `prototypical`
    are fp64 whatever is chosen."""


class TrainSection(Section):
    """How long, how large, how exact."""

    batch_size: Annotated[Whole, Field(ge=2)] = 200
    """Utterances in the global batch K, over all ranks; with labels those of all its speakers."""
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
    pass, and batch norm normalises by the statistics of a part; its running statistics move by the mean of the parts,
    once a step."""
    max_skipped_steps: Annotated[Whole, Field(ge=0)] = 10
    """Batches in a row that may be skipped because their loss or gradient is not finite; one more stops training."""
    threads: Annotated[Whole, Field(gt=0, le=4096)] | None = None
    """CPU threads of a rank. Default: the cores that the process may use, divided by the ranks of the machine."""
    log_every: Positive = 10
    """Steps between two lines in the log, `metrics.jsonl` and MLflow."""
    profile_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps of which rank 0 writes a profiler trace to `profile/` of the run folder, once the first few are over; 0 is
    off."""


class OptimSection(Section):
    """Adam and its learning rate."""

    lr: Annotated[Real, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    head_lr: Annotated[Real, Field(gt=0)] | None = None
    """Peak learning rate of the parameters of the loss (class weights, w, b), on the same schedule. Default: `lr`.
    `prototypical` has none."""
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
    start_timeout_seconds: Annotated[Real, Field(gt=0, le=604_800)] = 1800.0
    """Seconds within which all ranks must have joined, and their first step be done; also the limit where one rank may
    work for all, as at the end of an evaluation."""
    step_timeout_seconds: Annotated[Real, Field(gt=0, le=604_800)] = 600.0
    """Seconds that ranks wait, after the first step, for one that lives but does not come on: then the run ends and
    names it."""
    peer_timeout_seconds: Annotated[Real, Field(gt=0, le=86_400)] = 30.0
    """Seconds without a sign of life from a rank after which its machine or the network counts as lost: the run ends
    and names it. A process that is killed is noticed at once."""


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
    metadata: Path | None = None
    """Table of the utterances of `trials` (`path` and any of speaker, session, sex, seconds, age): errors by these for
    the best model, in `evaluation/diagnostics.json` and the report."""
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
    parent_run: str | None = None
    """MLflow run that this one belongs to, as a trial to its sweep."""
    register_as: Annotated[str, AfterValidator(_registrable)] | None = "cel"
    """Register the best encoder under this model name when training ends; null does not register it."""
    system_metrics: bool = False
    """Record load, memory, disk, network and GPUs of rank 0's machine as `system/...` in MLflow and
    `system_metrics.jsonl`."""
    system_metrics_seconds: Annotated[Real, Field(gt=0)] = 10.0
    """Seconds between two samples of them."""
