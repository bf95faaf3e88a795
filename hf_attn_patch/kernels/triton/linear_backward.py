"""Triton kernels of linear attention, backward: one for fq, one for fk, one for values, around the two kinds of state.

With i the rows, j the keys, D_i = dout_i . out_i and n_i the normaliser::

    dfq_i = [KV dout_i - D_i z] / n_i                 KV, z: the forward's sums over keys j <= i
    dfk_j = R v_j + r,  dv_j = R^T fk_j               R = sum_{i >= j} fq_i dout_i^T / n_i,  r = - sum fq_i D_i / n_i
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config
from .launch import launch
from .linear_chunks import (
    chunk_size,
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

# block_k: widest tile of a feature or value dimension (tokens per chunk: see linear_chunks)
configs.rows(
    "linear_backward",
    other=[(256, 2, Config(64, 64, 4, 2)), (256, 4, Config(32, 32, 4, 2))],
    sm80=[(256, 2, Config(64, 64, 8, 2)), (256, 4, Config(32, 32, 4, 2))],
)


@triton.jit
def _linear_dfq(
    DOUT, FK, V, MASK, KV, Z, INV, DELTA, DFQ,
    o_b, o_h, o_t, k_b, k_h, k_t, v_b, v_h, v_t, L, S, CHUNKS, HEADS,
    K_DIV: tl.constexpr, V_DIV: tl.constexpr, CAUSAL: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, chunks of rows, tiles of F)."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BF
    t = c * C + tl.arange(0, C)
    ok = t < L
    slot = batch * (HEADS // K_DIV) + head // K_DIV
    if CAUSAL:
        slot = slot * CHUNKS + c
    cols = first + tl.arange(0, BF)
    row = (batch * HEADS + head) * L + t
    inverse = tl.load(INV + row, mask=ok, other=0.0)
    delta = tl.load(DELTA + row, mask=ok, other=0.0)
    dout = DOUT + batch * o_b + head * o_h
    acc = tl.zeros([C, BF], dtype=tl.float32)
    for d in range(0, DV, BV):
        do = load_tile(dout, o_t, t, ok, d, DV, BV)
        kv = load_tile_t(KV + slot * F * DV, DV, cols, cols < F, d, DV, BV)
        acc = tl.dot(do.to(tl.float32), kv, acc, input_precision=PRECISION)
    z = tl.load(Z + slot * F + cols, mask=cols < F, other=0.0)
    acc -= delta[:, None] * z[None, :]
    if CAUSAL:
        seen = key_ok(MASK, batch, t, S)
        v = V + batch * v_b + (head // V_DIV) * v_h
        grad = pairs(dout, o_t, t, ok, v, v_t, t, seen, C, C, DV, BV, PRECISION) - delta[:, None]
        at = tl.arange(0, C)
        grad = tl.where(at[None, :] <= at[:, None], grad, 0.0)
        k = load_tile(FK + batch * k_b + (head // K_DIV) * k_h, k_t, t, seen, first, F, BF)
        acc = tl.dot(grad.to(k.dtype), k, acc, input_precision=PRECISION)
    tl.store(
        DFQ + row[:, None] * F + cols[None, :],
        (acc * inverse[:, None]).to(DFQ.dtype.element_ty),
        mask=ok[:, None] & (cols < F)[None, :],
    )


@triton.jit
def _linear_dfk(
    DOUT, FQ, V, MASK, R, RZ, INV, DELTA, DFK,
    o_b, o_h, o_t, q_b, q_h, q_t, v_b, v_h, v_t, L, S, CHUNKS, HEADS,
    GROUP: tl.constexpr, V_DIV: tl.constexpr, CAUSAL: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, chunks of keys, tiles of F) with HEADS heads of features, each for GROUP query heads."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BF
    t = c * C + tl.arange(0, C)
    seen = key_ok(MASK, batch, t, S)
    slot = batch * HEADS + head
    if CAUSAL:
        slot = slot * CHUNKS + c
    cols = first + tl.arange(0, BF)
    value = V + batch * v_b + (head // V_DIV) * v_h
    rz = tl.load(RZ + slot * F + cols, mask=cols < F, other=0.0)
    acc = tl.zeros([C, BF], dtype=tl.float32) + rz[None, :]
    for d in range(0, DV, BV):
        v = load_tile(value, v_t, t, seen, d, DV, BV)
        r = load_tile_t(R + slot * F * DV, DV, cols, cols < F, d, DV, BV)
        acc = tl.dot(v.to(tl.float32), r, acc, input_precision=PRECISION)
    if CAUSAL:
        at = tl.arange(0, C)
        ok = t < L
        for g in range(GROUP):
            h = head * GROUP + g
            row = (batch * HEADS * GROUP + h) * L + t
            inverse = tl.load(INV + row, mask=ok, other=0.0)
            delta = tl.load(DELTA + row, mask=ok, other=0.0)
            grad = pairs(
                value, v_t, t, seen, DOUT + batch * o_b + h * o_h, o_t, t, ok, C, C, DV, BV, PRECISION
            )
            grad = (grad - delta[None, :]) * inverse[None, :]
            grad = tl.where(at[None, :] >= at[:, None], grad, 0.0)
            q = load_tile(FQ + batch * q_b + h * q_h, q_t, t, ok, first, F, BF)
            acc = tl.dot(grad.to(WIDE), q.to(WIDE), acc, input_precision=PRECISION)
    acc = tl.where(seen[:, None], acc, 0.0)
    row = (batch * HEADS + head) * S + t
    tl.store(
        DFK + row[:, None] * F + cols[None, :],
        acc.to(DFK.dtype.element_ty),
        mask=(t < S)[:, None] & (cols < F)[None, :],
    )


@triton.jit
def _linear_dv(
    DOUT, FQ, FK, MASK, R, INV, DV_OUT,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, L, S, CHUNKS, HEADS,
    FEATURES: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, chunks of keys, tiles of DV): HEADS value heads, each with FEATURES feature heads of GROUP
    query heads."""
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BV
    t = c * C + tl.arange(0, C)
    seen = key_ok(MASK, batch, t, S)
    acc = tl.zeros([C, BV], dtype=tl.float32)
    for e in range(FEATURES):
        features = head * FEATURES + e
        fk = FK + batch * k_b + features * k_h
        slot = batch * HEADS * FEATURES + features
        if CAUSAL:
            slot = slot * CHUNKS + c
        for f in range(0, F, BF):
            rows = f + tl.arange(0, BF)
            k = load_tile(fk, k_t, t, seen, f, F, BF)
            r = load_tile(R + slot * F * DV, DV, rows, rows < F, first, DV, BV)
            acc = tl.dot(k.to(tl.float32), r, acc, input_precision=PRECISION)
        if CAUSAL:
            at = tl.arange(0, C)
            ok = t < L
            for g in range(GROUP):
                h = features * GROUP + g
                inverse = tl.load(INV + (batch * HEADS * FEATURES * GROUP + h) * L + t, mask=ok, other=0.0)
                weights = pairs(
                    fk, k_t, t, seen, FQ + batch * q_b + h * q_h, q_t, t, ok, C, C, F, BF, PRECISION
                )
                weights = tl.where(at[None, :] >= at[:, None], weights * inverse[None, :], 0.0)
                do = load_tile(DOUT + batch * o_b + h * o_h, o_t, t, ok, first, DV, BV)
                acc = tl.dot(weights.to(WIDE), do.to(WIDE), acc, input_precision=PRECISION)
    cols = first + tl.arange(0, BV)
    row = (batch * HEADS + head) * S + t
    tl.store(
        DV_OUT + row[:, None] * DV + cols[None, :],
        acc.to(DV_OUT.dtype.element_ty),
        mask=(t < S)[:, None] & (cols < DV)[None, :],
    )


def backward(
    dout: Tensor,
    dkv: Tensor,
    dk_sum: Tensor,
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    initial: tuple[Tensor, Tensor] | None,
    out: Tensor,
    inverse: Tensor,
    causal: bool,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of fq, fk, value and of the initial state, from those of the output and of the final state."""
    fq, fk, value, dout = (rows_contiguous(x) for x in (fq, fk, value, dout))
    B, H, L, F = fq.shape
    Hf, Hkv, S, DV = fk.shape[1], value.shape[1], fk.shape[2], value.shape[3]
    chunk = chunk_size(fq.device, max(F, DV), fq.dtype)
    if normalise:
        delta = (dout.float() * out.float()).sum(-1)
    else:
        delta = torch.zeros_like(inverse)
    kv, z, *_ = states(fk, value, Hf, chunk, each=causal, mask=mask, initial=initial)
    # the gradient of the final state is where this sum starts, its end is the gradient of the initial state
    r, rz, dkv0, dz0 = states(
        fq,
        dout,
        Hf,
        chunk,
        each=causal,
        scale=inverse,
        weight=-delta * inverse,
        initial=(dkv, dk_sum),
        reverse=True,
    )
    chosen = configs.config("linear_backward", fq.device, max(F, DV), fq.dtype)
    BF, BV = tile(F, chosen.block_k), tile(DV, chosen.block_k)
    dfq, dfk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (fq, fk, value))
    common: dict[str, Any] = dict(
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, CAUSAL=causal,
        F=F, DV=DV, C=chunk, BF=BF, BV=BV, PRECISION=precision(fq.dtype),
    )  # fmt: skip
    at = {id(x): x.stride()[:3] for x in (fq, fk, value, dout)}
    sizes = (L, S, triton.cdiv(S, chunk))
    f_tiles, v_tiles, key_chunks = triton.cdiv(F, BF), triton.cdiv(DV, BV), triton.cdiv(S, chunk)
    launch(
        _linear_dfq, (B * H, triton.cdiv(L, chunk), f_tiles),
        dout, fk, value, mask, kv, z, inverse, delta, dfq, *at[id(dout)], *at[id(fk)], *at[id(value)], *sizes, H,
        K_DIV=H // Hf, V_DIV=H // Hkv, **common,
    )  # fmt: skip
    launch(
        _linear_dfk, (B * Hf, key_chunks, f_tiles),
        dout, fq, value, mask, r, rz, inverse, delta, dfk, *at[id(dout)], *at[id(fq)], *at[id(value)], *sizes, Hf,
        GROUP=H // Hf, V_DIV=Hf // Hkv, WIDE=wide(fq.dtype), **common,
    )  # fmt: skip
    launch(
        _linear_dv, (B * Hkv, key_chunks, v_tiles),
        dout, fq, fk, mask, r, inverse, dv, *at[id(dout)], *at[id(fq)], *at[id(fk)], *sizes, Hkv,
        FEATURES=Hf // Hkv, GROUP=H // Hf, WIDE=wide(fq.dtype), **common,
    )  # fmt: skip
    return dfq, dfk, dv, dkv0, dz0
