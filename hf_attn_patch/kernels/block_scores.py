"""Scores of key blocks: which keys would matter, before any of them is read (`block_selection` makes a layout of it).

Two scorers, neither of which builds an L x S tensor on a GPU:

- `pooled_scores`: a query (or the mean query of a block) against the mean key of a block (MoBA, arXiv 2502.13189;
  VMoBA, arXiv 2506.23858), or against an upper bound of the products in a block (Quest, arXiv 2406.10774).
- `antidiagonal_scores`: softmax over groups of `stride` tokens that are compared along their anti-diagonal, summed per
  block (XAttention, arXiv 2503.16428).

Positions count from the first real token of a batch row, as in `BlockLayout`: with left padding (`starts`), block 0 of
row b begins at column ``starts[b]``. Scores are for a hard selection: no gradient flows through any of this.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import masked_softmax


def _use_triton(x: Tensor, impl: str) -> bool:
    """True if `impl` (auto | torch | triton) means the Triton operations for tensors like `x`."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl={impl!r} is unknown; choose one of auto, torch, triton")
    if impl == "torch" or (impl == "auto" and x.device.type != "cuda"):
        return False
    try:
        from .triton import launch
    except ImportError:
        reason: str | None = "triton is not installed"
    else:
        reason = launch.is_available(x.device)
        if reason is None and (x.dtype == torch.float64 or x.shape[-1] > 256):
            reason = f"heads of dimension {x.shape[-1]} in {x.dtype}; kernels take up to 256 and no float64"
    if reason is not None and impl == "triton":
        raise RuntimeError(f"impl='triton' cannot score blocks: {reason}")
    return reason is None


def _wide(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _blocks(x: Tensor, block: int, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` cut into blocks, ([B, H, n, block, D], which tokens exist bool [B|1, 1, n, block, 1])."""
    tokens = x.shape[2]
    at = torch.arange(-(-tokens // block) * block, device=x.device)[None]
    at = at if starts is None else at + starts.long()[:, None]
    real = at < tokens
    x = x[torch.arange(x.shape[0], device=x.device)[:, None], :, at.clamp(max=tokens - 1)].transpose(1, 2)
    return x.unflatten(2, (-1, block)), real.reshape(len(real), 1, -1, block, 1)


def block_means(x: Tensor, block: int, starts: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Mean of the real tokens of each block (0 if there are none), fp32 [B, H, ceil(N / block), D].

    Args:
        x: [B, H, N, D]. block: tokens. starts: int32 [B], first real column of each batch row; None = 0.
    """
    if _use_triton(x, impl):
        from .triton import pooling

        return pooling.block_means(x.detach(), block, starts)
    cut, real = _blocks(_wide(x), block, starts)
    return (cut * real).sum(3) / real.sum(3).clamp(min=1)


def block_extremes(
    x: Tensor, block: int, starts: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(minima, maxima) per channel over the real tokens of each block (0 if there are none); see `block_means`."""
    if _use_triton(x, impl):
        from .triton import pooling

        return pooling.block_extremes(x.detach(), block, starts)
    cut, real = _blocks(_wide(x), block, starts)
    low, high = cut.masked_fill(~real, math.inf).amin(3), cut.masked_fill(~real, -math.inf).amax(3)
    some = real.any(3)
    return torch.where(some, low, 0), torch.where(some, high, 0)


def _places(q_len: int, kv_len: int, q_offset: int, starts: Tensor | None, device: torch.device) -> Any:
    """Per batch row (int64 [B|1]): padding before the first real query, position of that query, real keys."""
    start = torch.zeros(1, dtype=torch.long, device=device) if starts is None else starts.long()
    return (start - q_offset).clamp(min=0), (q_offset - start).clamp(min=0), kv_len - start


def _by_kv_head(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, n, D] times y [B, Hkv, m, D] -> [B, H, n, m] without repeating y."""
    return (x.reshape(y.shape[0], y.shape[1], -1, x.shape[3]) @ y.mT).reshape(*x.shape[:3], y.shape[2])


def pooled_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    q_offset: int = 0,
    causal: bool = True,
    reduce: Literal["mean", "none"] = "mean",
    pool: Literal["mean", "minmax"] = "mean",
    starts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scores of key blocks from pooled keys, fp32 [B, H, nq, nk] (nq = L for ``reduce="none"``).

    -inf where the key block lies entirely in the future of the query block, or one of the two has no real token.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. block_q, block_k: tokens per block. q_offset: column of query 0.
        reduce: ``mean`` scores the mean query of each block, ``none`` every query row (MoBA; rows stay in place).
        pool: ``mean`` s = q . mean(k); ``minmax`` s = sum_d max(q_d min_d, q_d max_d), which no q . k of the block
            exceeds (Quest). starts: int32 [B], first real column of each batch row.

    Raises:
        ValueError: unknown `reduce`, `pool` or `impl`.
    """
    if reduce not in ("mean", "none") or pool not in ("mean", "minmax"):
        raise ValueError(f"reduce={reduce!r}, pool={pool!r}: choose mean or none, and mean or minmax")
    padding, position, k_real = _places(query.shape[2], key.shape[2], q_offset, starts, query.device)
    if reduce == "mean":
        rows = block_means(query, block_q, None if starts is None else padding.int(), impl)
        first = torch.arange(rows.shape[2], device=query.device) * block_q
        real = query.shape[2] - padding[:, None]
        last = position[:, None] + torch.minimum(first + block_q, real) - 1
        exists = first < real
    else:
        rows = _wide(query)
        last = torch.arange(query.shape[2], device=query.device) - padding[:, None] + position[:, None]
        exists = last >= position[:, None]
    if pool == "mean":
        scores = _by_kv_head(rows, block_means(key, block_k, starts, impl).to(rows.dtype))
    else:
        low, high = (x.to(rows.dtype) for x in block_extremes(key, block_k, starts, impl))
        scores = _by_kv_head(rows.clamp(min=0), high) + _by_kv_head(rows.clamp(max=0), low)
    begin = torch.arange(scores.shape[3], device=query.device) * block_k
    seen = exists[:, :, None] & (begin < k_real[:, None])[:, None]
    if causal:
        seen = seen & (begin <= last[:, :, None])
    return (scores * scale).masked_fill(~seen[:, None], -math.inf)


def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    stride: int,
    scale: float,
    q_offset: int = 0,
    causal: bool = True,
    starts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """XAttention's estimate of the attention mass of each block, fp32 [B, H, ceil(L / block), ceil(S / block)].

    ``s_ac = scale / stride * sum_t q[a stride + stride - 1 - t] . k[c stride + t]`` for groups a, c of `stride` tokens
    (missing tokens of a last group count as 0), p = softmax over the c that begin no later than a ends (the whole
    group: within the diagonal group later keys take part), summed over the groups of each block. A row of blocks sums
    to the number of its query groups; blocks in the future have mass 0.

    Differs from the original code: any batch size, GQA, `q_offset` that is not a multiple of `block`, and the mass is
    fp32 (there the probabilities are rounded to the query's dtype first).

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. block: tokens per block, both sides. stride: divides `block` (8, 16).

    Raises:
        ValueError: `stride` does not divide `block`; with ``impl="triton"`` also if a block does not hold a power of
            two of groups, at most 64 (``auto`` takes torch then).
    """
    if block % stride:
        raise ValueError(f"stride={stride} does not divide block={block}")
    if _use_triton(query, impl):
        from .triton import block_scores as kernels

        if impl == "triton" or kernels.why_not_antidiagonal(block, stride) is None:
            q, k = query.detach(), key.detach()
            return kernels.antidiagonal(q, k, block, stride, scale, q_offset, causal, starts)
    padding, position, k_real = _places(query.shape[2], key.shape[2], q_offset, starts, query.device)

    def groups(
        x: Tensor, first: Tensor | None, flip: bool
    ) -> Tensor:  # [B, H, blocks * block / stride, stride * D]
        cut, real = _blocks(_wide(x), block, first)
        cut = (cut * real).flatten(2, 3).unflatten(2, (-1, stride))
        return (cut.flip(3) if flip else cut).flatten(3)

    a = groups(query, None if starts is None else padding, flip=True)
    c = groups(key, starts, flip=False)
    begin = torch.arange(c.shape[2], device=query.device) * stride
    ends = (torch.arange(a.shape[2], device=query.device) + 1) * stride
    q_real = query.shape[2] - padding[:, None]
    seen = (ends - stride < q_real)[:, :, None] & (begin < k_real[:, None])[:, None]
    if causal:
        seen = seen & (begin <= (position[:, None] + torch.minimum(ends, q_real) - 1)[:, :, None])
    probs = masked_softmax(_by_kv_head(a, c) * (scale / stride), seen[:, None])
    per = block // stride
    return probs.unflatten(3, (-1, per)).sum(4).unflatten(2, (-1, per)).sum(3)
