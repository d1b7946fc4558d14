"""Networks from features to speaker embeddings. Importing this package registers those that ship with it."""

from cel_dist.encoders.ecapa_tdnn import EcapaTdnn, EcapaTdnn512, EcapaTdnn1024
from cel_dist.encoders.fast_resnet34 import FastResNet34
from cel_dist.encoders.pooling import (
    AttentiveStatisticsPooling,
    SelfAttentivePooling,
    StatisticsPooling,
    TemporalAveragePooling,
)
from cel_dist.encoders.registry import build_encoder, encoder_names, find_encoder, plugin_of, register_encoder
from cel_dist.encoders.resnet34 import ResNet34
from cel_dist.encoders.tdnn import Tdnn
from cel_dist.encoders.vggvox import VggVox

__all__ = [
    "AttentiveStatisticsPooling",
    "EcapaTdnn",
    "EcapaTdnn512",
    "EcapaTdnn1024",
    "FastResNet34",
    "ResNet34",
    "SelfAttentivePooling",
    "StatisticsPooling",
    "Tdnn",
    "TemporalAveragePooling",
    "VggVox",
    "build_encoder",
    "encoder_names",
    "find_encoder",
    "plugin_of",
    "register_encoder",
]
