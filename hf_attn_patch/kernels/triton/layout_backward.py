"""Backward kernels of layout attention: dQ over the layout, dK and dV over its transpose (no atomics, deterministic).

Probabilities are rebuilt from the saved log-sum-exp. Score edits and softcap act elementwise, so their chain rule is
one factor per element (`slope`). With P the probabilities, dP = dO V^T and delta_i = dO_i . O_i:
dS = P (dP - delta) slope,  dQ = c dS K,  dK = c dS^T Q,  dV = P^T dO   (c = scale * query_scale of the row).
"""

import triton
import triton.language as tl

from .scores import LOG2E, edited_scores, load_rows, token_index, visible_bits


@triton.jit
def _layout_delta(
    OUT, DO, DELTA, stride_ob, stride_oh, stride_ol, stride_db, stride_dh, stride_dl, H, L, blocks,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L] = sum over the value dimension of dO * O."""
    pid = tl.program_id(0)
    block = pid % blocks
    b = (pid // blocks // H).to(tl.int64)
    h = (pid // blocks % H).to(tl.int64)
    index, exists = token_index(block * BLOCK_Q + tl.arange(0, BLOCK_Q), None, 0, L)
    OUT += b * stride_ob + h * stride_oh
    DO += b * stride_db + h * stride_dh
    e1 = tl.arange(0, E1)
    out = load_rows(OUT, index, stride_ol, exists, e1, E, True).to(tl.float32)
    delta = tl.sum(out * load_rows(DO, index, stride_dl, exists, e1, E, True).to(tl.float32), 1)
    if E2 > 0:
        e2 = E1 + tl.arange(0, E2)
        out = load_rows(OUT, index, stride_ol, exists, e2, E, True).to(tl.float32)
        delta += tl.sum(out * load_rows(DO, index, stride_dl, exists, e2, E, True).to(tl.float32), 1)
    tl.store(DELTA + (b * H + h) * L + index, delta, mask=exists)


@triton.jit
def _dq_part(
    dq1, dq2, q1, q2, do1, do2, lse, delta, query_scale, rows, row_exists, bias_row, amount_at,
    K, V, stride_k, stride_v, block, part, tile, bits, order, key_first, key_limit,
    bias, stride_bias_s, amounts, stride_amount, classes, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    TILE: tl.constexpr, CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of `STEP` keys of one entry."""
    cols = tl.arange(0, STEP)
    check: tl.constexpr = TILE or CHECK_KEYS
    index, exists = token_index(block * BLOCK_K + part * STEP + cols, order, key_first, key_limit)
    k1 = load_rows(K, index, stride_k, exists, tl.arange(0, D1), D, check)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(K, index, stride_k, exists, D1 + tl.arange(0, D2), D, check)
        s += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
    if (CAP > 0.0) or (EDITS > 0) or (bias is not None):
        kinds = 0
        if classes is not None:
            kinds = tl.load(classes + index, mask=exists, other=0)[None, :]
        s, slope = edited_scores(
            s, scale, query_scale, bias, bias_row[:, None] + index[None, :] * stride_bias_s,
            amounts, amount_at[:, None], stride_amount, kinds, row_exists[:, None] & exists[None, :],
            CAP, EDITS, KINDS, True,
        )  # fmt: skip
    else:
        s = s * (scale * LOG2E * query_scale)
        slope = 1.0
    p = tl.exp2(s - lse[:, None])
    if TILE:
        seen = visible_bits(bits, tile, rows, cols, part * STEP // 32, BLOCK_Q, BLOCK_K // 32)
        if CHECK_KEYS:
            seen = seen & exists[None, :]
        p = tl.where(seen, p, 0.0)
    elif CHECK_KEYS:
        p = tl.where(exists[None, :], p, 0.0)
    v1 = load_rows(V, index, stride_v, exists, tl.arange(0, E1), E, check)
    dp = tl.dot(do1, tl.trans(v1), input_precision=PRECISION)
    if E2 > 0:
        v2 = load_rows(V, index, stride_v, exists, E1 + tl.arange(0, E2), E, check)
        dp += tl.dot(do2, tl.trans(v2), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None]) * slope).to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit
def _layout_dq(
    Q, K, V, DO, DQ, LSE, DELTA,
    row_ptr, full_count, entries, tiles, bits, order,
    query_first, key_first, key_length,
    query_scale, bias, amounts, classes,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dl, stride_dqb, stride_dqh, stride_dql,
    stride_scale_b, stride_scale_h, stride_scale_l, stride_bias_b, stride_bias_h, stride_bias_l, stride_bias_s,
    stride_amount, stride_amount_b, stride_amount_h, stride_amount_l, stride_class_b,
    scale, H, group, L, S, q_blocks, layout_batch, layout_group, layout_heads,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_q = q_blocks - 1 - pid % q_blocks
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
    if query_first is not None:
        alive = first + block_q * BLOCK_Q < L
        middle = tl.where(alive, middle, begin)
        end = tl.where(alive, end, begin)

    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    DO += b * stride_db + h * stride_dh
    d1 = tl.arange(0, D1)
    e1 = tl.arange(0, E1)
    q1 = load_rows(Q, index, stride_ql, exists, d1, D, True)
    do1 = load_rows(DO, index, stride_dl, exists, e1, E, True)
    q2 = q1
    do2 = do1
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        q2 = load_rows(Q, index, stride_ql, exists, D1 + tl.arange(0, D2), D, True)
        dq2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    if E2 > 0:
        do2 = load_rows(DO, index, stride_dl, exists, E1 + tl.arange(0, E2), E, True)
    lse = tl.load(LSE + (b * H + h) * L + index, mask=exists, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows that saw nothing: probabilities 0
    delta = tl.load(DELTA + (b * H + h) * L + index, mask=exists, other=0.0)
    row_scale = 1.0
    if query_scale is not None:
        row_scale = tl.load(
            query_scale + b * stride_scale_b + h * stride_scale_h + index * stride_scale_l,
            mask=exists,
            other=1.0,
        ).to(tl.float32)[:, None]
    bias_row = b * stride_bias_b + h * stride_bias_h + tl.where(exists, index, 0) * stride_bias_l
    amount_at = b * stride_amount_b + h * stride_amount_h + tl.where(exists, index, 0) * stride_amount_l
    if classes is not None:
        classes += b * stride_class_b

    # entries in parts of STEP keys, as one flat loop: an unrolled inner loop spills
    parts: tl.constexpr = BLOCK_K // STEP
    for i in range(begin * parts, middle * parts):
        dq1, dq2 = _dq_part(
            dq1, dq2, q1, q2, do1, do2, lse, delta, row_scale, rows, exists, bias_row, amount_at,
            K, V, stride_ks, stride_vs, tl.load(entries + i // parts), i % parts, 0, bits, order, keys_before,
            key_limit, bias, stride_bias_s, amounts, stride_amount, classes, scale,
            BLOCK_Q, BLOCK_K, STEP, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, False, CHECK_KEYS, PRECISION,
        )  # fmt: skip
    for i in range(middle * parts, end * parts):
        dq1, dq2 = _dq_part(
            dq1, dq2, q1, q2, do1, do2, lse, delta, row_scale, rows, exists, bias_row, amount_at,
            K, V, stride_ks, stride_vs, tl.load(entries + i // parts), i % parts, tl.load(tiles + i // parts), bits,
            order, keys_before, key_limit, bias, stride_bias_s, amounts, stride_amount, classes, scale,
            BLOCK_Q, BLOCK_K, STEP, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, True, CHECK_KEYS, PRECISION,
        )  # fmt: skip

    DQ += b * stride_dqb + h * stride_dqh
    where = DQ + index[:, None] * stride_dql
    dq1 = dq1 * (scale * row_scale)
    tl.store(where + d1[None, :], dq1.to(DQ.dtype.element_ty), mask=exists[:, None] & (d1[None, :] < D))
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        dq2 = dq2 * (scale * row_scale)
        tl.store(where + d2[None, :], dq2.to(DQ.dtype.element_ty), mask=exists[:, None] & (d2[None, :] < D))


@triton.jit
def _dkv_part(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, rows, key_index, key_exists, kinds,
    Q, DO, LSE, DELTA, stride_q, stride_d, block, part, tile, bits, order, query_first, query_limit,
    query_scale, stride_scale_l, bias, stride_bias_l, stride_bias_s, amounts, stride_amount, stride_amount_l, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of `STEP` queries of one entry; scores are held as [keys, queries]."""
    cols = tl.arange(0, STEP)
    index, exists = token_index(block * BLOCK_Q + part * STEP + cols, order, query_first, query_limit)
    at = tl.where(exists, index, 0)
    # queries that do not exist: infinite log-sum-exp, so their probabilities are 0
    lse = tl.load(LSE + index, mask=exists, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    row_scale = 1.0
    if query_scale is not None:
        row_scale = tl.load(query_scale + at * stride_scale_l).to(tl.float32)[None, :]
    slope = 1.0
    q1 = load_rows(Q, index, stride_q, exists, tl.arange(0, D1), D, True)
    s = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
    if D2 > 0:
        q2 = load_rows(Q, index, stride_q, exists, D1 + tl.arange(0, D2), D, True)
        s += tl.dot(k2, tl.trans(q2), input_precision=PRECISION)
    if UNIFORM:
        s = tl.zeros([BLOCK_K, STEP], tl.float32)
    elif (CAP > 0.0) or (EDITS > 0) or (bias is not None):
        s, slope = edited_scores(
            s, scale, row_scale, bias, at[None, :] * stride_bias_l + key_index[:, None] * stride_bias_s,
            amounts, (at * stride_amount_l)[None, :], stride_amount, kinds, key_exists[:, None] & exists[None, :],
            CAP, EDITS, KINDS, True,
        )  # fmt: skip
    else:
        s = s * (scale * LOG2E * row_scale)
    p = tl.exp2(s - lse[None, :])
    seen = key_exists[:, None]
    if TILE:
        seen = seen & visible_bits(bits, tile, rows, cols, part * STEP // 32, BLOCK_K, BLOCK_Q // 32)
    p = tl.where(seen, p, 0.0)
    do1 = load_rows(DO, index, stride_d, exists, tl.arange(0, E1), E, True)
    dv1 = tl.dot(p.to(do1.dtype), do1, dv1, input_precision=PRECISION)
    if E2 > 0:
        do2 = load_rows(DO, index, stride_d, exists, E1 + tl.arange(0, E2), E, True)
        dv2 = tl.dot(p.to(do2.dtype), do2, dv2, input_precision=PRECISION)
    if not UNIFORM:
        delta = tl.load(DELTA + index, mask=exists, other=0.0)
        dp = tl.dot(v1, tl.trans(do1), input_precision=PRECISION)
        if E2 > 0:
            dp += tl.dot(v2, tl.trans(do2), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :]) * slope * row_scale).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def _layout_dkv(
    Q, K, V, DO, DK, DV, LSE, DELTA,
    row_ptr, full_count, entries, tiles, bits, order,
    query_first, key_first, key_length,
    query_scale, bias, amounts, classes,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dl, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_scale_b, stride_scale_h, stride_scale_l, stride_bias_b, stride_bias_h, stride_bias_l, stride_bias_s,
    stride_amount, stride_amount_b, stride_amount_h, stride_amount_l, stride_class_b,
    scale, H, group, L, S, k_blocks, layout_batch, layout_group, layout_heads,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr, UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The layout is the transposed one: its rows are key blocks, its entries query blocks."""
    pid = tl.program_id(0)
    kv_heads = H // group
    block_k = pid % k_blocks
    b = (pid // k_blocks // kv_heads).to(tl.int64)
    hk = (pid // k_blocks % kv_heads).to(tl.int64)
    first = 0
    if query_first is not None:
        first = tl.load(query_first + b)
    keys_before = 0
    if key_first is not None:
        keys_before = tl.load(key_first + b)
    key_limit = S
    if key_length is not None:
        key_limit = keys_before + tl.load(key_length + b)

    rows = tl.arange(0, BLOCK_K)
    index, exists = token_index(block_k * BLOCK_K + rows, order, keys_before, key_limit)
    index = tl.where(exists, index, 0)
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    d1 = tl.arange(0, D1)
    e1 = tl.arange(0, E1)
    k1 = load_rows(K, index, stride_ks, exists, d1, D, True)
    v1 = load_rows(V, index, stride_vs, exists, e1, E, True)
    k2 = k1
    v2 = v1
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, E1], tl.float32)
    dk2 = dk1
    dv2 = dv1
    if D2 > 0:
        k2 = load_rows(K, index, stride_ks, exists, D1 + tl.arange(0, D2), D, True)
        dk2 = tl.zeros([BLOCK_K, D2], tl.float32)
    if E2 > 0:
        v2 = load_rows(V, index, stride_vs, exists, E1 + tl.arange(0, E2), E, True)
        dv2 = tl.zeros([BLOCK_K, E2], tl.float32)
    kinds = 0
    if classes is not None:
        kinds = tl.load(classes + b * stride_class_b + index, mask=exists, other=0)[:, None]

    parts: tl.constexpr = BLOCK_Q // STEP
    for g in range(group):
        h = hk * group + g
        layout_row = (b * (layout_batch > 1) * layout_heads + h // layout_group) * k_blocks + block_k
        begin = tl.load(row_ptr + layout_row)
        middle = begin + tl.load(full_count + layout_row)
        end = tl.load(row_ptr + layout_row + 1)
        Qh = Q + b * stride_qb + h * stride_qh
        DOh = DO + b * stride_db + h * stride_dh
        LSEh = LSE + (b * H + h) * L
        DELTAh = DELTA + (b * H + h) * L
        scale_h = query_scale
        if query_scale is not None:
            scale_h = query_scale + b * stride_scale_b + h * stride_scale_h
        bias_h = bias
        if bias is not None:
            bias_h = bias + b * stride_bias_b + h * stride_bias_h
        amounts_h = amounts
        if amounts is not None:
            amounts_h = amounts + b * stride_amount_b + h * stride_amount_h
        for i in range(begin * parts, middle * parts):
            dk1, dk2, dv1, dv2 = _dkv_part(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, rows, index, exists, kinds,
                Qh, DOh, LSEh, DELTAh, stride_ql, stride_dl, tl.load(entries + i // parts), i % parts, 0, bits,
                order, first, L, scale_h, stride_scale_l, bias_h, stride_bias_l, stride_bias_s,
                amounts_h, stride_amount, stride_amount_l, scale,
                BLOCK_Q, BLOCK_K, STEP, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, False, PRECISION,
            )  # fmt: skip
        for i in range(middle * parts, end * parts):
            dk1, dk2, dv1, dv2 = _dkv_part(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, rows, index, exists, kinds,
                Qh, DOh, LSEh, DELTAh, stride_ql, stride_dl, tl.load(entries + i // parts), i % parts,
                tl.load(tiles + i // parts), bits,
                order, first, L, scale_h, stride_scale_l, bias_h, stride_bias_l, stride_bias_s,
                amounts_h, stride_amount, stride_amount_l, scale,
                BLOCK_Q, BLOCK_K, STEP, D, D1, D2, E, E1, E2, CAP, EDITS, KINDS, UNIFORM, True, PRECISION,
            )  # fmt: skip

    DK += b * stride_dkb + hk * stride_dkh
    DV += b * stride_dvb + hk * stride_dvh
    dk_at = DK + index[:, None] * stride_dks
    dv_at = DV + index[:, None] * stride_dvs
    dk1 = dk1 * scale
    tl.store(dk_at + d1[None, :], dk1.to(DK.dtype.element_ty), mask=exists[:, None] & (d1[None, :] < D))
    tl.store(dv_at + e1[None, :], dv1.to(DV.dtype.element_ty), mask=exists[:, None] & (e1[None, :] < E))
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        dk2 = dk2 * scale
        tl.store(dk_at + d2[None, :], dk2.to(DK.dtype.element_ty), mask=exists[:, None] & (d2[None, :] < D))
    if E2 > 0:
        e2 = E1 + tl.arange(0, E2)
        tl.store(dv_at + e2[None, :], dv2.to(DV.dtype.element_ty), mask=exists[:, None] & (e2[None, :] < E))
