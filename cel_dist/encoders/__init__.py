"""Networks from features to speaker embeddings. Importing this package registers those that ship with it."""

from cel_dist.encoders.fast_resnet34 import FastResNet34
from cel_dist.encoders.pooling import SelfAttentivePooling
from cel_dist.encoders.registry import build_encoder, encoder_names, register_encoder

__all__ = ["FastResNet34", "SelfAttentivePooling", "build_encoder", "encoder_names", "register_encoder"]
