"""Encoders by name, so that a configuration and a saved model can say which network they mean."""

import difflib
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import nn

from cel_dist.errors import CelError


class EncoderFactory(Protocol):
    """Builds an encoder from features [B, 40, F] to embeddings [B, embedding_dim]."""

    def __call__(self, embedding_dim: int) -> nn.Module:
        """Build the encoder with freshly drawn weights."""


_Factory = TypeVar("_Factory", bound=EncoderFactory)
_ENCODERS: dict[str, EncoderFactory] = {}


def register_encoder(name: str) -> Callable[[_Factory], _Factory]:
    """Class decorator that makes an encoder known as `name` to `build_encoder`.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        if name in _ENCODERS:
            raise ValueError(f"two encoders are called '{name}'")
        _ENCODERS[name] = factory
        return factory

    return register


def encoder_names() -> list[str]:
    """Names that `build_encoder` knows, sorted."""
    return sorted(_ENCODERS)


def build_encoder(name: str, embedding_dim: int = 512) -> nn.Module:
    """A freshly initialised encoder: features [B, 40, F] to embeddings [B, embedding_dim], not normalised.

    Raises:
        CelError: no encoder has this name (the nearest one is named), or `embedding_dim` is not positive.
    """
    if name not in _ENCODERS:
        valid = encoder_names()
        nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
        raise CelError(f"unknown encoder '{name}'; did you mean '{nearest}'? Known encoders: {', '.join(valid)}")
    if embedding_dim < 1:
        raise CelError(
            f"encoder '{name}' cannot have embeddings of size {embedding_dim}; give a positive embedding_dim"
        )
    return _ENCODERS[name](embedding_dim=embedding_dim)
