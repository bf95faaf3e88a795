"""Linear attention and the window + linear hybrid in chunks: plain torch, differentiable, memory linear in length.

Sums run in fp32 (float64 for float64 inputs). Arguments are those of `kernels.linear`, already checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import per_query_head

State = tuple[Tensor, Tensor]
CHUNK = 64


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: fp32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def divide(out: Tensor, total: Tensor, eps: float = 0.0) -> Tensor:
    """out / (total + eps), 0 where the total is exactly 0."""
    return torch.where(total == 0, 0, out / torch.where(total == 0, 1, total + eps))


def linear_state(
    fk: Tensor, value: Tensor, key_mask: Tensor | None = None, initial_state: State | None = None
) -> State:
    """State of the keys `fk` [B, Hf, S, F], `value` [B, Hkv, S, Dv] on top of `initial_state`, e.g. of those that have
    left a window: (kv [B, Hf, F, Dv], k_sum [B, Hf, F])."""
    fk, value = _masked(fk, value, key_mask)
    fk, value = fk.to(accumulator(fk.dtype)), value.to(accumulator(value.dtype))
    kv, k_sum = fk.mT @ per_query_head(value, fk.shape[1]), fk.sum(2)
    return (kv, k_sum) if initial_state is None else (initial_state[0] + kv, initial_state[1] + k_sum)


def _masked(fk: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if key_mask is None:
        return fk, value
    padding = ~key_mask.bool()[:, None, :, None]
    return fk.masked_fill(padding, 0), value.masked_fill(padding, 0)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, L, E] -> [B, H, chunks, size, E], zero-padded."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size))


def _state_before_chunks(fk: Tensor, value: Tensor, initial_state: State | None) -> State:
    """From chunks [B, Hf, n, C, .]: (kv [B, Hf, n + 1, F, Dv], k_sum [B, Hf, n + 1, F]); the last is the final one."""
    kv, k_sum = fk.mT @ value, fk.sum(3)
    first = (torch.zeros_like(kv[:, :, 0]), torch.zeros_like(k_sum[:, :, 0]))
    kv0, k_sum0 = first if initial_state is None else (s.to(kv.dtype) for s in initial_state)
    return torch.cat([kv0[:, :, None], kv], 2).cumsum(2), torch.cat([k_sum0[:, :, None], k_sum], 2).cumsum(2)


def chunked_linear(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    causal: bool,
    normalise: bool,
    eps: float,
    key_mask: Tensor | None,
    initial_state: State | None,
    chunk: int = CHUNK,
) -> tuple[Tensor, State]:
    """`linear.linear_attention` with states between chunks; query heads that share features are stacked as rows."""
    dtype, wide = value.dtype, accumulator(value.dtype)
    B, H, L, _ = fq.shape
    Hf = fk.shape[1]
    fk, value = _masked(fk.to(wide), value.to(wide), key_mask)
    fq = fq.to(wide)
    if not causal:
        kv, k_sum = linear_state(fk, value, initial_state=initial_state)
        rows = fq.reshape(B, Hf, -1, fq.shape[3])
        out, total = rows @ kv, rows @ k_sum[..., None]
        out = divide(out, total, eps) if normalise else out
        return out.reshape(B, H, L, -1).to(dtype), (kv, k_sum)
    value = per_query_head(value, Hf)
    fqs, fks, values = (_in_chunks(x, chunk) for x in (fq, fk, value))
    kv, k_sum = _state_before_chunks(fks, values, initial_state)
    group = H // Hf
    rows = fqs.unflatten(1, (Hf, group)).transpose(2, 3).flatten(3, 4)  # [B, Hf, n, group * C, F]
    weights = (rows @ fks.mT).unflatten(3, (group, chunk)).tril().flatten(3, 4)
    out = weights @ values + rows @ kv[:, :, :-1]
    if normalise:
        out = divide(out, weights.sum(-1, keepdim=True) + rows @ k_sum[:, :, :-1, :, None], eps)
    out = out.unflatten(3, (group, chunk)).transpose(2, 3).reshape(B, H, -1, out.shape[-1])[:, :, :L]
    return out.to(dtype), (kv[:, :, -1].contiguous(), k_sum[:, :, -1].contiguous())


def window_start(rows: Tensor, window: int, mode: str, shift: int = 0) -> Tensor:
    """First key of the window of each row (may be negative): sliding: the last `window` keys; terrace: the block before
    the own one, on a grid of blocks that starts `shift` positions before 0."""
    if mode == "sliding":
        return rows - window + 1
    return ((rows + shift) // window - 1) * window - shift


def hybrid_weights(
    scores: Tensor, features: Tensor, in_window: Tensor, before: Tensor, g: Tensor, l: Tensor
) -> Tensor:
    """Unnormalised weights [B, H, L, S]: g exp(s - max over the window) in the window, l a before it, else 0."""
    top = scores.masked_fill(~in_window, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    soft = (scores - top).masked_fill(~in_window, -torch.inf).exp()
    g, l = (f.to(scores.dtype)[:, None, None] for f in (g, l))
    return g * soft + l * features.masked_fill(~before, 0)


def chunked_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor,
    l: Tensor,
    key_mask: Tensor | None,
    scale: float,
    window: int,
    mode: str,
    shift: int,
    chunk: int = CHUNK,
) -> Tensor:
    """`linear.window_linear_attention`: chunk by chunk of rows, keys between the chunk boundary before the first window
    and the rows one by one, the older ones through the state at that boundary."""
    dtype, wide = value.dtype, accumulator(value.dtype)
    query, key, value, fq, fk = (x.to(wide) for x in (query, key, value, fq, fk))
    H, L, S = query.shape[1], query.shape[2], key.shape[2]
    fk, value = _masked(fk, value, key_mask)
    key = key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0)
    kv, k_sum = _state_before_chunks(
        _in_chunks(fk, chunk), _in_chunks(per_query_head(value, fk.shape[1]), chunk), None
    )
    parts = []
    for first in range(0, L, chunk):
        rows = torch.arange(S - L + first, S - L + min(first + chunk, L), device=key.device)[:, None]
        here = slice(first, first + chunk)
        begin = max(0, int(window_start(rows[0], window, mode, shift))) // chunk
        keys = slice(begin * chunk, int(rows[-1]) + 1)
        cols = torch.arange(keys.start, keys.stop, device=key.device)
        visible = (cols <= rows)[None, None]
        if key_mask is not None:
            visible = visible & key_mask[:, None, None, keys]
        start = window_start(rows, window, mode, shift)
        weights = hybrid_weights(
            query[:, :, here] @ per_query_head(key[:, :, keys], H).mT * scale,
            fq[:, :, here] @ per_query_head(fk[:, :, keys], H).mT,
            visible & (cols >= start),
            visible & (cols < start),
            g,
            l,
        )
        old = l[:, None, None] * fq[:, :, here]
        out = weights @ per_query_head(value[:, :, keys], H) + old @ per_query_head(kv[:, :, begin], H)
        total = weights.sum(-1, keepdim=True) + old @ per_query_head(k_sum[:, :, begin, :, None], H)
        parts.append(divide(out, total))
    return torch.cat(parts, 2).to(dtype)


def window_linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    state: State,
    *,
    scale: float,
    window_factor: Tensor | float = 1.0,
    linear_factor: Tensor | float = 1.0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """One decode step of the hybrid: out [B, H, 1, Dv].

    Args:
        query: [B, H, 1, D]. key: [B, Hkv, W, D] and value: [B, Hkv, W, Dv], the keys of the window, own one included.
        fq: [B, H, 1, F]. state: (kv, k_sum) of every key older than the window (see `linear_state`).
        key_mask: bool [B, W], False = padding.
    """
    H, wide = query.shape[1], accumulator(value.dtype)
    query, key, wide_value, fq = (x.to(wide) for x in (query, key, value, fq))
    g, l = (
        torch.as_tensor(f, dtype=wide, device=key.device).reshape(-1).expand(H)
        for f in (window_factor, linear_factor)
    )
    visible = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    visible = visible if key_mask is None else key_mask.bool()[:, None, None]
    scores = query @ per_query_head(key, H).mT * scale
    weights = hybrid_weights(scores, torch.zeros_like(scores), visible, visible, g, l)
    old = l[:, None, None] * fq
    out = weights @ per_query_head(wide_value, H) + old @ per_query_head(state[0], H)
    total = weights.sum(-1, keepdim=True) + old @ per_query_head(state[1][..., None], H)
    return divide(out, total).to(value.dtype)
