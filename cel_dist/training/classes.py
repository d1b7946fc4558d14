"""Class weights with the names of the speakers that they belong to, so that another run can take them over.

They lie in a checkpoint and not in a model folder: who embeds voices needs neither them nor the names.
"""

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cel_dist.config import Config
from cel_dist.description import DESCRIPTION_FILE, read_description
from cel_dist.errors import CelError
from cel_dist.losses.supervised import ClassificationHead
from cel_dist.training.checkpoint import MODEL, complete_checkpoints, folder_name

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.safetensors"

_NAMES = "speakers"


@dataclass(frozen=True)
class Classes:
    """C classes.

    Attributes:
        names: of the speakers, a speaker at another speed with the factor behind it.
        weights: by name, [C, D] (with sub-centres [C, k, D]) or [C], on the CPU.
    """

    names: Sequence[str]
    weights: dict[str, Tensor]

    def write(self, folder: Path) -> Path:
        """Write `classes.safetensors` into `folder`, and return its path. Raises OSError."""
        path = folder / CLASSES_FILE
        tensors = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        path.write_bytes(to_safetensors(tensors, metadata={_NAMES: json.dumps(list(self.names))}))
        return path


def class_names(config: Config, speakers: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes of a run with labels, in their order: the speakers, and with `labels.speeds_are_speakers`
    all of them once a speed."""
    if not config.labels.speeds_are_speakers:
        return tuple(speakers)
    return tuple(f"{name} x{speed:g}" if speed != 1 else name for speed in config.augment.speeds for name in speakers)


def read_classes(source: str) -> Classes:
    """The class weights of a checkpoint, or of a run: those of the checkpoint of its best model, if that is there, else
    of its newest one.

    Raises:
        CelError: `source` has none, or they are damaged.
    """
    path = _checkpoint_of(Path(source)) / CLASSES_FILE
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})[_NAMES])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileNotFoundError, NotADirectoryError):
        raise CelError(
            f"head.init={source} has no class weights ({path} is missing); name a checkpoint, or the run folder, of a "
            "run that classified speakers"
        ) from None
    except (OSError, SafetensorError, KeyError, ValueError, struct.error) as error:
        raise CelError(f"head.init={source}: {path} is damaged ({error}); name another checkpoint") from None
    return Classes(names, weights)


def require_head(config: Config, names: Sequence[str]) -> None:
    """Raise CelError if the head of the configuration cannot be made for these classes, or cannot begin as
    `head.init`.

    Args:
        config: of a run that classifies.
        names: of the classes.
    """
    similarity, num_classes = config.loss.similarity, len(names)
    if similarity == "adacos" and num_classes < 3:
        raise CelError(
            f"loss.similarity={similarity} adapts nothing to {num_classes} speakers; take arcface or cosface, or "
            "prepare more speakers"
        )
    initial_classes(config, names)


def initial_classes(config: Config, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """What `head.init` has of the classes of a run.

    Args:
        config: of a run that classifies.
        names: of its classes.

    Returns:
        Places [n] int64 among `names` of those that are known there, and their weights by name: [n, centres, D] or [n]
        on the CPU. Nothing, and no names, without `head.init`.

    Raises:
        CelError: as `read_classes`, the weights are of another loss or size, or no speaker is known.
    """
    source = config.head.init
    if source is None:
        return torch.empty(0, dtype=torch.int64), {}
    former = read_classes(source)
    centres = (config.head.sub_centres,) if config.head.sub_centres > 1 else ()
    shapes: dict[str, tuple[int, ...]] = {"weight": (*centres, config.encoder.embedding_dim)}
    if config.loss.similarity == "softmax":
        shapes["bias"] = ()
    found = {name: tuple(tensor.shape[1:]) for name, tensor in former.weights.items()}
    if found != shapes:
        raise CelError(
            f"head.init={source} has class weights of the form {_form(found)}, this run those of the form "
            f"{_form(shapes)}; take its loss.similarity, head.sub_centres and encoder.embedding_dim, or leave "
            "head.init out"
        )
    places = {name: place for place, name in enumerate(former.names)}
    known = [(place, places[name]) for place, name in enumerate(names) if name in places]
    if not known:
        raise CelError(
            f"head.init={source} has {len(former.names)} speakers, and none of them is in data.shards; leave head.init "
            "out, or name a run on the same speakers"
        )
    rows, sources = (torch.tensor(column) for column in zip(*known, strict=True))
    return rows, {name: tensor[sources] for name, tensor in former.weights.items()}


def take_over(loss: nn.Module, config: Config, names: Sequence[str]) -> None:
    """Give the classes of a run's head the weights that `initial_classes` finds, and say in the log how many have
    them. Raises as that."""
    rows, weights = initial_classes(config, names)
    head = loss.get_submodule("head")
    assert isinstance(head, ClassificationHead)
    head.load_class_weights(weights, rows)
    logger.info("%d of %d classes begin with the weights of head.init=%s", len(rows), len(names), config.head.init)


def _form(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {['classes', *shape]}".replace("'", "") for name, shape in sorted(shapes.items()))


def _checkpoint_of(source: Path) -> Path:
    if (source / CLASSES_FILE).exists():
        return source
    complete = complete_checkpoints(source / "checkpoints")
    if not complete:
        return source
    try:
        best = read_description(source / MODEL / DESCRIPTION_FILE).training.step
    except CelError:
        best = None
    by_name = {path.name: path for path in complete}
    return by_name.get(folder_name(best), complete[-1]) if best is not None else complete[-1]
