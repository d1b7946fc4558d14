"""The source of a plug-in for tests: an encoder, an augmentation and a similarity loss."""

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F

from cel_dist.data.plugin_augment import register_augmentation
from cel_dist.encoders import register_encoder
from cel_dist.losses import Similarity, register_similarity


@register_encoder("PREFIXmean_mlp", source="a test", pooling="tap")
class MeanMlp(nn.Module):
    def __init__(self, embedding_dim, *, pooling, num_mels):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * num_mels, 32), nn.SiLU(), nn.Linear(32, embedding_dim))

    def forward(self, features):
        return self.layers(torch.cat([features[..., :9].mean(dim=-1), features.abs().mean(dim=-1)], dim=-1))


@register_augmentation("PREFIXgain")
class Gain:
    def __init__(self, decibels=6.0):
        if decibels <= 0:
            raise ValueError(f"decibels={decibels} is not above 0")
        self.decibels = decibels

    def __call__(self, segments, draws):
        gains = 10 ** (self.decibels * draws.uniform(1) / 20)
        return segments * gains + 30 * draws.normal(segments.shape[-1], per="row")


@register_similarity("PREFIXboth_views")
def both_views():
    def view(number):
        return lambda x: F.normalize(x[:, number], dim=-1)

    return Similarity(view(1), view(0))
"""
