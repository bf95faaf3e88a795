"""`acmil_mha`: ACMIL whose branches are layers of multi-head attention with one learned query each."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .acmil import Bag, Branches
from .pool import split_heads


class Reader(nn.Module):
    """What attention weights read of tokens, projected and normalised: ``LN(dropout(W_o [A_1 V_1; …; A_H V_H]))``."""

    def __init__(self, inner: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.value, self.proj = nn.Linear(inner, inner), nn.Linear(inner, inner)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(inner, eps=1e-6)

    def forward(self, h: Tensor, attention: Tensor) -> Tensor:
        """[B, inner] of tokens h [B, N, inner] and weights [B, H, 1, N]."""
        read = (attention @ split_heads(self.value(h), self.heads)).transpose(1, 2).flatten(2)
        return self.norm(self.dropout(self.proj(read))).squeeze(1)


class Branch(Reader):
    """A `Reader` with a learned query that makes the weights."""

    def __init__(self, inner: int, heads: int, dropout: float):
        super().__init__(inner, heads, dropout)
        # next to nothing, as there: what sets branches apart at the start is the bias of their own projection
        self.token = nn.Parameter(1e-6 * torch.randn(1, 1, inner))
        self.query, self.key = nn.Linear(inner, inner), nn.Linear(inner, inner)

    def scores(self, h: Tensor) -> Tensor:
        """[B, H, 1, N] of tokens h [B, N, inner]."""
        q, k = (split_heads(t, self.heads) for t in (self.query(self.token), self.key(h)))
        return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


class AcmilMha(Branches):
    """T branches of multi-head attention with a classifier each; the bag reads with the mean of their attentions.

    Source: Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, arXiv 2311.07125,
    class ACMIL_MHA; dazhangyu123/ACMIL e53d19c (READ; golden vectors RAN).

    Formula: h = relu(W x); branch t with a learned query q_t has scores s_th = (W_q q_t)_h . (W_k h)_h / sqrt(D) in
    head h of width D and reads LN(dropout(W_o [softmax(s_th) (W_v h)_h]_h)), no residual. The bag reads likewise, with
    values and projections of its own and the weights mean_t softmax(s_th) per head. Masking as in `acmil`, in each
    head of each branch by itself.

    Loss: that of `acmil`; the cosine is a mean over heads too.

    Differs from the original code: batches and labels as in `acmil`; the number of heads is free (8 there).

    Args:
        width: C of the tokens. classes: of the logits. branches: T. hide, drop: see `acmil`. inner: width of h.
        branch_heads: H. dropout: of what is read, in training.

    Raises:
        ValueError: `inner` is not a multiple of `branch_heads`.
    """

    def __init__(
        self, width: int, classes: int, branches: int = 5, hide: int = 10, drop: float = 0.6, inner: int = 128,
        branch_heads: int = 8, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(branches, hide, drop)
        if branch_heads < 1 or inner % branch_heads:
            raise ValueError(
                f"acmilmha: inner={inner} is no multiple of branch_heads={branch_heads}; choose heads that divide it"
            )
        self.reduce = nn.Linear(width, inner, bias=False)
        self.attentions = nn.ModuleList(Branch(inner, branch_heads, dropout) for _ in range(branches))
        self.whole = Reader(inner, branch_heads, dropout)
        self.classifiers(inner, classes, branches)

    def run(self, x: Tensor, uniform: Tensor | None = None) -> Bag:
        h = self.reduce(x).relu()
        own = cast("list[Branch]", self.attentions)
        raw = torch.cat([branch.scores(h) for branch in own], 2)
        scores = self.masked(raw, uniform)
        attention = scores.softmax(-1)
        weights = attention.split(1, 2)
        read = torch.stack([branch(h, w) for branch, w in zip(own, weights)], 1)
        bag = self.whole(h, attention.mean(2, keepdim=True))
        return Bag(raw, scores, self.bag(bag), self.answers(read))
