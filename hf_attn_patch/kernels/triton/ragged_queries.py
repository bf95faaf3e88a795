"""Attention of chosen (head, token) pairs only: the prefill of mixture-of-head attention.

    o_i = gate_i * softmax(scale * query_scale_i * q_i k^T over visible keys) v    for the listed rows i of a head
    o_i = 0                                                                        for the others

A program gathers a tile of listed rows of one head and walks the keys they can see: first the blocks that all of its
rows see whole, without masks, then those at the boundaries. Work follows the share of active pairs (MoH, arXiv
2410.11842, multiplies by a gate of 0 instead). Backward: dQ by the same walk; dK, dV per block of keys over the listed
rows that can see it, found by binary search since lists ascend. No atomics: results do not depend on scheduling.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .aot import Case, sizes
from .configs import Config
from .launch import launch, split_dim
from .scores import LOG2E, load_rows

# block_q: listed rows per tile; block_k: keys per block
configs.rows(
    "ragged_queries_forward",
    other=[
        (128, 2, Config(128, 64, 8, 3)),
        (256, 2, Config(64, 32, 8, 2)),
        (96, 4, Config(32, 32, 8, 2)),
        (256, 4, Config(16, 16, 4, 2)),
    ],
    gfx942=[  # 64 KiB of LDS; 8 warps would halve the registers of a thread and spill
        (128, 2, Config(128, 64, 4, 1)),
        (256, 2, Config(64, 32, 4, 1)),
        (128, 4, Config(32, 32, 4, 1)),
        (256, 4, Config(16, 32, 4, 1)),
    ],
)
configs.rows(
    "ragged_queries_dq",
    other=[
        (64, 2, Config(64, 64, 4, 2)),
        (128, 2, Config(64, 64, 8, 2)),
        (256, 2, Config(64, 32, 8, 1)),
        (128, 4, Config(16, 32, 8, 2)),
        (256, 4, Config(16, 16, 4, 2)),
    ],
    sm80=[  # D = 80 still puts 24 bytes on the stack: two accumulators of 64 and 16 columns
        (64, 2, Config(64, 32, 4, 2)),
        (128, 2, Config(64, 64, 8, 2)),
        (256, 2, Config(64, 32, 8, 1)),
        (128, 4, Config(16, 32, 8, 2)),
        (256, 4, Config(16, 16, 4, 2)),
    ],
    gfx942=[
        (128, 2, Config(64, 64, 4, 1)),
        (256, 2, Config(32, 32, 4, 1)),
        (128, 4, Config(32, 32, 4, 1)),
        (256, 4, Config(16, 16, 4, 1)),
    ],
)
_DKDV = [
    (128, 2, Config(64, 64, 8, 2)),
    (256, 2, Config(32, 32, 8, 1)),
    (128, 4, Config(32, 32, 8, 1)),
    (256, 4, Config(16, 16, 4, 1)),
]
configs.rows(
    "ragged_queries_dkdv",
    other=_DKDV,
    sm80=[(64, 2, Config(32, 64, 4, 2)), *_DKDV],
    gfx942=[
        (64, 2, Config(64, 64, 4, 1)),
        (128, 2, Config(32, 64, 4, 1)),
        (256, 2, Config(32, 32, 4, 1)),
        (128, 4, Config(32, 32, 4, 1)),
        (256, 4, Config(16, 16, 4, 1)),
    ],
)


@triton.jit
def store_rows(pointer, index, stride, exists, rows, FROM: tl.constexpr, DIM: tl.constexpr):
    """Write columns FROM.. of rows of a matrix whose last dimension is contiguous."""
    dims = FROM + tl.arange(0, rows.shape[1])
    at = pointer + index[:, None] * stride + dims[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=exists[:, None] & (dims[None, :] < DIM))


@triton.constexpr_function
def _rest(precision):
    """Factor from the units of scores to log2. Half precision: 1, as log2(e) is folded into the scale. float32 scores
    stay in natural units, since folding rounds large scores by more than exp needs."""
    return 1.4426950408889634 if precision == "ieee" else 1.0


@triton.jit
def _reach(starts, ends, b, S):
    """Columns [low, high) of the keys of batch row b."""
    low = 0
    high = S
    if starts is not None:
        low = tl.load(starts + b).to(tl.int32)
    if ends is not None:
        high = tl.minimum(tl.load(ends + b).to(tl.int32), S)
    return low, high


@triton.jit
def _walk(low, high, col_min, col_max, window, CAUSAL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Blocks of keys for rows in columns col_min .. col_max: (first, first whole, end of whole, end); whole ones are
    seen entirely by every row."""
    whole_low = low
    whole_high = high
    if CAUSAL:
        high = tl.minimum(high, col_max + 1)
        whole_high = tl.minimum(whole_high, col_min + 1)
    if window is not None:
        low = tl.maximum(low, col_min - window + 1)
        whole_low = tl.maximum(whole_low, col_max - window + 1)
    first = tl.maximum(low, 0) // BLOCK_K
    last = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_K), first)
    whole = tl.minimum(tl.cdiv(tl.maximum(whole_low, 0), BLOCK_K), last)
    whole_end = tl.minimum(tl.maximum(tl.maximum(whole_high, 0) // BLOCK_K, whole), last)
    return first, whole, whole_end, last


@triton.jit
def _rows(tokens, offsets, segment, tile, q_offset, BLOCK_Q: tl.constexpr):
    """(place in the list, row int64, column, exists, least column, largest column) of a tile of listed rows."""
    begin = tl.load(offsets + segment).to(tl.int32)
    end = tl.load(offsets + segment + 1).to(tl.int32)
    place = begin + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = place < end
    token = tl.load(tokens + place, mask=exists, other=0)
    col = token.to(tl.int32) + q_offset
    col_min = tl.min(tl.where(exists, col, 2147483647), 0)
    col_max = tl.max(tl.where(exists, col, -1), 0)
    return place, token.to(tl.int64), col, exists, col_min, col_max


@triton.jit
def _seen(q_col, k_col, low, high, window, CAUSAL: tl.constexpr):
    """Visibility; columns come shaped [Q, 1] and [1, K] or the other way round."""
    seen = (k_col >= low) & (k_col < high)
    if CAUSAL:
        seen = seen & (k_col <= q_col)
    else:
        seen = seen & (q_col == q_col)
    if window is not None:
        seen = seen & (k_col > q_col - window)
    return seen


@triton.jit
def _forward_block(
    acc1, acc2, m, l, q1, q2, factor, col, key, value, stride_ks, stride_vs, block, low, high, window,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running maximum m, sum l and output acc."""
    k_col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    real = (k_col >= low) & (k_col < high)  # memory elsewhere may hold NaN, and 0 * NaN is NaN
    index = k_col.to(tl.int64)
    k1 = load_rows(key, index, stride_ks, real, tl.arange(0, D1), D, MASKED)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(key, index, stride_ks, real, D1 + tl.arange(0, D2), D, MASKED)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    s *= factor[:, None]
    if MASKED:
        s = tl.where(_seen(col[:, None], k_col[None, :], low, high, window, CAUSAL), s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    base = top
    if MASKED:
        base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2((s - base[:, None]) * _rest(PRECISION))
    shrink = tl.exp2((m - base) * _rest(PRECISION))
    l = l * shrink + tl.sum(p, 1)
    v1 = load_rows(value, index, stride_vs, real, tl.arange(0, E1), E, MASKED)
    acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision=PRECISION)
    if E2 > 0:
        v2 = load_rows(value, index, stride_vs, real, E1 + tl.arange(0, E2), E, MASKED)
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None], input_precision=PRECISION)
    return acc1, acc2, top, l


@triton.jit
def _ragged_queries_forward(
    query, key, value, out, lse, tokens, offsets, starts, ends, query_scale, head_gate,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ol, stride_sb, stride_sh, stride_sl, stride_gb, stride_gl, stride_gh,
    H, G, S, q_offset, window, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of listed rows of one head: output rows, and log-sum-exp (in units of scores) by place in the list."""
    segment = tl.program_id(1)
    b = (segment // H).to(tl.int64)
    h = (segment % H).to(tl.int64)
    # the last rows of a causal prefill see the most keys, so they start first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    place, token, col, exists, col_min, col_max = _rows(tokens, offsets, segment, tile, q_offset, BLOCK_Q)
    low, high = _reach(starts, ends, b, S)
    high = tl.where(col_max < 0, 0, high)  # a tile past the end of the list
    first, whole, whole_end, last = _walk(low, high, col_min, col_max, window, CAUSAL, BLOCK_K)

    q_rows = query + b * stride_qb + h * stride_qh
    q1 = load_rows(q_rows, token, stride_ql, exists, tl.arange(0, D1), D, True)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_rows, token, stride_ql, exists, D1 + tl.arange(0, D2), D, True)
    factor = tl.full([BLOCK_Q], LOG2E / _rest(PRECISION), tl.float32) * scale
    if query_scale is not None:
        at = query_scale + b * stride_sb + h * stride_sh + token * stride_sl
        factor *= tl.load(at, mask=exists, other=0.0).to(tl.float32)
    k_rows = key + b * stride_kb + h // G * stride_kh
    v_rows = value + b * stride_vb + h // G * stride_vh
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, E1], tl.float32)
    acc2 = l
    if E2 > 0:
        acc2 = tl.zeros([BLOCK_Q, E2], tl.float32)
    for block in range(whole, whole_end):
        acc1, acc2, m, l = _forward_block(
            acc1, acc2, m, l, q1, q2, factor, col, k_rows, v_rows, stride_ks, stride_vs, block, low, high, window,
            D, D1, D2, E, E1, E2, CAUSAL, False, BLOCK_K, PRECISION,
        )  # fmt: skip
    for step in range(first, last - (whole_end - whole)):
        block = tl.where(step < whole, step, step + (whole_end - whole))
        acc1, acc2, m, l = _forward_block(
            acc1, acc2, m, l, q1, q2, factor, col, k_rows, v_rows, stride_ks, stride_vs, block, low, high, window,
            D, D1, D2, E, E1, E2, CAUSAL, True, BLOCK_K, PRECISION,
        )  # fmt: skip

    some = l > 0.0
    divisor = tl.where(some, l, 1.0)
    tl.store(lse + place, tl.where(some, m + tl.log2(divisor) / _rest(PRECISION), float("-inf")), mask=exists)
    weight = 1.0 / divisor
    if head_gate is not None:
        at = head_gate + b * stride_gb + token * stride_gl + h * stride_gh
        weight *= tl.load(at, mask=exists, other=0.0).to(tl.float32)
    store_rows(out + b * stride_ob + h * stride_oh, token, stride_ol, exists, acc1 * weight[:, None], 0, E)
    if E2 > 0:
        store_rows(
            out + b * stride_ob + h * stride_oh, token, stride_ol, exists, acc2 * weight[:, None], E1, E
        )


@triton.jit
def _dq_block(
    dq1, dq2, q1, q2, do1, do2, factor, log_sum, delta, col, key, value, stride_ks, stride_vs, block, low, high, window,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to dQ (still without the scale)."""
    k_col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    real = (k_col >= low) & (k_col < high)
    index = k_col.to(tl.int64)
    k1 = load_rows(key, index, stride_ks, real, tl.arange(0, D1), D, MASKED)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    v1 = load_rows(value, index, stride_vs, real, tl.arange(0, E1), E, MASKED)
    dp = tl.dot(do1, tl.trans(v1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(key, index, stride_ks, real, D1 + tl.arange(0, D2), D, MASKED)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    if E2 > 0:
        v2 = load_rows(value, index, stride_vs, real, E1 + tl.arange(0, E2), E, MASKED)
        dp = tl.dot(do2, tl.trans(v2), dp, input_precision=PRECISION)
    p = tl.exp2((s * factor[:, None] - log_sum[:, None]) * _rest(PRECISION))
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(_seen(col[:, None], k_col[None, :], low, high, window, CAUSAL), ds, 0.0)
    dq1 = tl.dot(ds.to(k1.dtype), k1, dq1, input_precision=PRECISION)
    if D2 > 0:
        dq2 = tl.dot(ds.to(k1.dtype), k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit
def _ragged_queries_dq(
    query, key, value, out, dout, dq, lse, delta, tokens, offsets, starts, ends, query_scale, head_gate,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ol, stride_db, stride_dh, stride_dl, stride_rb, stride_rh, stride_rl,
    stride_sb, stride_sh, stride_sl, stride_gb, stride_gl, stride_gh,
    H, G, S, q_offset, window, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of listed rows, and delta = do . o of each, by place in the list, for dK and dV."""
    segment = tl.program_id(1)
    b = (segment // H).to(tl.int64)
    h = (segment % H).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    place, token, col, exists, col_min, col_max = _rows(tokens, offsets, segment, tile, q_offset, BLOCK_Q)
    low, high = _reach(starts, ends, b, S)
    high = tl.where(col_max < 0, 0, high)
    first, whole, whole_end, last = _walk(low, high, col_min, col_max, window, CAUSAL, BLOCK_K)

    q_rows = query + b * stride_qb + h * stride_qh
    o_rows = out + b * stride_ob + h * stride_oh
    do_rows = dout + b * stride_db + h * stride_dh
    q1 = load_rows(q_rows, token, stride_ql, exists, tl.arange(0, D1), D, True)
    o1 = load_rows(o_rows, token, stride_ol, exists, tl.arange(0, E1), E, True)
    do1 = load_rows(do_rows, token, stride_dl, exists, tl.arange(0, E1), E, True)
    sums = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    gate = tl.full([BLOCK_Q], 1.0, tl.float32)
    if head_gate is not None:
        at = head_gate + b * stride_gb + token * stride_gl + h * stride_gh
        gate = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        do1 = (do1.to(tl.float32) * gate[:, None]).to(do1.dtype)
    q2 = q1
    do2 = do1
    if D2 > 0:
        q2 = load_rows(q_rows, token, stride_ql, exists, D1 + tl.arange(0, D2), D, True)
    if E2 > 0:
        o2 = load_rows(o_rows, token, stride_ol, exists, E1 + tl.arange(0, E2), E, True)
        do2 = load_rows(do_rows, token, stride_dl, exists, E1 + tl.arange(0, E2), E, True)
        sums += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
        if head_gate is not None:
            do2 = (do2.to(tl.float32) * gate[:, None]).to(do2.dtype)
    tl.store(delta + place, sums, mask=exists)
    log_sum = tl.load(lse + place, mask=exists, other=0.0)
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
    factor = tl.full([BLOCK_Q], 1.0, tl.float32) * scale
    if query_scale is not None:
        at = query_scale + b * stride_sb + h * stride_sh + token * stride_sl
        factor *= tl.load(at, mask=exists, other=0.0).to(tl.float32)
    k_rows = key + b * stride_kb + h // G * stride_kh
    v_rows = value + b * stride_vb + h // G * stride_vh
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    dq2 = gate
    if D2 > 0:
        dq2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    to_units = factor * (LOG2E / _rest(PRECISION))
    for block in range(whole, whole_end):
        dq1, dq2 = _dq_block(
            dq1, dq2, q1, q2, do1, do2, to_units, log_sum, sums, col, k_rows, v_rows, stride_ks, stride_vs,
            block, low, high, window, D, D1, D2, E, E1, E2, CAUSAL, False, BLOCK_K, PRECISION,
        )  # fmt: skip
    for step in range(first, last - (whole_end - whole)):
        block = tl.where(step < whole, step, step + (whole_end - whole))
        dq1, dq2 = _dq_block(
            dq1, dq2, q1, q2, do1, do2, to_units, log_sum, sums, col, k_rows, v_rows, stride_ks, stride_vs,
            block, low, high, window, D, D1, D2, E, E1, E2, CAUSAL, True, BLOCK_K, PRECISION,
        )  # fmt: skip
    store_rows(dq + b * stride_rb + h * stride_rh, token, stride_rl, exists, dq1 * factor[:, None], 0, D)
    if D2 > 0:
        store_rows(dq + b * stride_rb + h * stride_rh, token, stride_rl, exists, dq2 * factor[:, None], D1, D)


@triton.jit
def _first_at_least(tokens, begin, end, bound, steps):
    """First place in the ascending tokens[begin:end] whose token is at least `bound`, by `steps` halvings."""
    for _ in range(steps):
        middle = (begin + end) // 2
        open = begin < end
        below = open & (tl.load(tokens + middle, mask=open, other=0).to(tl.int32) < bound)
        end = tl.where(open & (below == 0), middle, end)
        begin = tl.where(below, middle + 1, begin)
    return begin


@triton.jit
def _ragged_queries_dkdv(
    query, key, value, dout, dk, dv, lse, delta, tokens, offsets, starts, ends, query_scale, head_gate,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dl, stride_rb, stride_rh, stride_rs, stride_wb, stride_wh, stride_ws,
    stride_sb, stride_sh, stride_sl, stride_gb, stride_gl, stride_gh,
    H, G, S, q_offset, window, steps, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys: the listed rows of every query head of the group that can see it, [keys, rows]."""
    block = tl.program_id(0)
    kv_heads = H // G
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    low, high = _reach(starts, ends, b, S)
    k_col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    real = (k_col >= low) & (k_col < high)
    index = k_col.to(tl.int64)
    k_rows = key + b * stride_kb + kv * stride_kh
    v_rows = value + b * stride_vb + kv * stride_vh
    k1 = load_rows(k_rows, index, stride_ks, real, tl.arange(0, D1), D, True)
    v1 = load_rows(v_rows, index, stride_vs, real, tl.arange(0, E1), E, True)
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, E1], tl.float32)
    if D2 > 0:
        k2 = load_rows(k_rows, index, stride_ks, real, D1 + tl.arange(0, D2), D, True)
        dk2 = tl.zeros([BLOCK_K, D2], tl.float32)
    if E2 > 0:
        v2 = load_rows(v_rows, index, stride_vs, real, E1 + tl.arange(0, E2), E, True)
        dv2 = tl.zeros([BLOCK_K, E2], tl.float32)
    for g in range(G):
        h = kv * G + g
        segment = b * H + h
        begin = tl.load(offsets + segment).to(tl.int32)
        end = tl.load(offsets + segment + 1).to(tl.int32)
        if window is not None:
            end = _first_at_least(tokens, begin, end, (block + 1) * BLOCK_K - 1 + window - q_offset, steps)
        if CAUSAL:
            begin = _first_at_least(tokens, begin, end, block * BLOCK_K - q_offset, steps)
        q_rows = query + b * stride_qb + h * stride_qh
        do_rows = dout + b * stride_db + h * stride_dh
        for place_from in range(begin, end, BLOCK_Q):
            place = place_from + tl.arange(0, BLOCK_Q)
            exists = place < end
            token = tl.load(tokens + place, mask=exists, other=0)
            col = token.to(tl.int32) + q_offset
            token = token.to(tl.int64)
            log_sum = tl.load(lse + place, mask=exists, other=0.0)
            log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
            sums = tl.load(delta + place, mask=exists, other=0.0)
            q1 = load_rows(q_rows, token, stride_ql, exists, tl.arange(0, D1), D, True)
            s = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
            if D2 > 0:
                q2 = load_rows(q_rows, token, stride_ql, exists, D1 + tl.arange(0, D2), D, True)
                s = tl.dot(k2, tl.trans(q2), s, input_precision=PRECISION)
            factor = tl.full([BLOCK_Q], 1.0, tl.float32)
            if query_scale is not None:
                at = query_scale + b * stride_sb + h * stride_sh + token * stride_sl
                factor = tl.load(at, mask=exists, other=0.0).to(tl.float32)
            seen = _seen(col[None, :], k_col[:, None], low, high, window, CAUSAL) & exists[None, :]
            s *= (factor * (scale * (LOG2E / _rest(PRECISION))))[None, :]
            p = tl.where(seen, tl.exp2((s - log_sum[None, :]) * _rest(PRECISION)), 0.0)
            do1 = load_rows(do_rows, token, stride_dl, exists, tl.arange(0, E1), E, True)
            if head_gate is not None:
                at = head_gate + b * stride_gb + token * stride_gl + h * stride_gh
                gate = tl.load(at, mask=exists, other=0.0).to(tl.float32)[:, None]
                do1 = (do1.to(tl.float32) * gate).to(do1.dtype)
            dv1 = tl.dot(p.to(do1.dtype), do1, dv1, input_precision=PRECISION)
            dp = tl.dot(v1, tl.trans(do1), input_precision=PRECISION)
            if E2 > 0:
                do2 = load_rows(do_rows, token, stride_dl, exists, E1 + tl.arange(0, E2), E, True)
                if head_gate is not None:
                    do2 = (do2.to(tl.float32) * gate).to(do2.dtype)
                dv2 = tl.dot(p.to(do2.dtype), do2, dv2, input_precision=PRECISION)
                dp = tl.dot(v2, tl.trans(do2), dp, input_precision=PRECISION)
            ds = p * (dp - sums[None, :])
            if query_scale is not None:
                ds *= factor[None, :]
            dk1 = tl.dot(ds.to(q1.dtype), q1, dk1, input_precision=PRECISION)
            if D2 > 0:
                dk2 = tl.dot(ds.to(q1.dtype), q2, dk2, input_precision=PRECISION)
    inside = k_col < S
    store_rows(dk + b * stride_rb + kv * stride_rh, index, stride_rs, inside, dk1 * scale, 0, D)
    store_rows(dv + b * stride_wb + kv * stride_wh, index, stride_ws, inside, dv1, 0, E)
    if D2 > 0:
        store_rows(dk + b * stride_rb + kv * stride_rh, index, stride_rs, inside, dk2 * scale, D1, D)
    if E2 > 0:
        store_rows(dv + b * stride_wb + kv * stride_wh, index, stride_ws, inside, dv2, E1, E)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _row_factors(
    query: Tensor, query_scale: Tensor | None, head_gate: Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Factors of scores [B, H, L, 1] and of outputs [B, L, H] as views, and their strides."""
    B, H, L, _ = query.shape
    query_scale = None if query_scale is None else query_scale.expand(B, H, L, 1)
    head_gate = None if head_gate is None else head_gate.expand(B, L, H)
    strides: tuple[int, ...] = ()
    for x in (query_scale, head_gate):
        strides += (0, 0, 0) if x is None else tuple(x.stride()[:3])
    return query_scale, head_gate, strides


def _constants(kernel: str, query: Tensor, D: int, E: int, causal: bool) -> tuple[Config, dict[str, Any]]:
    config = configs.config(kernel, query.device, max(D, E), query.dtype)
    (D1, D2), (E1, E2) = split_dim(D), split_dim(E)
    names: dict[str, Any] = dict(D=D, D1=D1, D2=D2, E=E, E1=E1, E2=E2, CAUSAL=causal, BLOCK_Q=config.block_q)
    names |= dict(BLOCK_K=config.block_k, PRECISION="ieee" if query.dtype == torch.float32 else "tf32")
    return config, dict(num_warps=config.num_warps, num_stages=config.num_stages, **names)


def _forward_impl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    max_count: int,
    scale: float,
    q_offset: int,
    causal: bool,
    starts: Tensor | None,
    ends: Tensor | None,
    window: int | None,
    head_gate: Tensor | None,
    query_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output [B, H, L, Dv], log-sum-exp in the kernels' units of scores float32 [N] by place in the list)."""
    B, H, L, D = query.shape
    n, S, E = value.shape[1:]
    config, constants = _constants("ragged_queries_forward", query, D, E, causal)
    query, key, value = _dense_last(query), _dense_last(key), _dense_last(value)
    query_scale, head_gate, factor_strides = _row_factors(query, query_scale, head_gate)
    out = torch.zeros((B, H, L, E), dtype=query.dtype, device=query.device)
    lse = torch.empty(tokens.shape, dtype=torch.float32, device=query.device)
    launch(
        _ragged_queries_forward, (triton.cdiv(max_count, config.block_q), B * H),
        query, key, value, out, lse, tokens, offsets, starts, ends, query_scale, head_gate,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *factor_strides,
        H, H // n, S, q_offset, window, scale, **constants,
    )  # fmt: skip
    return out, lse


def _backward_impl(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    max_count: int,
    scale: float,
    q_offset: int,
    causal: bool,
    starts: Tensor | None,
    ends: Tensor | None,
    window: int | None,
    head_gate: Tensor | None,
    query_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    B, H, L, D = query.shape
    n, S, E = value.shape[1:]
    query, key, value, dout = _dense_last(query), _dense_last(key), _dense_last(value), _dense_last(dout)
    query_scale, head_gate, factor_strides = _row_factors(query, query_scale, head_gate)
    dq = torch.zeros((B, H, L, D), dtype=query.dtype, device=query.device)
    dk = torch.empty((B, n, S, D), dtype=key.dtype, device=query.device)
    dv = torch.empty((B, n, S, E), dtype=value.dtype, device=query.device)
    delta = torch.empty_like(lse)
    config, constants = _constants("ragged_queries_dq", query, D, E, causal)
    launch(
        _ragged_queries_dq, (triton.cdiv(max_count, config.block_q), B * H),
        query, key, value, out, dout, dq, lse, delta, tokens, offsets, starts, ends, query_scale, head_gate,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *dout.stride()[:3],
        *dq.stride()[:3], *factor_strides, H, H // n, S, q_offset, window, scale, **constants,
    )  # fmt: skip
    config, constants = _constants("ragged_queries_dkdv", query, D, E, causal)
    launch(
        _ragged_queries_dkdv, (triton.cdiv(S, config.block_k), B * n),
        query, key, value, dout, dk, dv, lse, delta, tokens, offsets, starts, ends, query_scale, head_gate,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], *factor_strides,
        H, H // n, S, q_offset, window, max_count.bit_length(), scale, **constants,
    )  # fmt: skip
    return dq, dk, dv


_op = torch.library.custom_op("hf_attn_patch::ragged_query_attention", mutates_args=())(_forward_impl)
_backward_op = torch.library.custom_op("hf_attn_patch::ragged_query_attention_backward", mutates_args=())(
    _backward_impl
)


@_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(tokens.shape, dtype=torch.float32)


@_backward_op.register_fake
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tokens, offsets, *options, starts, ends, ctx.window, head_gate, query_scale = inputs
    ctx.options = options
    ctx.save_for_backward(query, key, value, *output, tokens, offsets, starts, ends, head_gate, query_scale)


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, starts, ends, head_gate, query_scale = ctx.saved_tensors
    rest = (starts, ends, ctx.window, head_gate, query_scale)
    return (*_backward_op(dout, *tensors, *ctx.options, *rest), *[None] * 11)


_op.register_autograd(_backward, setup_context=_setup_context)


def token_lists(active: Tensor) -> tuple[Tensor, Tensor, int]:
    """Lists of active rows per (batch, head), as `ragged_query_attention` takes them; waits for the device once.

    Args:
        active: bool [B, L, H].

    Returns:
        (tokens int32 [N], ascending within a segment; offsets int32 [B * H + 1]; length of the longest segment).
    """
    B, L, H = active.shape
    flags = active.transpose(1, 2).reshape(B * H, L)
    counts = flags.sum(1)
    total, longest = torch.stack([counts.sum(), counts.max()]).tolist() if flags.numel() else (0, 0)
    offsets = torch.zeros(B * H + 1, dtype=torch.int32, device=active.device)
    offsets[1:] = counts.cumsum(0)
    # place of every active pair in the list; the others share a place past its end
    place = torch.where(flags.reshape(-1), flags.reshape(-1).cumsum(0) - 1, total)
    rows = torch.arange(L, dtype=torch.int32, device=active.device).repeat(B * H)
    tokens = torch.zeros(total + 1, dtype=torch.int32, device=active.device).scatter_(0, place, rows)
    return tokens[:total], offsets, longest


def ragged_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    max_count: int,
    *,
    scale: float,
    q_offset: int = 0,
    causal: bool = True,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    window: int | None = None,
    head_gate: Tensor | None = None,
    query_scale: Tensor | None = None,
) -> Tensor:
    """Attention of the listed (head, token) pairs; other rows of the output are 0. Differentiable in q, k and v.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv], Hkv divides H; key j is in column j.
        tokens: int32 [N], rows (0 .. L - 1) of all (batch, head) segments, ascending within each; offsets: int32
            [B * H + 1], where each segment begins; max_count: length of the longest one (see `token_lists`).
        scale: softmax scale. q_offset: column of row 0.
        causal: key column <= query column. window: key column > query column - window (the own key counts).
        starts, ends: int32 [B], keys in columns [start, end) exist (left and right padding).
        head_gate: broadcastable to [B, L, H], multiplies the output. query_scale: broadcastable to [B, H, L, 1].

    Returns:
        [B, H, L, Dv]; 0 where a pair is not listed or sees no key.

    Raises:
        ValueError: shapes or dtypes that do not fit; gate or query scale that requires a gradient (there is none:
            multiply the output by the gate instead).
    """
    for name, x in (("head_gate", head_gate), ("query_scale", query_scale)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"ragged_query_attention: {name} requires a gradient, which this kernel does not compute; "
                "multiply the output (the query) by it outside"
            )
    B, H = query.shape[:2]
    if (
        key.shape[:3] != value.shape[:3]
        or key.shape[0] != B
        or key.shape[3] != query.shape[3]
        or H % key.shape[1]
    ):
        raise ValueError(
            f"ragged_query_attention: query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} "
            "do not fit"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"ragged_query_attention: query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; want one dtype"
        )
    if offsets.shape != (B * H + 1,):
        raise ValueError(f"ragged_query_attention: offsets {list(offsets.shape)}, expected [{B * H + 1}]")
    return _op(
        query, key, value, tokens, offsets, max_count, scale, q_offset, causal, starts, ends, window, head_gate,
        query_scale,
    )[0]  # fmt: skip


def aot_cases() -> list[Case]:
    """Everything a user can ask for, by dtype, head dimension and combination of options."""

    def case(name: str, dtype: torch.dtype, dim: int, kind: str, backward: bool, default: bool) -> Case:
        meta = functools.partial(torch.empty, device="meta")
        B, H, n, L, S, N = 2, 8, 2, 1024, 1024, 4096
        ints = lambda *shape: meta(shape, dtype=torch.int32)

        def run() -> None:
            q = meta((B, L, H, dim), dtype=dtype).transpose(1, 2)
            k, v = (meta((B, S, n, dim), dtype=dtype).transpose(1, 2) for _ in range(2))
            given: dict[str, Any] = dict.fromkeys(("starts", "ends", "window", "head_gate", "query_scale"))
            given |= {"scale": 0.125, "q_offset": 0, "causal": kind != "bidirectional"}
            if kind != "plain":
                given |= {"starts": ints(B)}
            if kind == "bidirectional":
                given |= {"ends": ints(B)}
            if kind == "window":
                given |= {"window": 512}
            if kind == "gate":
                given |= {"head_gate": meta((B, L, H), dtype=dtype), "query_scale": meta((1, 1, L, 1))}
            if backward:
                out = meta((B, H, L, dim), dtype=dtype)
                lse = meta((N,), dtype=torch.float32)
                _backward_impl(out, q, k, v, out, lse, ints(N), ints(B * H + 1), 400, **given)
            else:
                _forward_impl(q, k, v, ints(N), ints(B * H + 1), 400, **given)

        way = "backward" if backward else "forward"
        return Case(f"ragged_queries {way} {kind} {name} D{dim}", run, default)

    usual = {(64, "padded", True), (128, "padded", False), (128, "padded", True), (128, "gate", False)}
    return [
        case(name, dtype, dim, kind, backward, options and (dim, kind, backward) in usual)
        for name, dtype, dim, options in sizes()
        for kind in (("plain", "padded", "bidirectional", "window", "gate") if options else ("plain",))
        for backward in (False, True)
    ]
