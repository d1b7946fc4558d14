"""Checkpoints of the published CEL implementation, translated to the names of this project."""

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError

_ENCODER_PREFIX = "__S__."
_LOSS_PREFIX = "__L__."
_LOSS_NAMES = ("w", "b")

# Published name -> name in FastResNet34, tried in this order on what follows the prefix.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^attention$", "pooling.context"),
        (r"^sap_linear\.", "pooling.hidden."),
        (r"^fc\.", "projection."),
        (r"^conv1\.", "stem."),
        (r"^bn1\.", "stem_norm."),
        (r"\.bn([12])\.", r".norm\1."),
        (r"\.se\.fc\.0\.", ".gate.squeeze."),
        (r"\.se\.fc\.2\.", ".gate.excite."),
        (r"\.downsample\.", ".shortcut."),
    )
)
_STAGE = re.compile(r"^layer([1-4])\.")


@dataclass(frozen=True)
class Published:
    """The weights of a published checkpoint.

    Attributes:
        encoder_state: state dict of `build_encoder("fast_resnet34", embedding_dim)`.
        loss_state: `w` and `b`, each of shape [1], as `EquilibriumLoss` names them; None if the loss had none.
        embedding_dim: size D of the embedding.
    """

    encoder_state: dict[str, Tensor]
    loss_state: dict[str, Tensor] | None
    embedding_dim: int


def read_published(path: str | Path) -> Published:
    """Read a `.model` file of the published implementation (Fast ResNet-34 with self-attentive pooling).

    The file is a state dict with the encoder under `__S__.`, the loss under `__L__.` and constants of its front end,
    which are left out. Only tensors are unpickled.

    Raises:
        CelError: the file cannot be read, is not such a state dict, or its tensors are not those of the encoder; the
            first missing, unknown or mis-shaped ones are named.
    """
    tensors = _load_tensors(path)
    encoder_state = {
        _translate(name.removeprefix(_ENCODER_PREFIX)): tensor
        for name, tensor in tensors.items()
        if name.startswith(_ENCODER_PREFIX)
    }
    if not encoder_state:
        raise CelError(
            f"{path} holds no published CEL encoder (no name starts with {_ENCODER_PREFIX}); give a .model file of "
            "the published implementation, or a model folder of this project"
        )
    projection = encoder_state.get("projection.weight")
    embedding_dim = projection.shape[0] if projection is not None and projection.ndim == 2 else 512
    loss_state = {name: tensors[_LOSS_PREFIX + name] for name in _LOSS_NAMES if _LOSS_PREFIX + name in tensors}
    _check(path, encoder_state, loss_state, embedding_dim)
    loss_state = {name: scalar.reshape(1) for name, scalar in loss_state.items()}
    return Published(encoder_state, loss_state or None, embedding_dim)


def _load_tensors(path: str | Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CelError(f"cannot read the model {path}: {error.strerror}; give the path of a .model file") from None
    # Depending on where the bytes stop making sense, torch.load fails in one of these ways.
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise CelError(
            f"{path} is not a state dict that torch can read, or is cut short ({type(error).__name__}); give a .model "
            "file of the published implementation"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CelError(f"{path} is not a state dict of tensors; give a .model file of the published implementation")
    return content


def _translate(name: str) -> str:
    name = _STAGE.sub(lambda match: f"stages.{int(match[1]) - 1}.", name)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _check(path: str | Path, state: dict[str, Tensor], loss_state: dict[str, Tensor], embedding_dim: int) -> None:
    # On the meta device, because only names and shapes are compared.
    with torch.device("meta"):
        expected = build_encoder("fast_resnet34", embedding_dim).state_dict()
    problems = [f"'{name}' is missing" for name in expected.keys() - state.keys()]
    problems += [f"'{name}' is unknown" for name in state.keys() - expected.keys()]
    problems += [
        f"'{name}' has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [
        f"loss parameter '{name}' has {scalar.numel()} values instead of 1"
        for name, scalar in loss_state.items()
        if scalar.numel() != 1
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CelError(
            f"{path} is not a Fast ResNet-34 of the published implementation: {', '.join(sorted(problems)[:3])}{more}; "
            "only this encoder, with self-attentive pooling, can be read"
        )
