"""Poolings that are a layer of cross-attention or a whole block: CLIP, SigLIP, CaiT, V-JEPA, CAE, a DINOv2 block.

All as compared in efficient probing, arXiv 2506.10178 (billpsomas/efficient-probing b8f4fb8: READ, golden vectors
RAN); what that code does differently from the methods it is named after is said in each class. Maps are [B, heads, N].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .light import divides
from .pool import Mlp, Pool, learned, read


class ClipPool(Pool):
    """The mean token attends to itself and all tokens, with learned positions (CLIP's ResNets, arXiv 2103.00020).

    Differs from CLIP: a layer norm first. tokens: N, because every position has a vector of its own.
    """

    sums_to_one = False

    def __init__(self, width: int, tokens: int, heads: int = 12, eps: float = 1e-6):
        super().__init__(width)
        self.heads, self.tokens = divides("clip", width, heads), tokens
        self.norm = nn.LayerNorm(width, eps=eps)
        self.positions = learned(tokens + 1, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.tokens:
            raise ValueError(
                f"clip: made for {self.tokens} tokens, got {x.shape[1]}: its positions are learned"
            )
        x = self.norm(x)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions
        q, k, v = self.qkv(x).chunk(3, -1)
        pooled, maps = read(q[:, :1], k, v, self.heads)
        return self.proj(pooled).squeeze(1), maps[:, :, 0, 1:]


class LatentPool(Pool):
    """A learned latent reads the tokens, then ``x + MLP(x)`` (SigLIP's head, arXiv 2303.15343).

    Differs from SigLIP: no norm before the MLP, because the code for probing passes none.
    """

    def __init__(self, width: int, heads: int = 12, ratio: float = 4.0):
        super().__init__(width)
        self.heads = divides("siglip", width, heads)
        self.query = learned(1, 1, width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, ratio)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        pooled, maps = read(self.q(self.query), k, v, self.heads)
        pooled = self.proj(pooled).squeeze(1)
        return pooled + self.mlp(pooled), maps.squeeze(2)


class ClassAttention(Pool):
    """A class token attends to itself and the tokens, with layer scale and an MLP (CaiT, arXiv 2103.17239)."""

    sums_to_one = False

    def __init__(
        self,
        width: int,
        heads: int = 12,
        ratio: float = 4.0,
        scale: float = 1e-5,
        eps: float = 1e-6,
        last_eps: float = 1e-5,
    ):
        super().__init__(width)
        self.heads = divides("cait", width, heads)
        self.query = learned(1, 1, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), scale)) for _ in range(2))
        self.mlp = Mlp(width, ratio)
        self.norm = nn.LayerNorm(width, eps=last_eps)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token = self.query.expand(len(x), -1, -1)
        both = self.norm1(torch.cat([token, x], 1))
        answer, maps = read(self.q(both[:, :1]), self.k(both), self.v(both), self.heads)
        token = token + self.scale1 * self.proj(answer)
        token = token + self.scale2 * self.mlp(self.norm2(token))
        return self.norm(token).squeeze(1), maps[:, :, 0, 1:]


class CrossBlock(Pool):
    """A learned query, not normalised, and a block of cross-attention and MLP with residuals (V-JEPA, 2404.08471)."""

    def __init__(self, width: int, heads: int = 12, ratio: float = 4.0, eps: float = 1e-5):
        super().__init__(width)
        self.heads = divides("vjepa", width, heads)
        self.query = learned(1, 1, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.mlp = nn.Linear(width, width), Mlp(width, ratio)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(self.norm1(x)).chunk(2, -1)
        answer, maps = read(self.q(self.query), k, v, self.heads)
        token = self.query + self.proj(answer)
        return (token + self.mlp(self.norm2(token))).squeeze(1), maps.squeeze(2)


class CaePool(Pool):
    """Cross-attention with a norm each for query, keys and values, no residual, no MLP (CAE, arXiv 2202.03026)."""

    def __init__(self, width: int, heads: int = 12, eps: float = 1e-5):
        super().__init__(width)
        self.heads = divides("cae", width, heads)
        self.query = learned(1, 1, width)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=eps) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.q(self.norm_q(self.query)), self.k(self.norm_k(x)), self.v(self.norm_v(x))
        answer, maps = read(q, k, v, self.heads)
        return self.proj(answer).squeeze(1), maps.squeeze(2)


class BlockPool(Pool):
    """One transformer block over the tokens, then their mean (as of DINOv2, arXiv 2304.07193).

    A map is the mean over tokens of what they read, so it sums to one.
    """

    def __init__(self, width: int, heads: int = 12, ratio: float = 4.0, eps: float = 1e-5):
        super().__init__(width)
        self.heads = divides("dino_block", width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj, self.mlp = nn.Linear(width, width), Mlp(width, ratio)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        answer, maps = read(q, k, v, self.heads)
        x = x + self.proj(answer)
        return (x + self.mlp(self.norm2(x))).mean(1), maps.mean(2)
