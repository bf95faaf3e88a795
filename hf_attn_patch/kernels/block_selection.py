"""From scores of key blocks to a `BlockLayout`: the best k, or a share of the mass, with sinks and own blocks forced.

Everything here works on [B, H, nq, nk] tensors of blocks, which are small; plain torch on any device.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .layout import BlockLayout
from .reference import masked_softmax

Per = Literal["query", "head"]


def forced_blocks(
    q_blocks: int,
    k_blocks: int,
    *,
    block_q: int,
    block_k: int,
    q_offset: int = 0,
    sinks: int = 0,
    recent: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """bool [q_blocks, k_blocks], blocks that are read whatever they score: the first `sinks` key blocks, and `recent`
    ending with the query block's own (1 = only the blocks that hold its own positions, 0 = not even those).
    ``block_q=1`` is for scores of single rows."""
    n = torch.arange(k_blocks, device=device)
    first = q_offset + torch.arange(q_blocks, device=device)[:, None] * block_q
    own = n <= (first + block_q - 1) // block_k
    near = own & (n > first // block_k - recent) if recent else torch.zeros_like(own)
    return near | (n < sinks)


def select_topk(scores: Tensor, k: int, *, always: Tensor | None = None, per: Per = "query") -> Tensor:
    """The `k` best key blocks per row, int32 [B, H, nq, K] with -1 for none.

    Args:
        scores: [B, H, nq, nk], -inf = may not be read. k: blocks per row, forced ones included (all forced blocks are
            kept even if they are more). always: bool [nq, nk], see `forced_blocks`.
        per: ``query`` ranks the blocks of each row; ``head`` ranks all (row, block) pairs of a head and keeps
            ``k * nq`` of them, so that rows get as many as they need (VMoBA's global selection).

    Raises:
        ValueError: unknown `per`.
    """
    allowed, forced = _allowed(scores, always, per)
    ranked = scores.masked_fill(forced, math.inf)
    ranked, count = (ranked, k) if per == "query" else (ranked.flatten(2), k * scores.shape[2])
    best = ranked.topk(min(count, ranked.shape[-1]), -1).indices
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True).reshape(scores.shape)
    return _indices((chosen | forced) & allowed)


def select_threshold(
    scores: Tensor,
    tau: float,
    *,
    always: Tensor | None = None,
    per: Per = "query",
    masses: Literal["given", "softmax", "minmax"] = "given",
    least: int = 0,
) -> Tensor:
    """The smallest set of key blocks that holds a share `tau` of the mass, int32 [B, H, nq, K] with -1 for none.

    Forced blocks come first and count; then the others by falling mass until the sum reaches `tau`. ``tau >= 1`` keeps
    every block that may be read, whatever rounding does.

    Args:
        scores: [B, H, nq, nk], -inf = may not be read. always: bool [nq, nk], see `forced_blocks`.
        per: the pool whose mass is shared: one row (``query``) or all rows of a head (``head``).
        masses: ``given`` scores are masses (`antidiagonal_scores`), ``softmax`` over each row, or ``minmax``
            (score - min) / (max - min) within the pool (VMoBA).
        least: non-forced blocks that are kept at least per pool (VMoBA's code keeps 1).

    Raises:
        ValueError: unknown `per` or `masses`, or negative masses were given.
    """
    allowed, forced = _allowed(scores, always, per)
    pool = (lambda x: x) if per == "query" else (lambda x: x.flatten(2))
    mass = scores.double()
    if masses == "given":
        if bool((allowed & (mass < 0)).any()):
            raise ValueError("negative masses: these are logits, pass masses='softmax' (or 'minmax')")
    elif masses == "softmax":
        mass = masked_softmax(mass, allowed)
    elif masses == "minmax":
        low = pool(mass.masked_fill(~allowed, math.inf)).amin(-1, keepdim=True)
        high = pool(mass).amax(-1, keepdim=True)
        mass = ((pool(mass) - low) / (high - low).clamp(min=1e-6)).reshape(scores.shape)
    else:
        raise ValueError(f"masses={masses!r} is unknown; choose one of given, softmax, minmax")
    mass, taken = pool(torch.where(allowed, mass, 0)), pool(forced)
    total = mass.sum(-1, keepdim=True)
    missing = tau * total - torch.where(taken, mass, 0).sum(-1, keepdim=True)
    falling, order = mass.masked_fill(taken, -1).sort(dim=-1, descending=True, stable=True)
    before = falling.clamp(min=0).cumsum(-1) - falling.clamp(min=0)
    wanted = before < missing
    wanted[..., :least] = True
    chosen = torch.zeros_like(taken).scatter(-1, order, wanted).reshape(scores.shape)
    return _indices(((chosen | forced) & allowed) if tau < 1 else allowed)


def _allowed(scores: Tensor, always: Tensor | None, per: Per) -> tuple[Tensor, Tensor]:
    if per not in ("query", "head"):
        raise ValueError(f"per={per!r} is unknown; choose query or head")
    allowed = scores > -math.inf
    return allowed, torch.zeros_like(allowed) if always is None else always & allowed


def _indices(chosen: Tensor) -> Tensor:
    """bool [B, H, nq, nk] -> rising indices int32 [B, H, nq, K], -1 after the last."""
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return torch.where(chosen.gather(-1, order), order, -1).int()


def layout_from_scores(
    scores: Tensor,
    q_len: int,
    kv_len: int,
    *,
    block_q: int,
    block_k: int,
    q_offset: int = 0,
    causal: bool = True,
    window: int | None = None,
    topk: int | None = None,
    threshold: float | None = None,
    sinks: int = 0,
    recent: int = 1,
    **selection: Any,
) -> BlockLayout:
    """`BlockLayout` of H heads from scores [B, H, nq, nk]: `select_topk` or `select_threshold`, as given, with
    `forced_blocks`; `selection` goes to the selection. Scores of single rows need ``block_q=1``.

    Raises:
        ValueError: both or none of `topk` and `threshold`.
    """
    if (topk is None) == (threshold is None):
        raise ValueError("give one of topk and threshold")
    always = forced_blocks(
        *scores.shape[2:],
        block_q=block_q,
        block_k=block_k,
        q_offset=q_offset,
        sinks=sinks,
        recent=recent,
        device=scores.device,
    )
    if topk is not None:
        indices = select_topk(scores, topk, always=always, **selection)
    else:
        assert threshold is not None
        indices = select_threshold(scores, threshold, always=always, **selection)
    return BlockLayout.from_topk(indices, q_len, kv_len, q_offset, causal, window, block_q, block_k)
