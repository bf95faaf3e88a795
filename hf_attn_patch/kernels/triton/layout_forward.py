"""Forward kernel of layout attention: softmax(edited q k^T) v over the entries of a `BlockLayout`.

One program owns a block of queries of one head. It walks the row's full entries, then its tile entries, in two loops:
a branch per entry costs registers and keeps the compiler from loading ahead (see docs/kernels.md).

Padding and room behind the text are never loaded: what is there may be NaN. A real token that shares a tile with the
edge of a window is loaded even if no query reads it (dropping its value would take V through registers in every tile).
"""

import triton
import triton.language as tl

from .scores import LN2, LOG2E, edited_scores, load_rows, token_index, visible_bits


@triton.jit
def _forward_entry(
    acc1, acc2, m, l, q1, q2, query_scale, rows, row_exists, bias_row, amount_at, q8,
    K, V, stride_k, stride_v, block, tile, bits, order, key_first, key_limit, k8, quantised_block,
    bias, stride_bias_s, amounts, stride_amount, classes, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    TILE: tl.constexpr, CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one entry of the layout into the running maximum m, sum l and output acc."""
    cols = tl.arange(0, BLOCK_K)
    check: tl.constexpr = TILE or CHECK_KEYS
    index, exists = token_index(block * BLOCK_K + cols, order, key_first, key_limit)
    if UNIFORM:
        s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    else:
        k1 = load_rows(K, index, stride_k, exists, tl.arange(0, D1), D, check)
        if q8 is not None:
            s = tl.dot(q1, tl.trans(k1), out_dtype=tl.int32)
        else:
            s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(K, index, stride_k, exists, D1 + tl.arange(0, D2), D, check)
            if q8 is not None:
                s += tl.dot(q2, tl.trans(k2), out_dtype=tl.int32)
            else:
                s += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        if q8 is not None:
            s = s.to(tl.float32) * (
                q8[:, None] * tl.load(k8 + index // quantised_block, mask=exists, other=0.0)
            )
        if (CAP > 0.0) or (EDITS > 0) or (bias is not None):
            kinds = 0
            if classes is not None:
                kinds = tl.load(classes + index, mask=exists, other=0)[None, :]
            s, _ = edited_scores(
                s, scale, query_scale, bias, bias_row[:, None] + index[None, :] * stride_bias_s,
                amounts, amount_at[:, None], stride_amount, kinds, row_exists[:, None] & exists[None, :],
                CAP, EDITS, KINDS, False,
            )  # fmt: skip
        else:
            s = s * (scale * LOG2E * query_scale)
    if TILE:
        seen = visible_bits(bits, tile, rows, cols, 0, BLOCK_Q, BLOCK_K // 32)
        if CHECK_KEYS:
            seen = seen & exists[None, :]
        s = tl.where(seen, s, float("-inf"))
    elif CHECK_KEYS:
        s = tl.where(exists[None, :], s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    if check or (bias is not None) or (EDITS > 0):  # nothing visible yet: -inf - -inf would be NaN
        base = tl.where(top == float("-inf"), 0.0, top)
    else:
        base = top
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)
    v1 = load_rows(V, index, stride_v, exists, tl.arange(0, E1), E, check)
    acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision=PRECISION)
    if E2 > 0:
        v2 = load_rows(V, index, stride_v, exists, E1 + tl.arange(0, E2), E, check)
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None], input_precision=PRECISION)
    return acc1, acc2, top, l


@triton.jit
def _layout_forward(
    Q, K, V, OUT, LSE,
    row_ptr, full_count, entries, tiles, bits, order,
    query_first, key_first, key_length,
    query_scale, bias, amounts, classes, sinks, gate, blend, q8, k8,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ol,
    stride_scale_b, stride_scale_h, stride_scale_l, stride_bias_b, stride_bias_h, stride_bias_l, stride_bias_s,
    stride_amount, stride_amount_b, stride_amount_h, stride_amount_l, stride_class_b,
    stride_gate_b, stride_gate_l, stride_gate_h, stride_blend_b, stride_blend_h, stride_blend_l,
    scale, H, group, L, S, q_blocks, layout_batch, layout_group, layout_heads, own_shift, quantised_block,
    q8_blocks, k8_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_q = q_blocks - 1 - pid % q_blocks  # causal rows get longer: start the long ones first
    b = (pid // q_blocks // H).to(tl.int64)
    h = (pid // q_blocks % H).to(tl.int64)
    hk = h // group
    layout_row = (b * (layout_batch > 1) * layout_heads + h // layout_group) * q_blocks + block_q

    first = 0
    if query_first is not None:
        first = tl.load(query_first + b)
    keys_before = 0
    if key_first is not None:
        keys_before = tl.load(key_first + b)
    key_limit = S
    if key_length is not None:
        key_limit = keys_before + tl.load(key_length + b)

    rows = tl.arange(0, BLOCK_Q)
    index, exists = token_index(block_q * BLOCK_Q + rows, order, first, L)
    begin = tl.load(row_ptr + layout_row)
    middle = begin + tl.load(full_count + layout_row)
    end = tl.load(row_ptr + layout_row + 1)
    if query_first is not None:  # a shorter row of a layout that is shared: no query left in this block
        alive = first + block_q * BLOCK_Q < L
        middle = tl.where(alive, middle, begin)
        end = tl.where(alive, end, begin)
    if gate is not None:
        gates = tl.load(
            gate + b * stride_gate_b + index * stride_gate_l + h * stride_gate_h, mask=exists, other=0.0
        ).to(tl.float32)
        if blend is None:  # a closed gate multiplies by zero whatever is computed
            open_ = tl.max(tl.abs(gates), 0) > 0
            middle = tl.where(open_, middle, begin)
            end = tl.where(open_, end, begin)

    d1 = tl.arange(0, D1)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    q1 = load_rows(Q, index, stride_ql, exists, d1, D, True)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(Q, index, stride_ql, exists, D1 + tl.arange(0, D2), D, True)
    row_scale = 1.0
    if query_scale is not None:
        row_scale = tl.load(
            query_scale + b * stride_scale_b + h * stride_scale_h + index * stride_scale_l,
            mask=exists,
            other=1.0,
        ).to(tl.float32)[:, None]
    q8_scale = None
    if q8 is not None:
        q8_scale = tl.load(q8 + (b * H + h) * q8_blocks + index // quantised_block, mask=exists, other=0.0)
        k8 += (b * (H // group) + hk) * k8_blocks
    bias_row = b * stride_bias_b + h * stride_bias_h + tl.where(exists, index, 0) * stride_bias_l
    amount_at = b * stride_amount_b + h * stride_amount_h + tl.where(exists, index, 0) * stride_amount_l
    if classes is not None:
        classes += b * stride_class_b

    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    if sinks is not None:  # one more logit in the softmax, with no value
        m = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2E
        l = tl.full([BLOCK_Q], 1.0, tl.float32)
    acc1 = tl.zeros([BLOCK_Q, E1], tl.float32)
    acc2 = m
    if E2 > 0:
        acc2 = tl.zeros([BLOCK_Q, E2], tl.float32)

    for e in range(begin, middle):
        acc1, acc2, m, l = _forward_entry(
            acc1, acc2, m, l, q1, q2, row_scale, rows, exists, bias_row, amount_at, q8_scale,
            K, V, stride_ks, stride_vs, tl.load(entries + e), 0, bits, order, keys_before, key_limit, k8,
            quantised_block, bias, stride_bias_s, amounts, stride_amount, classes, scale,
            BLOCK_Q, BLOCK_K, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, False, CHECK_KEYS, PRECISION,
        )  # fmt: skip
    for e in range(middle, end):
        acc1, acc2, m, l = _forward_entry(
            acc1, acc2, m, l, q1, q2, row_scale, rows, exists, bias_row, amount_at, q8_scale,
            K, V, stride_ks, stride_vs, tl.load(entries + e), tl.load(tiles + e), bits, order, keys_before,
            key_limit, k8, quantised_block, bias, stride_bias_s, amounts, stride_amount, classes, scale,
            BLOCK_Q, BLOCK_K, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, True, CHECK_KEYS, PRECISION,
        )  # fmt: skip

    total = tl.where(l > 0, l, 1.0)
    if LSE is not None:
        lse = tl.where(l > 0, (m + tl.log2(total)) * LN2, float("-inf"))
        tl.store(LSE + (b * H + h) * L + index, lse, mask=exists)
    factor = 1.0 / total
    OUT += b * stride_ob + h * stride_oh
    e1 = tl.arange(0, E1)
    out1 = acc1 * factor[:, None]
    if blend is not None:
        u = tl.load(
            blend + b * stride_blend_b + h * stride_blend_h + index * stride_blend_l, mask=exists, other=0.0
        )
        own = load_rows(V, index + own_shift, stride_vs, exists, e1, E, True)
        out1 = (1.0 - u[:, None]) * out1 + u[:, None] * own
    if gate is not None:
        out1 = out1 * gates[:, None]
    where = OUT + index[:, None] * stride_ol
    tl.store(where + e1[None, :], out1.to(OUT.dtype.element_ty), mask=exists[:, None] & (e1[None, :] < E))
    if E2 > 0:
        e2 = E1 + tl.arange(0, E2)
        out2 = acc2 * factor[:, None]
        if blend is not None:
            own = load_rows(V, index + own_shift, stride_vs, exists, e2, E, True)
            out2 = (1.0 - u[:, None]) * out2 + u[:, None] * own
        if gate is not None:
            out2 = out2 * gates[:, None]
        tl.store(where + e2[None, :], out2.to(OUT.dtype.element_ty), mask=exists[:, None] & (e2[None, :] < E))
