"""LoLCATs' window + linear hybrid on Triton: forward, and the operator around forward and backward.

Formulas, shapes and meaning of the arguments: `kernels.linear`, which checks them before it calls this file. Keys older
than the chunk in which the first window of a block of rows starts come as a state (see `linear_chunks`); the others
pair by pair, in two passes: the window maximum must be known before linear and window terms meet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .aot import Case, sizes
from .configs import Config
from .launch import launch
from .linear_chunks import load_tile, precision, rows_contiguous, states, tile, wide
from .window_backward import backward, block_pairs, key_ok, pairs, window_first

# block_q: tokens per chunk, of queries and keys (also in the backward); block_k: widest tile of D, F and Dv
configs.rows(
    "window_linear",
    other=[(256, 2, Config(64, 64, 8, 2)), (256, 4, Config(32, 32, 4, 2))],
    gfx942=[(32, 2, Config(64, 32, 4, 2)), (256, 2, Config(64, 32, 8, 2)), (256, 4, Config(32, 32, 4, 2))],
)
LOG2E = 1 / math.log(2)


@triton.jit
def _window_linear(
    Q, K, V, FQ, FK, G, LF, MASK, KV, Z, OUT, INV, TOP, ARG,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    L, S, CHUNKS, HEADS, WINDOW, SHIFT, SCALE,
    V_DIV: tl.constexpr, F_DIV: tl.constexpr, SLIDING: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """TOP: maximum of the window's scores times log2(e) (0 if it is empty), ARG: its column, INV: 1 / normaliser.
    Grid: (B * HEADS, chunks of rows, tiles of DV)."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BV
    t = c * C + tl.arange(0, C)
    ok = t < L
    n = t + (S - L)
    n0 = c * C + (S - L)
    start = window_first(n, WINDOW, SHIFT, SLIDING)
    begin = tl.maximum(window_first(n0, WINDOW, SHIFT, SLIDING), 0) // C
    end = tl.minimum(n0 + C - 1, S - 1) // C + 1
    q = Q + batch * q_b + head * q_h
    k = K + batch * k_b + (head // V_DIV) * k_h
    fq = FQ + batch * fq_b + head * fq_h
    fk = FK + batch * fk_b + (head // F_DIV) * fk_h
    row = (batch * HEADS + head) * L + t

    top = tl.full([C], float("-inf"), dtype=tl.float32)
    arg = tl.zeros([C], dtype=tl.int64)
    for block in range(begin, end):
        j = block * C + tl.arange(0, C).to(tl.int64)
        seen = key_ok(MASK, batch, j, S)
        s = pairs(q, q_t, t, ok, k, k_t, j, seen, C, C, D, BD, PRECISION) * SCALE
        inside = seen[None, :] & (j[None, :] <= n[:, None]) & (j[None, :] >= start[:, None])
        s = tl.where(inside, s, float("-inf"))
        best = tl.max(s, 1)
        where = tl.min(tl.where(inside & (s == best[:, None]), j[None, :], S), 1)
        arg = tl.where(best > top, where, arg)
        top = tl.maximum(top, best)
    top = tl.where(top == float("-inf"), 0.0, top)

    g = tl.load(G + head)
    linear = tl.load(LF + head)
    acc = tl.zeros([C, BV], dtype=tl.float32)
    total = tl.zeros([C], dtype=tl.float32)
    slot = (batch * (HEADS // F_DIV) + head // F_DIV) * CHUNKS + begin
    for f in range(0, F, BF):
        x = load_tile(fq, fq_t, t, ok, f, F, BF).to(tl.float32)
        rows = f + tl.arange(0, BF)
        kv = load_tile(KV + slot * F * DV, DV, rows, rows < F, first, DV, BV)
        acc = tl.dot(x, kv, acc, input_precision=PRECISION)
        z = tl.load(Z + slot * F + rows, mask=rows < F, other=0.0)
        total += tl.sum(x * z[None, :], 1)
    acc *= linear
    total *= linear
    for block in range(begin, end):
        j = block * C + tl.arange(0, C).to(tl.int64)
        seen = key_ok(MASK, batch, j, S)
        soft, feature = block_pairs(
            q, q_t, k, k_t, fq, fq_t, fk, fk_t, t, ok, n, start, j, seen, top, SCALE,
            D, F, C, BD, BF, PRECISION,
        )  # fmt: skip
        weights = g * soft + linear * feature
        total += tl.sum(weights, 1)
        v = load_tile(V + batch * v_b + (head // V_DIV) * v_h, v_t, j, seen, first, DV, BV)
        acc = tl.dot(weights.to(WIDE), v.to(WIDE), acc, input_precision=PRECISION)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    cols = first + tl.arange(0, BV)
    tl.store(
        OUT + row[:, None] * DV + cols[None, :],
        (acc * inverse[:, None]).to(OUT.dtype.element_ty),
        mask=ok[:, None] & (cols < DV)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(INV + row, inverse, mask=ok)
        tl.store(TOP + row, top, mask=ok)
        tl.store(ARG + row, arg.to(tl.int32), mask=ok)


def _window_linear_impl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor,
    l: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int,
    sliding: bool,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [rows_contiguous(x) for x in (query, key, value, fq, fk)]
    query, key, value, fq, fk = tensors
    B, H, L, D = query.shape
    S, Hf, F, DV = key.shape[2], fk.shape[1], fk.shape[3], value.shape[3]
    chosen = configs.config("window_linear", query.device, max(D, F, DV), query.dtype)
    chunk = chosen.block_q
    kv, z, *_ = states(fk, value, Hf, chunk, each=True, mask=mask)
    new = lambda dtype: torch.empty((B, H, L), dtype=dtype, device=query.device)
    out = torch.empty((B, H, L, DV), dtype=value.dtype, device=query.device)
    inverse, top, arg = new(torch.float32), new(torch.float32), new(torch.int32)
    BD, BF, BV = (tile(d, chosen.block_k) for d in (D, F, DV))
    launch(
        _window_linear, (B * H, triton.cdiv(L, chunk), triton.cdiv(DV, BV)),
        *tensors, g, l, mask, kv, z, out, inverse, top, arg,
        *(s for x in tensors for s in x.stride()[:3]),
        L, S, triton.cdiv(S, chunk), H, window, shift, scale * LOG2E,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        V_DIV=H // value.shape[1], F_DIV=H // Hf, SLIDING=sliding, D=D, F=F, DV=DV, C=chunk, BD=BD, BF=BF, BV=BV,
        PRECISION=precision(query.dtype), WIDE=wide(query.dtype),
    )  # fmt: skip
    return out, inverse, top, arg


@torch.library.custom_op("hf_attn_patch::window_linear_attention", mutates_args=())
def _window_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor,
    l: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int,
    sliding: bool,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, 1 / normaliser, window maximum * log2(e), its column), the last three [B, H, L]."""
    return _window_linear_impl(query, key, value, fq, fk, g, l, mask, scale, window, sliding, shift)


@_window_linear_attention.register_fake
def _(query, key, value, fq, fk, g, l, mask, scale, window, sliding, shift):
    new = lambda dtype: query.new_empty(query.shape[:3], dtype=dtype)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, new(torch.float32), new(torch.float32), new(torch.int32)


@torch.library.custom_op("hf_attn_patch::window_linear_backward", mutates_args=())
def _window_linear_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor,
    l: Tensor,
    mask: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    top: Tensor,
    arg: Tensor,
    scale: float,
    window: int,
    sliding: bool,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, fq, fk, g, l."""
    return backward(
        dout, query, key, value, fq, fk, g, l, mask, out, inverse, top, arg, scale, window, sliding, shift
    )


@_window_linear_backward.register_fake
def _(dout, query, key, value, fq, fk, g, l, mask, out, inverse, top, arg, scale, window, sliding, shift):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, fq, fk, g, l))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window, ctx.sliding, ctx.shift = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, *_):
    *tensors, out, inverse, top, arg = ctx.saved_tensors
    geometry = (ctx.scale, ctx.window, ctx.sliding, ctx.shift)
    grads = _window_linear_backward(dout, *tensors, out, inverse, top, arg, *geometry)
    return *grads, None, None, None, None, None


_window_linear_attention.register_autograd(_backward, setup_context=_setup)


def window_linear_attention(
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
    """`kernels.linear.window_linear_attention` on Triton, differentiable in every tensor."""
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    g, l = g.float().contiguous(), l.float().contiguous()
    return _window_linear_attention(
        query, key, value, fq, fk, g, l, mask, scale, window, mode == "sliding", shift
    )[0]


def aot_cases() -> list[Case]:
    """Forward and backward, both windows, with and without mask; features per KV head and per query head."""

    def meta(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(dtype, D, F, DV, sliding, masked, per_query_head):
        B, H, Hkv, L = 2, 8, 2, 1024
        query, key, value = meta(dtype, B, H, L, D), meta(dtype, B, Hkv, L, D), meta(dtype, B, Hkv, L, DV)
        fq, fk = meta(dtype, B, H, L, F), meta(dtype, B, H if per_query_head else Hkv, L, F)
        g = meta(torch.float32, H)
        mask = meta(torch.uint8, B, L) if masked else None
        tensors = (query, key, value, fq, fk, g, g, mask)
        geometry = (0.125, 64, sliding, 0)
        out, *rest = _window_linear_impl(*tensors, *geometry)
        run: Any = backward
        run(out, *tensors, out, *rest, *geometry)

    cases = []
    for kind, dtype, D, options in sizes():
        F = min(256, max(16, 2 * D if D < 128 else D))
        for sliding in (True, False) if options else (True,):
            mode, masked = ("sliding", True) if sliding else ("terrace", D == 64)
            label = f"window {mode} {kind} D{D} F{F} Dv{D}{' mask' if masked else ''}"
            run = lambda a=(dtype, D, F, D, sliding, masked, sliding): call(*a)
            cases.append(Case(label, run, options and sliding and D == 128))
    return cases
