"""`cbam`: gates per channel and per place instead of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .pool import Pool


class Cbam(Pool):
    """``mean(relu(x + s(x c(x)) x c(x)))``: channel gate c, then spatial gate s of a convolution, on the patch grid.

    Source: CBAM, arXiv 1807.06521, as compared in efficient probing, arXiv 2506.10178 (b8f4fb8: READ, golden vectors
    RAN). c = sigmoid(MLP(mean) + MLP(max)), s = sigmoid(BN(conv7([mean, max]))). Maps [B, 1, N]
    are s, no probabilities.

    Args:
        tokens: N, a square. reduction: of the channels inside the MLP. kernel: of the convolution.
    """

    sums_to_one = False

    def __init__(self, width: int, tokens: int, reduction: int = 16, kernel: int = 7):
        super().__init__(width)
        self.side = math.isqrt(tokens)
        if self.side**2 != tokens:
            raise ValueError(f"cbam: {tokens} tokens are no square grid")
        inner = max(width // reduction, 1)
        self.channel = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False)
        )
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.side**2:
            raise ValueError(f"cbam: made for {self.side**2} tokens, got {x.shape[1]}")
        gated = x * self.gate(x)[:, None]
        plane = torch.stack([gated.mean(-1), gated.amax(-1)], 1).unflatten(-1, (self.side, self.side))
        place = self.norm(self.conv(plane)).sigmoid().flatten(2)
        return (x + gated * place.transpose(1, 2)).relu().mean(1), place

    def gate(self, x: Tensor) -> Tensor:
        """Channel gate [B, C]."""
        return (self.channel(x.mean(1)) + self.channel(x.amax(1))).sigmoid()
