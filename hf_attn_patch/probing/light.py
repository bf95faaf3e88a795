"""Poolings with few parameters or none: AbMILP, SimPool and its projection-free form, AIM, CoCa.

All as compared in efficient probing, arXiv 2506.10178 (billpsomas/efficient-probing b8f4fb8: READ, golden vectors
RAN). What that code does differently from the methods it is named after is said in each class.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from .pool import Pool, learned, read


class AbMilp(Pool):
    """A scorer per token: ``a = softmax_n(w . tanh(W x_n))``, pooled = sum a_n x_n; maps [B, 1, N].

    Source: attention-based MIL pooling, arXiv 1802.04712, as used for probing in arXiv 2412.03215. self_attention:
    ``both`` (that code's default) scores and pools tokens that have attended to each other (one head, no residual),
    ``map`` scores those and pools the raw ones, ``none``.
    """

    def __init__(self, width: int, self_attention: Literal["none", "map", "both"] = "both"):
        super().__init__(width)
        if self_attention not in ("none", "map", "both"):
            raise ValueError(f"abmilp: self_attention={self_attention!r} is none of none, map, both")
        self.self_attention = self_attention
        if self_attention != "none":
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.proj = nn.Linear(width, width)
        self.scorer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = x
        if self.self_attention != "none":
            q, k, v = self.qkv(x).chunk(3, -1)
            mixed = self.proj(read(q, k, v, 1)[0])
        maps = self.scorer(mixed).transpose(1, 2).softmax(-1)
        return (maps @ (mixed if self.self_attention == "both" else x)).squeeze(1), maps


class SimPool(Pool):
    """The mean token asks, normalised tokens answer: ``softmax((W_q mean(x)) (W_k LN(x))^T D^-1/2) LN(x)``.

    Source: SimPool, arXiv 2309.06891. projections=False: eSimPool, whose only parameters are those of the layer norm:
    query LN(mean(x)), keys LN(x), values x, in `heads` heads (12 there). Maps [B, heads, N].
    """

    def __init__(self, width: int, heads: int = 1, projections: bool = True, eps: float = 1e-6):
        super().__init__(width)
        self.heads = divides(type(self).__name__, width, heads)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False) if projections else None
        self.key = nn.Linear(width, width, bias=False) if projections else None

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, tokens = x.mean(1, keepdim=True), self.norm(x)
        if self.query is not None and self.key is not None:
            pooled, maps = read(self.query(mean), self.key(tokens), tokens, self.heads)
        else:
            pooled, maps = read(self.norm(mean), tokens, x, self.heads)
        return pooled.squeeze(1), maps.squeeze(2)


class Aim(Pool):
    """Learned query, keys and values of batch-normalised tokens, no output projection; maps [B, heads * queries, N].

    Source: the attentive probe of AIM, arXiv 2401.08541. Several queries are averaged.
    """

    def __init__(self, width: int, heads: int = 12, queries: int = 1, eps: float = 1e-6):
        super().__init__(width)
        self.heads = divides("aim", width, heads)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=eps)
        self.query = learned(1, queries, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(x.transpose(1, 2)).transpose(1, 2)
        pooled, maps = read(self.query, self.key(tokens), self.value(tokens), self.heads)
        return pooled.mean(1), maps.flatten(1, 2)


class CoCa(Pool):
    """A learned, normalised query; its heads share one key and one value of width `head_width`; maps [B, heads, N].

    Source: the attentional pooler of CoCa, arXiv 2205.01917. The code for probing learns 196 queries and uses the
    output of the first; so one is learned here.
    """

    def __init__(self, width: int, heads: int = 8, head_width: int = 64, eps: float = 1e-5):
        super().__init__(width)
        self.heads = heads
        self.query = learned(1, 1, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.kv = nn.Linear(width, 2 * head_width, bias=False)
        self.proj = nn.Linear(heads * head_width, width, bias=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        pooled, maps = read(self.q(self.norm(self.query)), k, v, self.heads)
        return self.proj(pooled).squeeze(1), maps.squeeze(2)


def divides(name: str, width: int, heads: int) -> int:
    """`heads`, if they divide the width.

    Raises:
        ValueError: they do not.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: {heads} heads do not divide features of width {width}; give heads=")
    return heads
