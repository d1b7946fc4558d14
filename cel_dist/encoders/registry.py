"""Encoders by name, so that a configuration and a saved model can say which network they mean."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from torch import nn

from cel_dist.encoders.pooling import POOLINGS
from cel_dist.errors import CelError
from cel_dist.plugins import Registry, load_plugins


class EncoderFactory(Protocol):
    """Builds an encoder from features [B, M, F] of M mel bands to embeddings [B, embedding_dim]."""

    def __call__(self, embedding_dim: int, *, pooling: str, num_mels: int) -> nn.Module:
        """Build the encoder with freshly drawn weights."""


class RegisteredEncoder(NamedTuple):
    """An encoder that `build_encoder` knows.

    Attributes:
        name: how a configuration calls it.
        source: the paper that it is from.
        pooling: the pooling of that paper, which it has where none is chosen.
        factory: builds it.
        min_rows: rows that a forward pass takes in training, at least.
    """

    name: str
    source: str
    pooling: str
    factory: EncoderFactory
    min_rows: int


_Factory = TypeVar("_Factory", bound=EncoderFactory)
_ENCODERS: Registry[RegisteredEncoder] = Registry("encoder", "cel_dist.encoders")


def register_encoder(name: str, *, source: str, pooling: str, min_rows: int = 1) -> Callable[[_Factory], _Factory]:
    """Class decorator that makes an encoder known as `name` to `build_encoder`.

    Args:
        name: how a configuration calls it.
        source: the paper that it is from, for `cel encoders`.
        pooling: the pooling that it has where none is chosen.
        min_rows: rows that a forward pass takes in training, at least; 2 for batch norm over the rows alone.

    Raises:
        ValueError: the name is taken, or there is no such pooling.
    """

    def register(factory: _Factory) -> _Factory:
        if pooling not in POOLINGS:
            raise ValueError(f"encoder '{name}': there is no pooling '{pooling}'")
        _ENCODERS.add(name, RegisteredEncoder(name, source, pooling, factory, min_rows))
        return factory

    return register


def encoder_names() -> list[str]:
    """Names that `build_encoder` knows, those of installed plug-ins among them, sorted."""
    return _ENCODERS.names()


def find_encoder(name: str, module: str | None = None) -> RegisteredEncoder:
    """What is known of an encoder.

    Args:
        name: registered name.
        module: the plug-in that registers it, as a saved model says; imported where the name is not known without.

    Raises:
        CelError: no encoder has this name (the nearest one is named), or its plug-in cannot be imported.
    """
    if module is not None and _ENCODERS.find(name) is None:
        load_plugins([module], f"which the model needs for its encoder '{name}'")
    return _ENCODERS.get(name)


def plugin_of(name: str) -> str | None:
    """The module that registers an encoder; None for those of this package. Raises as `find_encoder`."""
    module: str = find_encoder(name).factory.__module__
    return None if module.partition(".")[0] == "cel_dist" else module


def build_encoder(
    name: str, embedding_dim: int = 512, *, pooling: str | None = None, num_mels: int = 40, module: str | None = None
) -> nn.Module:
    """A freshly initialised encoder: features [B, num_mels, F] to embeddings [B, embedding_dim], not normalised.

    Args:
        name: registered name.
        embedding_dim: size D of the embedding.
        pooling: `tap`, `sap`, `stats` or `asp`; None or `default` is that of the encoder's paper.
        num_mels: mel bands M of the features.
        module: as in `find_encoder`.

    Raises:
        CelError: no encoder has this name (the nearest one is named), no pooling has that name, or a size is not
            positive.
    """
    registered = find_encoder(name, module)
    if embedding_dim < 1:
        raise CelError(
            f"encoder '{name}' cannot have embeddings of size {embedding_dim}; give a positive embedding_dim"
        )
    if num_mels < 1:
        raise CelError(f"encoder '{name}' cannot have features of {num_mels} mel bands; give a positive num_mels")
    chosen = registered.pooling if pooling in (None, "default") else pooling
    if chosen not in POOLINGS:
        raise CelError(
            f"unknown pooling '{chosen}' of encoder '{name}'; known poolings: default, {', '.join(POOLINGS)}"
        )
    return registered.factory(embedding_dim, pooling=chosen, num_mels=num_mels)
