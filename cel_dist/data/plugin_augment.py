"""Augmentations of plug-ins on the training device, with random numbers that do not depend on the number of ranks."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cel_dist.copies import to_device
from cel_dist.data.randomness import Purpose, generator
from cel_dist.errors import CelError, RunError
from cel_dist.plugins import AUGMENTATIONS


class Draws:
    """Random numbers for this rank's rows of a global batch.

    They are drawn for the whole batch, from (seed, name of the augmentation, epoch, step), and cut: a row has the same
    ones on whichever rank it is, and again when a run is resumed. An augmentation draws from nothing else.

    Args:
        numbers: where they are drawn from.
        rows: the rows of this rank.
        batch_size: rows K of the global batch.
        num_views: V.
        device: where they are wanted.
    """

    def __init__(
        self, numbers: np.random.Generator, rows: slice, batch_size: int, num_views: int, device: torch.device
    ) -> None:
        self._numbers, self._rows, self._batch_size = numbers, rows, batch_size
        self._num_views, self._device = num_views, device

    def uniform(self, *shape: int, per: Literal["segment", "row"] = "segment") -> Tensor:
        """Numbers in [0, 1): float32 [B, V, *shape], or with `per="row"` [B, 1, *shape], which all views share."""
        return self._cut(self._numbers.random(self._size(shape, per), dtype=np.float32))

    def normal(self, *shape: int, per: Literal["segment", "row"] = "segment") -> Tensor:
        """Numbers of the standard normal distribution, in the form of `uniform`."""
        return self._cut(self._numbers.standard_normal(self._size(shape, per), dtype=np.float32))

    def _size(self, shape: tuple[int, ...], per: str) -> tuple[int, ...]:
        return (self._batch_size, self._num_views if per == "segment" else 1, *shape)

    def _cut(self, whole: np.ndarray) -> Tensor:
        return to_device(whole[self._rows], self._device)


class Augmentation(Protocol):
    """What a registered factory returns; an `nn.Module` is moved to the training device."""

    def __call__(self, segments: Tensor, draws: Draws) -> Tensor:
        """Segments [B, V, T] float32 on int16 scale to others of the same form, on the same device."""


_Factory = TypeVar("_Factory", bound=Callable[..., Augmentation])


def register_augmentation(name: str) -> Callable[[_Factory], _Factory]:
    """Decorator that makes an augmentation known as `name` to `augment.extra`.

    It is for a class or function that takes the settings as keywords, and returns an `Augmentation`. It raises
    ValueError for settings that it cannot use.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        AUGMENTATIONS.add(name, factory)
        return factory

    return register


def new_augmentation(name: str, settings: Mapping[str, Any]) -> Augmentation:
    """The augmentation of `augment.extra` with its settings.

    Raises:
        CelError: nothing has this name, or it does not take these settings.
    """
    factory = AUGMENTATIONS.get(name)
    where = f"augment.extra.{name}"
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        takes = ", ".join(inspect.signature(factory).parameters) or "none"
        raise CelError(f"{where}: {error}; its settings are: {takes}") from None
    try:
        augmentation: Augmentation = factory(**settings)
        return augmentation
    except (ValueError, TypeError) as error:
        raise CelError(f"{where}: {error}; change its settings") from None


class PluginAugment(nn.Module):
    """The augmentations of `augment.extra`, one after the other.

    Args:
        extra: settings by registered name.
        seed: seed of all that is drawn.

    Raises:
        CelError: as `new_augmentation`.
    """

    def __init__(self, extra: Mapping[str, Mapping[str, Any] | None], seed: int) -> None:
        super().__init__()
        self._augmentations = {name: new_augmentation(name, settings or {}) for name, settings in extra.items()}
        # Registered, so that their buffers follow to the device.
        self._modules_among_them = nn.ModuleList(
            part for part in self._augmentations.values() if isinstance(part, nn.Module)
        )
        self._seed = seed

    def forward(self, segments: Tensor, *, epoch: int, step: int, rows: slice, batch_size: int) -> Tensor:
        """Augment this rank's rows of a global batch.

        Args:
            segments: [B, V, T] float32 on int16 scale, on the device to work on.
            epoch: epoch of the batch.
            step: step of the batch in its epoch.
            rows: the rows that these segments are of the global batch.
            batch_size: rows K of the global batch.

        Returns:
            [B, V, T] float32.

        Raises:
            RunError: an augmentation returned something of another form.
        """
        for name, augmentation in self._augmentations.items():
            stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            numbers = generator(self._seed, Purpose.PLUGIN, epoch, step, stream)
            draws = Draws(numbers, rows, batch_size, segments.shape[1], segments.device)
            augmented = augmentation(segments, draws)
            form = (augmented.shape, augmented.dtype, augmented.device)
            if form != (segments.shape, segments.dtype, segments.device):
                raise RunError(
                    f"the augmentation '{name}' made {list(augmented.shape)} {augmented.dtype} on "
                    f"{augmented.device} of {list(segments.shape)} {segments.dtype} on {segments.device}; "
                    "it must keep the form"
                )
            segments = augmented
        return segments
