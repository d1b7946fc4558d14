"""From what a configuration or a `model.json` says of a network to the network and its front end: the one way there."""

from torch import nn

from cel_dist.config import Config
from cel_dist.description import EncoderDescription, FeatureDescription, ModelDescription, Provenance
from cel_dist.encoders import build_encoder, find_encoder, plugin_of
from cel_dist.errors import CelError
from cel_dist.features import LogMel


def describe(config: Config, training: Provenance | None = None) -> ModelDescription:
    """What a model of this configuration is, with `training` as its provenance.

    >>> from cel_dist.config_file import parse_config
    >>> config = parse_config({"data": {"shards": "s"}, "augment": {"profile": 0}}, "example")
    >>> describe(config).encoder.name, describe(config).features.num_mels
    ('fast_resnet34', 40)
    """
    chosen = config.encoder
    return ModelDescription(
        encoder=EncoderDescription(
            name=chosen.name,
            embedding_dim=chosen.embedding_dim,
            pooling=chosen.pooling,
            module=plugin_of(chosen.name),
        ),
        features=FeatureDescription(num_mels=config.features.num_mels),
        training=training or Provenance(),
    )


def new_network(description: ModelDescription) -> nn.Module:
    """The encoder that is described, with freshly drawn weights: features [B, M, F] to embeddings [B, D].

    Raises:
        CelError: the encoder is unknown, or the plug-in that it comes from cannot be imported.
    """
    encoder = description.encoder
    return build_encoder(
        encoder.name,
        encoder.embedding_dim,
        pooling=encoder.pooling,
        num_mels=description.features.num_mels,
        module=encoder.module,
    )


def front_end(description: ModelDescription) -> LogMel:
    """The front end that is described: waveforms [B, T] to features [B, M, F].

    Raises:
        CelError: torchaudio cannot be imported.
    """
    return LogMel(description.features.num_mels)


def require_same_network(found: ModelDescription, wanted: ModelDescription, source: str) -> None:
    """Refuse to take the weights of one network for another.

    Args:
        found: the model that the weights are of.
        wanted: the model that they are for.
        source: names the former in errors.

    Raises:
        CelError: encoder, embedding size, pooling or mel bands differ; all that do are named, with the settings to
            change. Some encoders have the same tensors for any number of bands, which alone would not tell.
    """
    pairs = {
        "encoder.name": (found.encoder.name, wanted.encoder.name),
        "encoder.embedding_dim": (found.encoder.embedding_dim, wanted.encoder.embedding_dim),
        "encoder.pooling": (_pooling(found.encoder), _pooling(wanted.encoder)),
        "features.num_mels": (found.features.num_mels, wanted.features.num_mels),
    }
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        was = ", ".join(f"{key}={former}" for key, (former, _) in differing.items())
        now = ", ".join(f"{key}={value}" for key, (_, value) in differing.items())
        raise CelError(f"{source} is a model with {was}, this run has {now}; set {was}, or name another model")


def _pooling(encoder: EncoderDescription) -> str:
    return find_encoder(encoder.name, encoder.module).pooling if encoder.pooling == "default" else encoder.pooling
