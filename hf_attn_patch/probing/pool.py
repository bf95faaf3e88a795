"""`Pool` and `Probe`: what pools the tokens of a frozen model into one vector, and the classifier on top of it.

Every pooling has one signature: ``pool(x)`` takes tokens [B, N, C] and gives [B, C'], ``pool.attend(x)`` gives the maps
[B, M, N] as well that say what was read. A head is a module with ``head(x)`` -> logits, ``head.attend(x)`` and
``head.loss(x, labels)``; `Probe` makes one of any pooling, ACMIL is one by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pool(nn.Module):
    """Tokens [B, N, C] -> one vector [B, C'].

    Attributes:
        out_features: C'. sums_to_one: False if rows of the maps are gates, or if a token that is none of `x` (a class
            token) takes a share of the attention.
    """

    sums_to_one = True

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled [B, C'], maps [B, M, N])."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Pooled [B, C']."""
        return self.attend(x)[0]


class Mean(Pool):
    """Plain mean of the tokens; its one map is uniform."""

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(1), x.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])


class Probe(nn.Module):
    """A pooling, batch norm without affine parameters, and one linear layer.

    Source: the heads of efficient probing (billpsomas/efficient-probing b8f4fb8, READ), which took the norm from MAE's
    linear probe: features of different models have very different scales, and one learning rate has to do.
    """

    def __init__(self, pool: Pool, classes: int, eps: float = 1e-6):
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm1d(pool.out_features, affine=False, eps=eps)
        self.classifier = nn.Linear(pool.out_features, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of tokens [B, N, C]."""
        return self.classifier(self.norm(self.pool(x)))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, classes], maps [B, M, N])."""
        pooled, maps = self.pool.attend(x)
        return self.classifier(self.norm(pooled)), maps

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """What training minimises, a 0-d tensor; labels as in `classification_loss`."""
        return classification_loss(self(x), labels)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for labels int64 [B]; for labels [B, classes] of zeros and ones, binary cross-entropy per class."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def read(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head attention of Q queries that returns its weights.

    Args:
        query: [B|1, Q, H * D]. key, value: [B, N, H * D] and [B, N, H * Dv]; heads may share one key and value of
            width D (multi-query attention).

    Returns:
        (output [B, Q, H * Dv], weights [B, H, Q, N])
    """
    q = split_heads(query, heads)
    shared = key.shape[-1] * heads == query.shape[-1] and heads > 1
    k, v = (split_heads(t, 1 if shared else heads) for t in (key, value))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class Mlp(nn.Sequential):
    """Linear, GELU, Linear, from C to C with `ratio` * C in between."""

    def __init__(self, width: int, ratio: float):
        inner = int(width * ratio)
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def learned(*shape: int) -> nn.Parameter:
    """A query or class token, normal with standard deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
