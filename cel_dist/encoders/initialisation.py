"""How the weights of convolutions begin, in networks that see the spectrogram as a picture."""

from torch import nn


def initialise_convolutions(network: nn.Module) -> None:
    """Draw the weights of all its 2D convolutions by He et al. 2015 (arXiv 1502.01852, section 2.2), scaled for the
    gradient."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
