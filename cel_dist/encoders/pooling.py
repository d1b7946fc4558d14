"""Pooling over time: frames of any number to one vector an utterance."""

import torch
from torch import Tensor, nn


class SelfAttentivePooling(nn.Module):
    """Mean of the frames weighted by learned attention (SAP; Cai et al. 2018, arXiv 1804.05160, section 3.1).

    With frames x_f: h_f = tanh(W x_f + c), a = softmax over f of <h_f, u>, result sum_f a_f x_f. `hidden` is W and c,
    `context` is u.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels)
        self.context = nn.Parameter(torch.empty(channels, 1))
        nn.init.xavier_normal_(self.context)

    def forward(self, frames: Tensor) -> Tensor:
        """Pool frames [B, F, C] to [B, C]."""
        # Under autocast the softmax runs in fp32, and so does the sum: bf16 would round the many small weights.
        attention = torch.softmax(torch.tanh(self.hidden(frames)) @ self.context, dim=1)
        return (attention * frames).sum(dim=1)
