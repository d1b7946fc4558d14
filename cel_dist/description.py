"""What is known of a trained encoder besides its tensors: the content of a model folder's `model.json`."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from cel_dist.back_end import ScoreNorm, Scoring
from cel_dist.errors import CelError

DESCRIPTION_FILE = "model.json"

_FORMAT = "cel_dist.model"
_VERSION = 2
"""1 knew neither back ends nor calibrations with durations. A description of it means the same today. Fields of the
provenance do not count: they change nothing that is computed, and those that a version does not know it leaves out."""


class _Part(BaseModel):
    # NaN and infinity are not JSON numbers; as strings they survive the way to disk and back.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class EncoderDescription(_Part):
    """Which network the tensors belong to."""

    name: str
    embedding_dim: int = Field(gt=0)
    pooling: Literal["default", "tap", "sap", "stats", "asp"] = "default"
    module: str | None = None
    """The plug-in that registers the encoder, which has to be installed where the model is loaded, or to lie in the
    working folder. None: it ships with this package."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Former versions read the models of encoders that they know, and refuse a key that they do not.
        tree: dict[str, Any] = handler(self)
        if self.module is None:
            del tree["module"]
        return tree


class FeatureDescription(_Part):
    """The front end the encoder was trained on; the values are those of `cel_dist.features.LogMel`."""

    kind: str = "log_mel"
    sample_rate_hz: int = 16_000
    num_mels: Literal[40, 80] = 40
    fft_size: int = 512
    window_samples: int = 400
    hop_samples: int = 160
    low_hz: float = 0.0
    high_hz: float = 8000.0
    log_floor: float = 1e-6
    normalisation: str = "instance"

    @model_validator(mode="after")
    def _known(self) -> "FeatureDescription":
        for name, field in FeatureDescription.model_fields.items():
            if name != "num_mels" and getattr(self, name) != field.default:
                raise ValueError(f"{name}={getattr(self, name)!r}, but this version computes {name}={field.default!r}")
        return self


class Calibration(_Part):
    """Scores to log-likelihood ratios: slope * score + offset + duration_slope * log(seconds / reference_seconds)."""

    slope: float
    offset: float
    quality: Literal["duration"] | None = None
    """What besides the score counts. `duration`: the seconds of the shorter utterance. None: nothing; the last term is
    zero."""
    duration_slope: float = 0.0
    reference_seconds: float = Field(default=1.0, gt=0)
    """The shorter duration that is usual in the list it was fitted on (geometric mean)."""
    trials: str | None = None
    """Name of the list of trials it was fitted on."""
    trials_sha256: str | None = None
    """Which trials these were, so that an evaluation on the same ones can say so."""

    def log_likelihood_ratio(self, score: float, seconds: float | None = None) -> float:
        """How much likelier the score is for one speaker than for two: the natural logarithm of the ratio.

        Args:
            score: of the pair.
            seconds: of the shorter utterance; without effect where `quality` is None.

        Raises:
            CelError: the calibration needs durations and there is none.
        """
        if seconds is None:
            return float(self.log_likelihood_ratios(np.array([score]))[0])
        return float(self.log_likelihood_ratios(np.array([score]), np.array([seconds]))[0])

    def log_likelihood_ratios(
        self, scores: NDArray[np.float64], seconds: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """As `log_likelihood_ratio`, of M pairs: all [M]."""
        ratios = self.slope * scores + self.offset
        return ratios + self.duration_slope * self._log_duration(seconds) if self.quality else ratios

    def compensated(
        self, scores: NDArray[np.float64], seconds: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Scores as if the shorter utterance had the reference duration, [M]: the threshold is one of these."""
        # Scores that say nothing about the speaker cannot stand for a duration.
        if not self.quality or self.slope <= 0:
            return scores
        return scores + self.duration_slope / self.slope * self._log_duration(seconds)

    def probability(self, score: float, seconds: float | None = None) -> float:
        """Probability in (0, 1) that a pair with this score is one speaker, at equal priors.

        Raises as `log_likelihood_ratio`.

        >>> Calibration(slope=2.0, offset=1.0).probability(-0.5)
        0.5
        """
        # tanh, unlike exp, does not overflow for any score.
        return 0.5 + 0.5 * math.tanh(0.5 * self.log_likelihood_ratio(score, seconds))

    def _log_duration(self, seconds: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if seconds is None:
            raise CelError(
                "this model's probabilities depend on the duration of the shorter utterance; give audio, not embeddings"
            )
        logarithms: NDArray[np.float64] = np.log(seconds / self.reference_seconds)
        return logarithms


class BackEndDescription(_Part):
    """What scoring needs besides the embeddings; its arrays are in `back_end.safetensors`."""

    mean_subtracted: bool = False
    """Whether the mean of a cohort is taken off all embeddings before they are compared."""
    score_norm: ScoreNorm | None = None
    top_n: int = Field(default=300, ge=2)
    """Of the norm `as`."""
    cohort: str | None = None
    """Name of the list the arrays come from."""


class MeasuredOn(_Part):
    """The list of trials that error rates are of, and what their intervals rest on."""

    trials: str
    trials_sha256: str
    """Which trials these were; the same as that of a calibration on them."""
    num_trials: int
    speakers: int | None = None
    """Speakers that were drawn from for the intervals. None: there are none, because who speaks is not known."""
    replicates: int | None = None
    """How often they were."""


class Provenance(_Part):
    """Where the weights come from: enough to repeat the training, and what was measured then."""

    model_config = ConfigDict(extra="ignore")

    source: str = "cel_dist.train"
    config: dict[str, Any] = Field(default_factory=dict)
    step: int | None = None
    epoch: float | None = None
    utterances: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    """Error rates on the validation list: `eer`, a fraction, and `min_dcf` at the prior 0.05."""
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """95 % intervals of `metrics`, for another choice of speakers."""
    measured_on: MeasuredOn | None = None
    data_sha256: dict[str, str] = Field(default_factory=dict)
    """Of the files that say what the data hold: `shards` of `manifest.json`, `bank` of `bank.json`. They name the
    sha256 of all the rest."""
    code: str | None = None
    """As `code_version` says it."""
    versions: dict[str, str] = Field(default_factory=dict)


class ModelDescription(_Part):
    """Everything about a model but its tensors; the content of `model.json`."""

    format: Literal["cel_dist.model"] = "cel_dist.model"
    version: Literal[2] = 2
    encoder: EncoderDescription
    features: FeatureDescription = Field(default_factory=FeatureDescription)
    scoring: Scoring = "negative_euclidean"
    """The score of two unit embeddings before any norm: minus their Euclidean distance, 0 at best and -2 at worst; or
    their cosine."""
    back_end: BackEndDescription | None = None
    """None: the score is that of the embeddings as they are."""
    threshold: float | None = None
    """Whole-utterance scores at or above it mean the same speaker; with a calibration that knows durations, scores
    compensated by it. None: never measured."""
    calibration: Calibration | None = None
    """Turns whole-utterance scores into probabilities. None: never measured."""
    training: Provenance = Field(default_factory=Provenance)


def read_description(path: Path) -> ModelDescription:
    """Read a `model.json`.

    Raises:
        CelError: the file is missing or damaged, its format version is newer than this one, or it describes what this
            version cannot compute.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CelError(f"{path.parent} holds no {DESCRIPTION_FILE}; give a model folder") from None
    except OSError as error:
        raise CelError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except ValueError as error:
        raise CelError(f"{path} is not valid JSON ({error}); copy or export the model again") from None
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise CelError(f"{path} does not describe a model of this project (format '{_FORMAT}')")
    version = tree.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CelError(f"{path} has format version {version}, this cel_dist reads up to {_VERSION}; update cel_dist")
    try:
        return ModelDescription.model_validate({**tree, "version": _VERSION} if version == 1 else tree)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise CelError(f"{path}: '{place}': {detail['msg']}; export the model again") from None
