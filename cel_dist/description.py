"""What is known of a trained encoder besides its tensors: the content of a model folder's `model.json`."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cel_dist.errors import CelError

DESCRIPTION_FILE = "model.json"

_FORMAT = "cel_dist.model"
_VERSION = 1


class _Part(BaseModel):
    # NaN and infinity are not JSON numbers; as strings they survive the way to disk and back.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class EncoderDescription(_Part):
    """Which network the tensors belong to."""

    name: str
    embedding_dim: int = Field(gt=0)
    pooling: Literal["default", "tap", "sap", "stats", "asp"] = "default"


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
    """Probability of the same speaker at equal priors: sigmoid(slope * score + offset)."""

    slope: float
    offset: float

    def probability(self, score: float) -> float:
        """Probability in (0, 1) that a pair with this score is one speaker.

        >>> Calibration(slope=2.0, offset=1.0).probability(-0.5)
        0.5
        """
        # tanh, unlike exp, does not overflow for any score.
        return 0.5 + 0.5 * math.tanh(0.5 * (self.slope * score + self.offset))


class Provenance(_Part):
    """Where the weights come from: enough to repeat the training, and what was measured then."""

    source: str = "cel_dist.train"
    config: dict[str, Any] = Field(default_factory=dict)
    step: int | None = None
    epoch: float | None = None
    utterances: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


class ModelDescription(_Part):
    """Everything about a model but its tensors; the content of `model.json`."""

    format: Literal["cel_dist.model"] = "cel_dist.model"
    version: Literal[1] = 1
    encoder: EncoderDescription
    features: FeatureDescription = Field(default_factory=FeatureDescription)
    scoring: Literal["negative_euclidean"] = "negative_euclidean"
    """The score of two unit embeddings is minus their Euclidean distance: 0 at best, -2 at worst."""
    threshold: float | None = None
    """Whole-utterance scores at or above it mean the same speaker. None: never measured."""
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
        return ModelDescription.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise CelError(f"{path}: '{place}': {detail['msg']}; export the model again") from None
