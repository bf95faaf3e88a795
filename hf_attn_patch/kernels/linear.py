"""Linear attention and LoLCATs' window + linear hybrid: the formulas in plain torch, and who runs them.

Feature maps are the caller's business: `fq` and `fk` are phi_q(q) and phi_k(k), already non-negative if the method
wants that. Per query head, row i, key j (Hedgehog arXiv 2402.04347, LinFusion 2409.02097, LoLCATs 2410.10254)::

    linear   a_ij = fq_i . fk_j                        out_i = sum_j a_ij v_j / (sum_j a_ij + eps)
    hybrid   s_ij = scale q_i . k_j,  c_i = max of s_ij over the window W(i)
             w_ij = g exp(s_ij - c_i) in W(i),  l fq_i . fk_j before it;      out_i = sum_j w_ij v_j / sum_j w_ij

Only window terms are divided by exp(c_i): c is part of the model, not merely a stabiliser. A row whose normaliser is
exactly 0 (every key masked) gives 0 and has no gradient.

Heads: features `fk` may be per KV head or finer (LoLCATs has one map per query head): Hkv divides Hf divides H, query
head h reads features h // (H / Hf) and values h // (H / Hkv). State: `kv` = sum_j fk_j v_j^T [B, Hf, F, Dv] and
`k_sum` = sum_j fk_j [B, Hf, F], fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .linear_torch import (
    accumulator,
    chunked_linear,
    chunked_window,
    divide,
    hybrid_weights,
    linear_state,
    window_linear_step,
    window_start,
)
from .reference import per_query_head

__all__ = [
    "linear_attention",
    "linear_state",
    "linear_step",
    "window_linear_attention",
    "window_linear_step",
    "window_start",
]

State = tuple[Tensor, Tensor]
Mode = Literal["sliding", "terrace"]
EPS = 1e-12  # HazyResearch/lolcats, linear_attention.py; LinFusion's mean-based 1e-4 is `eps=1e-4 * S` here


# -- choosing ------------------------------------------------------------------------------------------------


def _choose(impl: str, tensor: Tensor) -> str:
    """The implementation `auto` stands for, or `impl` if it can run; never a silent fallback from a named one."""
    if impl in ("reference", "torch"):
        return impl
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl={impl!r} is unknown; choose auto, reference, torch or triton")
    reason = _why_not_triton(tensor)
    if reason is None and (impl == "triton" or tensor.device.type != "cpu"):
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton': {reason}")
    return "torch"


def _why_not_triton(tensor: Tensor) -> str | None:
    try:
        from .triton import launch
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take fp16, bf16 and fp32, the tensors are {tensor.dtype}"
    return launch.is_available(tensor.device)


def _check(
    fq: Tensor, fk: Tensor, value: Tensor, key_mask: Tensor | None, state: State | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Shapes that fit, one dtype for all (the widest), mask as bool."""
    B, H, _, F = fq.shape
    Hf, S, Hkv = fk.shape[1], fk.shape[2], value.shape[1]
    if H % Hf or Hf % Hkv or fk.shape != (B, Hf, S, F) or value.shape[:3] != (B, Hkv, S):
        raise ValueError(
            f"linear attention: fq {list(fq.shape)}, fk {list(fk.shape)}, value {list(value.shape)}; expected "
            "[B, H, L, F], [B, Hf, S, F], [B, Hkv, S, Dv] with Hkv dividing Hf dividing H"
        )
    if key_mask is not None:
        if key_mask.shape != (B, S):
            raise ValueError(f"key_mask has shape {list(key_mask.shape)}, expected [{B}, {S}]")
        key_mask = key_mask.bool()
    if state is not None and (state[0].shape != (B, Hf, F, value.shape[3]) or state[1].shape != (B, Hf, F)):
        raise ValueError(
            f"state has shapes {list(state[0].shape)} and {list(state[1].shape)}, expected "
            f"{[B, Hf, F, value.shape[3]]} and {[B, Hf, F]}"
        )
    dtype = torch.promote_types(torch.promote_types(fq.dtype, fk.dtype), value.dtype)
    return fq.to(dtype), fk.to(dtype), value.to(dtype), key_mask


def _per_head(factor: Tensor | float, heads: int, like: Tensor) -> Tensor:
    """A factor as [H] in the accumulator dtype (from a number or a tensor of 1 or H elements)."""
    factor = torch.as_tensor(factor, dtype=accumulator(like.dtype), device=like.device).reshape(-1)
    if factor.numel() not in (1, heads):
        raise ValueError(f"window and linear factors need 1 or {heads} elements, found {factor.numel()}")
    return factor.expand(heads)


# -- linear attention ----------------------------------------------------------------------------------------


def linear_attention(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    *,
    causal: bool,
    normalise: bool = True,
    eps: float = EPS,
    key_mask: Tensor | None = None,
    initial_state: State | None = None,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """Linear attention over given features, in linear time and memory (see the module docstring).

    Args:
        fq: [B, H, L, F]. fk: [B, Hf, S, F]. value: [B, Hkv, S, Dv]. Mixed dtypes are promoted to the widest.
        causal: row i sees keys j <= i (needs L = S; earlier keys come as `initial_state`), else every row sees all.
        normalise: divide by the sum of weights + `eps`.
        key_mask: bool or uint8 [B, S], False = padding (phi(k) and v count as 0 there).
        initial_state: (kv, k_sum) of keys before these.
        impl: auto (triton on a GPU, else torch) | reference (quadratic) | torch (chunked) | triton.

    Returns:
        (out [B, H, L, Dv], (kv [B, Hf, F, Dv], k_sum [B, Hf, F])): the state includes `initial_state`.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: ``impl="triton"`` where it cannot run.
    """
    dtype = value.dtype
    fq, fk, value, key_mask = _check(fq, fk, value, key_mask, initial_state)
    if causal and fq.shape[2] != fk.shape[2]:
        raise ValueError(
            f"causal linear attention over {fq.shape[2]} queries and {fk.shape[2]} keys; give keys before the first "
            "query as initial_state (see linear_state)"
        )
    chosen = _choose(impl, value)
    if chosen == "triton":
        from .triton import linear

        run = linear.linear_attention
    else:
        run = reference_linear if chosen == "reference" else chunked_linear
    out, state = run(fq, fk, value, causal, normalise, eps, key_mask, initial_state)
    return out.to(dtype), state


def reference_linear(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    causal: bool,
    normalise: bool,
    eps: float,
    key_mask: Tensor | None,
    initial_state: State | None,
) -> tuple[Tensor, State]:
    """The formula, O(L S) memory, every product in the dtype of the inputs."""
    H = fq.shape[1]
    if key_mask is not None:
        fk = fk.masked_fill(~key_mask[:, None, :, None], 0)
        value = value.masked_fill(~key_mask[:, None, :, None], 0)
    weights = fq @ per_query_head(fk, H).mT
    weights = weights.tril() if causal else weights
    out = weights @ per_query_head(value, H)
    total = weights.sum(-1, keepdim=True)
    if initial_state is not None:
        kv, k_sum = (
            per_query_head(s.to(fq.dtype), H) for s in (initial_state[0], initial_state[1][..., None])
        )
        out, total = out + fq @ kv, total + fq @ k_sum
    state = linear_state(fk, value, initial_state=initial_state)
    return divide(out, total, eps) if normalise else out, state


def linear_step(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    state: State,
    *,
    normalise: bool = True,
    eps: float = EPS,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """One token, recurrently. **Updates `state` in place** (and returns it): a copy would double the traffic of a
    decode step, which is nothing but traffic. No gradient.

    Args:
        fq: [B, H, 1, F]. fk: [B, Hf, 1, F]. value: [B, Hkv, 1, Dv]. state: kv [B, Hf, F, Dv], k_sum [B, Hf, F],
            contiguous, fp32 (float64 for float64 inputs).

    Returns:
        (out [B, H, 1, Dv], state).
    """
    dtype = value.dtype
    fq, fk, value, _ = _check(fq, fk, value, None, state)
    if fq.shape[2] != 1 or fk.shape[2] != 1:
        raise ValueError(f"linear_step takes one token, found {fq.shape[2]} queries and {fk.shape[2]} keys")
    if not (state[0].is_contiguous() and state[1].is_contiguous() and state[0].dtype == accumulator(dtype)):
        raise ValueError(f"linear_step updates its state in place: contiguous, {accumulator(dtype)}")
    if _choose(impl, value) == "triton":
        from .triton import linear

        return linear.linear_step(fq, fk, value, *state, normalise, eps).to(dtype), state
    with torch.no_grad():
        new = linear_state(fk, value, initial_state=state)
        state[0].copy_(new[0])
        state[1].copy_(new[1])
        H, wide = fq.shape[1], fq.to(state[0].dtype)
        out = wide @ per_query_head(state[0], H)
        if normalise:
            out = divide(out, wide @ per_query_head(state[1][..., None], H), eps)
    return out.to(dtype), state


# -- window + linear -----------------------------------------------------------------------------------------


def window_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    fk: Tensor,
    *,
    scale: float,
    window: int,
    mode: Mode = "sliding",
    window_factor: Tensor | float = 1.0,
    linear_factor: Tensor | float = 1.0,
    key_mask: Tensor | None = None,
    align: Literal["start", "end"] = "start",
    impl: str = "auto",
) -> Tensor:
    """LoLCATs' hybrid: softmax terms in a window and linear terms before it under one normaliser; causal.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]. fq: [B, H, L, F]. fk: [B, Hf, S, F]. The
            queries are the last L of the S positions.
        window: w. mode: ``sliding`` (LoLCATs "sw"): the last w keys, own one included. ``terrace`` ("tk"): own block of
            w keys up to the own one, and the whole block before it.
        window_factor: g, a number or a tensor of H elements. linear_factor: l, likewise (1, or 1 - g).
        key_mask: bool or uint8 [B, S], False = padding.
        align: where the blocks of a terrace start. ``start``: at position 0. ``end``: the last block is whole, as in
            the original code; then an output depends on the length of the sequence. (The original also adds the linear
            term on top of the window when L <= w, a slip that is not reproduced.)

    Returns:
        out [B, H, L, Dv].

    Raises:
        ValueError: shapes that do not fit, window < 1, S < L. RuntimeError: ``impl="triton"`` where it cannot run.
    """
    dtype = value.dtype
    fq, fk, value, key_mask = _check(fq, fk, value, key_mask, None)
    query, key = query.to(value.dtype), key.to(value.dtype)
    L, S = query.shape[2], key.shape[2]
    if query.shape[:3] != fq.shape[:3] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"window_linear_attention: query {list(query.shape)} with fq {list(fq.shape)}, key {list(key.shape)} with "
            f"value {list(value.shape)}; heads and lengths must agree"
        )
    if window < 1 or S < L:
        raise ValueError(f"window_linear_attention: window={window} must be >= 1, keys {S} >= queries {L}")
    if mode not in ("sliding", "terrace") or align not in ("start", "end"):
        raise ValueError(f"mode={mode!r} (sliding or terrace), align={align!r} (start or end)")
    g, l = (_per_head(f, fq.shape[1], value) for f in (window_factor, linear_factor))
    shift = -S % window if mode == "terrace" and align == "end" else 0
    tensors = (query, key, value, fq, fk, g, l, key_mask)
    chosen = _choose(impl, value)
    if chosen == "triton":
        from .triton import window_linear

        return window_linear.window_linear_attention(*tensors, scale, window, mode, shift).to(dtype)
    run = reference_window if chosen == "reference" else chunked_window
    return run(*tensors, scale, window, mode, shift).to(dtype)


def reference_window(
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
) -> Tensor:
    """The hybrid as written in the module docstring, O(L S) memory."""
    H, L, S = query.shape[1], query.shape[2], key.shape[2]
    rows, cols = torch.arange(S - L, S, device=key.device)[:, None], torch.arange(S, device=key.device)
    start = window_start(rows, window, mode, shift)
    visible = (cols <= rows)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
        fk = fk.masked_fill(~key_mask[:, None, :, None], 0)
        key, value = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (key, value))
    scores = query @ per_query_head(key, H).mT * scale
    features = fq @ per_query_head(fk, H).mT
    weights = hybrid_weights(scores, features, visible & (cols >= start), visible & (cols < start), g, l)
    return divide(weights @ per_query_head(value, H), weights.sum(-1, keepdim=True))
