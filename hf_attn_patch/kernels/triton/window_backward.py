"""Triton kernels of the window + linear hybrid, backward: by rows for query and fq, by keys for key, fk and value.

With w_ij the weights, n_i their sum and dw_ij = (dout_i . v_j - dout_i . out_i) / n_i::

    ds_ij = g p_ij dw_ij - [j = argmax_i] g u_i,   p_ij = exp(s_ij - c_i),   u_i = sum over the window of p_ij dw_ij
    dg = sum_i u_i,   dl = sum of a_ij dw_ij over keys before the windows

The second term of ds is the derivative of c_i; a tie for the maximum gives it to the first key (torch spreads it).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config
from .launch import launch
from .linear_chunks import (
    key_ok,
    load_tile,
    load_tile_t,
    pairs,
    precision,
    rows_contiguous,
    states,
    tile,
    wide,
)

# block_k: widest tile of D, F and Dv (tokens per chunk: see window_linear)
_ROWS = [(256, 2, Config(64, 32, 8, 1)), (256, 4, Config(32, 32, 4, 2))]
configs.rows("window_backward", other=_ROWS, gfx942=[(256, 2, Config(64, 32, 4, 1)), _ROWS[1]])


@triton.jit
def window_first(n, WINDOW, SHIFT, SLIDING: tl.constexpr):
    """First column of the window of row n; may be negative."""
    if SLIDING:
        start = n - WINDOW + 1
    else:
        start = ((n + SHIFT) // WINDOW - 1) * WINDOW - SHIFT
    return start


@triton.jit
def block_pairs(
    q, q_t, k, k_t, fq, fq_t, fk, fk_t, t, ok, n, start, j, seen, top, SCALE,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(exp(s - c) inside the window, feature products before it) of rows n and keys j, each 0 elsewhere, [C, C]."""
    visible = ok[:, None] & seen[None, :] & (j[None, :] <= n[:, None])
    inside = visible & (j[None, :] >= start[:, None])
    s = pairs(q, q_t, t, ok, k, k_t, j, seen, C, C, D, BD, PRECISION) * SCALE
    soft = tl.where(inside, tl.exp2(tl.where(inside, s - top[:, None], 0.0)), 0.0)
    feature = tl.zeros([C, C], dtype=tl.float32)
    if tl.min(j, 0) < tl.max(start, 0):
        feature = pairs(fq, fq_t, t, ok, fk, fk_t, j, seen, C, C, F, BF, PRECISION)
        feature = tl.where(visible & (j[None, :] < start[:, None]), feature, 0.0)
    return soft, feature


@triton.jit
def rows_after(block, L, S, WINDOW, SHIFT, SLIDING: tl.constexpr, C: tl.constexpr):
    """Chunks of rows [first, last) that pair with a chunk of keys one by one; later ones see it through the state."""
    edge = (block + 1) * C
    if SLIDING:
        row = edge + WINDOW - 1
    else:
        row = (1 + (edge + SHIFT + WINDOW - 1) // WINDOW) * WINDOW - SHIFT
    chunks = (L + C - 1) // C
    first = tl.maximum(block * C - (S - L), 0) // C
    last = tl.minimum(tl.maximum(row - (S - L) + C - 1, 0) // C, chunks)
    return first, last


@triton.jit
def _window_dq(
    Q, K, V, DOUT, G, MASK, INV, DELTA, TOP, ARG, DQ, U,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, L, S, HEADS, WINDOW, SHIFT, SCALE, GRAD_SCALE,
    V_DIV: tl.constexpr, SLIDING: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Two passes, for u_i must be known before ds. Grid: (B * HEADS, chunks of rows, tiles of D)."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BD
    t = c * C + tl.arange(0, C)
    ok = t < L
    n = t + (S - L)
    n0 = c * C + (S - L)
    start = window_first(n, WINDOW, SHIFT, SLIDING)
    begin = tl.maximum(window_first(n0, WINDOW, SHIFT, SLIDING), 0) // C
    end = tl.minimum(n0 + C - 1, S - 1) // C + 1
    q = Q + batch * q_b + head * q_h
    k = K + batch * k_b + (head // V_DIV) * k_h
    v = V + batch * v_b + (head // V_DIV) * v_h
    dout = DOUT + batch * o_b + head * o_h
    row = (batch * HEADS + head) * L + t
    inverse = tl.load(INV + row, mask=ok, other=0.0)
    delta = tl.load(DELTA + row, mask=ok, other=0.0)
    top = tl.load(TOP + row, mask=ok, other=0.0)
    arg = tl.load(ARG + row, mask=ok, other=0)
    g = tl.load(G + head)
    u = tl.zeros([C], dtype=tl.float32)
    acc = tl.zeros([C, BD], dtype=tl.float32)
    for step in range(begin, 2 * end - begin):
        block = tl.where(step < end, step, step - end + begin)
        j = block * C + tl.arange(0, C).to(tl.int64)
        seen = key_ok(MASK, batch, j, S)
        inside = ok[:, None] & seen[None, :] & (j[None, :] <= n[:, None]) & (j[None, :] >= start[:, None])
        s = pairs(q, q_t, t, ok, k, k_t, j, seen, C, C, D, BD, PRECISION) * SCALE
        soft = tl.where(inside, tl.exp2(tl.where(inside, s - top[:, None], 0.0)), 0.0)
        dw = pairs(dout, o_t, t, ok, v, v_t, j, seen, C, C, DV, BV, PRECISION)
        ds = soft * (dw - delta[:, None]) * inverse[:, None]
        if step < end:
            u += tl.sum(ds, 1)
        else:
            ds -= tl.where(inside & (j[None, :] == arg[:, None]), u[:, None], 0.0)
            tile_k = load_tile(k, k_t, j, seen, first, D, BD)
            acc = tl.dot(ds.to(WIDE), tile_k.to(WIDE), acc, input_precision=PRECISION)
    cols = first + tl.arange(0, BD)
    tl.store(
        DQ + row[:, None] * D + cols[None, :],
        (acc * (g * GRAD_SCALE)).to(DQ.dtype.element_ty),
        mask=ok[:, None] & (cols < D)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(U + row, u, mask=ok)


@triton.jit
def _window_dfq(
    FQ, FK, V, DOUT, LF, MASK, KV, Z, INV, DELTA, DFQ, DL,
    fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, v_b, v_h, v_t, o_b, o_h, o_t, L, S, CHUNKS, HEADS, WINDOW, SHIFT,
    V_DIV: tl.constexpr, F_DIV: tl.constexpr, SLIDING: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DL: the gradient of the linear factor by row and tile of F. Grid: (B * HEADS, chunks of rows, tiles of F)."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BF
    t = c * C + tl.arange(0, C)
    ok = t < L
    n = t + (S - L)
    n0 = c * C + (S - L)
    start = window_first(n, WINDOW, SHIFT, SLIDING)
    begin = tl.maximum(window_first(n0, WINDOW, SHIFT, SLIDING), 0) // C
    # keys before the last window of the chunk
    end = (tl.maximum(window_first(tl.minimum(n0 + C - 1, S - 1), WINDOW, SHIFT, SLIDING), 0) + C - 1) // C
    fk = FK + batch * fk_b + (head // F_DIV) * fk_h
    v = V + batch * v_b + (head // V_DIV) * v_h
    dout = DOUT + batch * o_b + head * o_h
    row = (batch * HEADS + head) * L + t
    inverse = tl.load(INV + row, mask=ok, other=0.0)
    delta = tl.load(DELTA + row, mask=ok, other=0.0)
    slot = (batch * (HEADS // F_DIV) + head // F_DIV) * CHUNKS + begin
    cols = first + tl.arange(0, BF)
    acc = tl.zeros([C, BF], dtype=tl.float32)
    for d in range(0, DV, BV):
        do = load_tile(dout, o_t, t, ok, d, DV, BV)
        kv = load_tile_t(KV + slot * F * DV, DV, cols, cols < F, d, DV, BV)
        acc = tl.dot(do.to(tl.float32), kv, acc, input_precision=PRECISION)
    z = tl.load(Z + slot * F + cols, mask=cols < F, other=0.0)
    acc -= delta[:, None] * z[None, :]
    for block in range(begin, end):
        j = block * C + tl.arange(0, C).to(tl.int64)
        seen = key_ok(MASK, batch, j, S)
        dw = pairs(dout, o_t, t, ok, v, v_t, j, seen, C, C, DV, BV, PRECISION) - delta[:, None]
        dw = tl.where(ok[:, None] & seen[None, :] & (j[None, :] < start[:, None]), dw, 0.0)
        k = load_tile(fk, fk_t, j, seen, first, F, BF)
        acc = tl.dot(dw.to(k.dtype), k, acc, input_precision=PRECISION)
    acc *= inverse[:, None]
    x = load_tile(FQ + batch * fq_b + head * fq_h, fq_t, t, ok, first, F, BF)
    tl.store(DL + row * TILES + tl.program_id(2), tl.sum(x.to(tl.float32) * acc, 1), mask=ok)
    tl.store(
        DFQ + row[:, None] * F + cols[None, :],
        (acc * tl.load(LF + head)).to(DFQ.dtype.element_ty),
        mask=ok[:, None] & (cols < F)[None, :],
    )


@triton.jit
def _window_dk(
    Q, K, V, DOUT, G, MASK, INV, DELTA, TOP, ARG, U, DK,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, L, S, HEADS, WINDOW, SHIFT, SCALE, GRAD_SCALE,
    GROUP: tl.constexpr, SLIDING: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, chunks of keys, tiles of D), HEADS KV heads of GROUP query heads each."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BD
    j = c * C + tl.arange(0, C)
    seen = key_ok(MASK, batch, j, S)
    k = K + batch * k_b + head * k_h
    v = V + batch * v_b + head * v_h
    begin, end = rows_after(c, L, S, WINDOW, SHIFT, SLIDING, C)
    acc = tl.zeros([C, BD], dtype=tl.float32)
    for h in range(head * GROUP, head * GROUP + GROUP):
        g = tl.load(G + h)
        q = Q + batch * q_b + h * q_h
        dout = DOUT + batch * o_b + h * o_h
        for block in range(begin, end):
            t = block * C + tl.arange(0, C).to(tl.int64)
            ok = t < L
            n = t + (S - L)
            start = window_first(n, WINDOW, SHIFT, SLIDING)
            row = (batch * HEADS * GROUP + h) * L + t
            inverse = tl.load(INV + row, mask=ok, other=0.0)
            delta = tl.load(DELTA + row, mask=ok, other=0.0)
            top = tl.load(TOP + row, mask=ok, other=0.0)
            arg = tl.load(ARG + row, mask=ok, other=0)
            u = tl.load(U + row, mask=ok, other=0.0)
            inside = ok[None, :] & seen[:, None] & (j[:, None] <= n[None, :]) & (j[:, None] >= start[None, :])
            s = pairs(k, k_t, j, seen, q, q_t, t, ok, C, C, D, BD, PRECISION) * SCALE
            soft = tl.where(inside, tl.exp2(tl.where(inside, s - top[None, :], 0.0)), 0.0)
            dw = pairs(v, v_t, j, seen, dout, o_t, t, ok, C, C, DV, BV, PRECISION)
            ds = soft * (dw - delta[None, :]) * inverse[None, :]
            ds -= tl.where(inside & (j[:, None] == arg[None, :]), u[None, :], 0.0)
            x = load_tile(q, q_t, t, ok, first, D, BD)
            acc = tl.dot((ds * g).to(WIDE), x.to(WIDE), acc, input_precision=PRECISION)
    cols = first + tl.arange(0, BD)
    row = (batch * HEADS + head) * S + j
    tl.store(
        DK + row[:, None] * D + cols[None, :],
        (acc * GRAD_SCALE).to(DK.dtype.element_ty),
        mask=(j < S)[:, None] & (cols < D)[None, :],
    )


@triton.jit
def _window_dfk(
    FQ, V, DOUT, LF, MASK, R, RZ, INV, DELTA, DFK,
    fq_b, fq_h, fq_t, v_b, v_h, v_t, o_b, o_h, o_t, L, S, STATES, HEADS, WINDOW, SHIFT,
    V_DIV: tl.constexpr, GROUP: tl.constexpr, SLIDING: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R[i]: sum over the rows from chunk i on. Grid: (B * HEADS, chunks of keys, tiles of F), HEADS feature heads."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BF
    j = c * C + tl.arange(0, C)
    seen = key_ok(MASK, batch, j, S)
    v = V + batch * v_b + (head // V_DIV) * v_h
    begin, end = rows_after(c, L, S, WINDOW, SHIFT, SLIDING, C)
    slot = (batch * HEADS + head) * STATES + end
    cols = first + tl.arange(0, BF)
    rz = tl.load(RZ + slot * F + cols, mask=cols < F, other=0.0)
    acc = tl.zeros([C, BF], dtype=tl.float32) + rz[None, :]
    for d in range(0, DV, BV):
        x = load_tile(v, v_t, j, seen, d, DV, BV)
        r = load_tile_t(R + slot * F * DV, DV, cols, cols < F, d, DV, BV)
        acc = tl.dot(x.to(tl.float32), r, acc, input_precision=PRECISION)
    for h in range(head * GROUP, head * GROUP + GROUP):
        linear = tl.load(LF + h)
        dout = DOUT + batch * o_b + h * o_h
        for block in range(begin, end):
            t = block * C + tl.arange(0, C).to(tl.int64)
            ok = t < L
            start = window_first(t + (S - L), WINDOW, SHIFT, SLIDING)
            if tl.min(j, 0) < tl.max(start, 0):
                row = (batch * HEADS * GROUP + h) * L + t
                inverse = tl.load(INV + row, mask=ok, other=0.0) * linear
                delta = tl.load(DELTA + row, mask=ok, other=0.0)
                dw = pairs(v, v_t, j, seen, dout, o_t, t, ok, C, C, DV, BV, PRECISION)
                dw = tl.where(j[:, None] < start[None, :], (dw - delta[None, :]) * inverse[None, :], 0.0)
                q = load_tile(FQ + batch * fq_b + h * fq_h, fq_t, t, ok, first, F, BF)
                acc = tl.dot(dw.to(WIDE), q.to(WIDE), acc, input_precision=PRECISION)
    acc = tl.where(seen[:, None], acc, 0.0)
    row = (batch * HEADS + head) * S + j
    tl.store(
        DFK + row[:, None] * F + cols[None, :],
        acc.to(DFK.dtype.element_ty),
        mask=(j < S)[:, None] & (cols < F)[None, :],
    )


@triton.jit
def _window_dv(
    Q, K, FQ, FK, DOUT, G, LF, MASK, R, INV, TOP, DV_OUT,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, o_b, o_h, o_t,
    L, S, STATES, HEADS, WINDOW, SHIFT, SCALE,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, SLIDING: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, chunks of keys, tiles of DV): HEADS KV heads of FEATURES feature heads of GROUP query heads."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BV
    j = c * C + tl.arange(0, C)
    seen = key_ok(MASK, batch, j, S)
    begin, end = rows_after(c, L, S, WINDOW, SHIFT, SLIDING, C)
    k = K + batch * k_b + head * k_h
    acc = tl.zeros([C, BV], dtype=tl.float32)
    for features in range(head * FEATURES, head * FEATURES + FEATURES):
        fk = FK + batch * fk_b + features * fk_h
        slot = (batch * HEADS * FEATURES + features) * STATES + end
        for f in range(0, F, BF):
            rows = f + tl.arange(0, BF)
            x = load_tile(fk, fk_t, j, seen, f, F, BF)
            r = load_tile(R + slot * F * DV, DV, rows, rows < F, first, DV, BV)
            acc = tl.dot(x.to(tl.float32), r, acc, input_precision=PRECISION)
        for h in range(features * GROUP, features * GROUP + GROUP):
            g = tl.load(G + h)
            linear = tl.load(LF + h)
            for block in range(begin, end):
                t = block * C + tl.arange(0, C).to(tl.int64)
                ok = t < L
                n = t + (S - L)
                start = window_first(n, WINDOW, SHIFT, SLIDING)
                row = (batch * HEADS * FEATURES * GROUP + h) * L + t
                inverse = tl.load(INV + row, mask=ok, other=0.0)
                top = tl.load(TOP + row, mask=ok, other=0.0)
                soft, feature = block_pairs(
                    Q + batch * q_b + h * q_h, q_t, k, k_t, FQ + batch * fq_b + h * fq_h, fq_t, fk, fk_t,
                    t, ok, n, start, j, seen, top, SCALE, D, F, C, BD, BF, PRECISION,
                )  # fmt: skip
                weights = (g * soft + linear * feature) * inverse[:, None]
                do = load_tile(DOUT + batch * o_b + h * o_h, o_t, t, ok, first, DV, BV)
                acc = tl.dot(tl.trans(weights).to(WIDE), do.to(WIDE), acc, input_precision=PRECISION)
    cols = first + tl.arange(0, BV)
    row = (batch * HEADS + head) * S + j
    tl.store(
        DV_OUT + row[:, None] * DV + cols[None, :],
        acc.to(DV_OUT.dtype.element_ty),
        mask=(j < S)[:, None] & (cols < DV)[None, :],
    )


def backward(
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
    """Gradients of query, key, value, fq, fk, g and l."""
    query, key, value, fq, fk, dout = (rows_contiguous(x) for x in (query, key, value, fq, fk, dout))
    B, H, L, D = query.shape
    S, Hkv, Hf, F, DV = key.shape[2], key.shape[1], fk.shape[1], fk.shape[3], value.shape[3]
    widest = max(D, F, DV)
    chunk = configs.config("window_linear", query.device, widest, query.dtype).block_q
    chosen = configs.config("window_backward", query.device, widest, query.dtype)
    BD, BF, BV = (tile(d, chosen.block_k) for d in (D, F, DV))
    delta = (dout.float() * out.float()).sum(-1)
    kv, z, *_ = states(fk, value, Hf, chunk, each=True, mask=mask)
    scaled = inverse * l[:, None]
    r, rz, r_all, rz_all = states(
        fq, dout, Hf, chunk, each=True, scale=scaled, weight=-delta * scaled, reverse=True
    )
    # entry i: the rows from chunk i on; entry 0 is all of them, the last one none
    r, rz = torch.cat([r_all[:, :, None], r], 2), torch.cat([rz_all[:, :, None], rz], 2)
    dq, dk, dv, dfq, dfk = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, fq, fk)
    )
    u = torch.empty((B, H, L), dtype=torch.float32, device=query.device)
    f_tiles, rows, keys = triton.cdiv(F, BF), triton.cdiv(L, chunk), triton.cdiv(S, chunk)
    dl = torch.empty((B, H, L, f_tiles), dtype=torch.float32, device=query.device)
    common: dict[str, Any] = dict(
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, SLIDING=sliding, C=chunk,
        PRECISION=precision(query.dtype),
    )  # fmt: skip
    width = wide(query.dtype)
    score = scale / math.log(2)
    at_q, at_k, at_v, at_fq, at_fk, at_o = (x.stride()[:3] for x in (query, key, value, fq, fk, dout))
    launch(
        _window_dq, (B * H, rows, triton.cdiv(D, BD)),
        query, key, value, dout, g, mask, inverse, delta, top, arg, dq, u,
        *at_q, *at_k, *at_v, *at_o, L, S, H, window, shift, score, scale,
        V_DIV=H // Hkv, D=D, DV=DV, BD=BD, BV=BV, WIDE=width, **common,
    )  # fmt: skip
    launch(
        _window_dfq, (B * H, rows, f_tiles),
        fq, fk, value, dout, l, mask, kv, z, inverse, delta, dfq, dl,
        *at_fq, *at_fk, *at_v, *at_o, L, S, keys, H, window, shift,
        V_DIV=H // Hkv, F_DIV=H // Hf, F=F, DV=DV, BF=BF, BV=BV, TILES=f_tiles, **common,
    )  # fmt: skip
    launch(
        _window_dk, (B * Hkv, keys, triton.cdiv(D, BD)),
        query, key, value, dout, g, mask, inverse, delta, top, arg, u, dk,
        *at_q, *at_k, *at_v, *at_o, L, S, Hkv, window, shift, score, scale,
        GROUP=H // Hkv, D=D, DV=DV, BD=BD, BV=BV, WIDE=width, **common,
    )  # fmt: skip
    launch(
        _window_dfk, (B * Hf, keys, f_tiles),
        fq, value, dout, l, mask, r, rz, inverse, delta, dfk,
        *at_fq, *at_v, *at_o, L, S, rows + 1, Hf, window, shift,
        V_DIV=Hf // Hkv, GROUP=H // Hf, F=F, DV=DV, BF=BF, BV=BV, WIDE=width, **common,
    )  # fmt: skip
    launch(
        _window_dv, (B * Hkv, keys, triton.cdiv(DV, BV)),
        query, key, fq, fk, dout, g, l, mask, r, inverse, top, dv,
        *at_q, *at_k, *at_fq, *at_fk, *at_o, L, S, rows + 1, Hkv, window, shift, score,
        FEATURES=Hf // Hkv, GROUP=H // Hf, D=D, F=F, DV=DV, BD=BD, BF=BF, BV=BV, WIDE=width, **common,
    )  # fmt: skip
    return dq, dk, dv, dfq, dfk, u.sum((0, 2)), dl.sum((0, 2, 3))
