"""Attention by key class: mass and output of up to four classes of keys in one pass, and mass edits in the epilogue.

Each class keeps its own running maximum, sum and output, merged at the end. A block of keys that holds one class (most
blocks of a prompt do) therefore costs what it costs in plain attention, whatever the number of classes. Without values
the same walk returns statistics of the attention map, which nobody has to materialise for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call.program import MassTransfer
from ..layout import BlockLayout
from .aot import Case, sizes
from .configs import Config, config, rows
from .launch import launch, power_of_two, split_dim
from .layout_attention import Padding, _four, _last_contiguous, _precision, _strides, pack_edits
from .scores import LN2, LOG2E, edited_scores, load_rows, token_index, visible_bits

MAX_CLASSES = 4

# an output per class is kept in registers: 4 x [64, 128] fp32 is all that eight warps can hold, without much else
_WIDE = (256, 4, Config(32, 32, 8, 1))
rows("classes", other=[(64, 2, Config(64, 64, 8, 2)), (128, 2, Config(64, 32, 8, 2)), _WIDE],
     sm100=[(64, 2, Config(64, 64, 8, 2)), (128, 2, Config(32, 32, 8, 2)), _WIDE],
     gfx942=[(64, 2, Config(64, 64, 8, 2)), (128, 2, Config(64, 32, 8, 1)),
             (256, 4, Config(32, 32, 4, 1))])  # fmt: skip  # four warps have 512 registers per thread


@triton.jit
def _fold(s, v, of_class, m, l, acc, HAS_VALUE: tl.constexpr, PRECISION: tl.constexpr):
    """Fold the scores of one class into its maximum, sum and output."""
    s = tl.where(of_class[None, :], s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)
    if HAS_VALUE:
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return top, l, acc


@triton.jit
def _class_entry(
    m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top,
    q1, q2, query_scale, rows, row_exists, bias_row, amount_at,
    K, V, stride_k, stride_v, block, tile, bits, order, key_first, key_limit, slot_class, present,
    bias, stride_bias_s, amounts, stride_amount, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    E: tl.constexpr, E1: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr,
    TILE: tl.constexpr, CHECK_KEYS: tl.constexpr, HAS_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_K)
    check: tl.constexpr = TILE or CHECK_KEYS
    index, exists = token_index(block * BLOCK_K + cols, order, key_first, key_limit)
    k1 = load_rows(K, index, stride_k, exists, tl.arange(0, D1), D, check)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(K, index, stride_k, exists, D1 + tl.arange(0, D2), D, check)
        s += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
    kinds = tl.load(slot_class + block * BLOCK_K + cols)
    if (CAP > 0.0) or (EDITS > 0) or (bias is not None):
        s, _ = edited_scores(
            s, scale, query_scale, bias, bias_row[:, None] + index[None, :] * stride_bias_s,
            amounts, amount_at[:, None], stride_amount, kinds[None, :], row_exists[:, None] & exists[None, :],
            CAP, EDITS, KINDS, False,
        )  # fmt: skip
    else:
        s = s * (scale * LOG2E * query_scale)
    seen = row_exists[:, None] & exists[None, :]
    if TILE:
        seen = seen & visible_bits(bits, tile, rows, cols, 0, BLOCK_Q, BLOCK_K // 32)
    if check:
        s = tl.where(seen, s, float("-inf"))
    v = q1
    if HAS_VALUE:
        v = load_rows(V, index, stride_v, exists, tl.arange(0, E1), E, check)
    else:
        # sum of p * s, for the entropy, under one maximum for all classes
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        weighted = weighted * tl.exp2(top - base) + tl.sum(tl.where(p > 0, p * s, 0.0), 1)
        top = new
    here = tl.load(present + block)
    if here & 1:
        m0, l0, acc0 = _fold(s, v, kinds == 0, m0, l0, acc0, HAS_VALUE, PRECISION)
        n0 += tl.sum((seen & (kinds == 0)[None, :]).to(tl.int32), 1)
    if C > 1:
        if here & 2:
            m1, l1, acc1 = _fold(s, v, kinds == 1, m1, l1, acc1, HAS_VALUE, PRECISION)
            n1 += tl.sum((seen & (kinds == 1)[None, :]).to(tl.int32), 1)
    if C > 2:
        if here & 4:
            m2, l2, acc2 = _fold(s, v, kinds == 2, m2, l2, acc2, HAS_VALUE, PRECISION)
            n2 += tl.sum((seen & (kinds == 2)[None, :]).to(tl.int32), 1)
    if C > 3:
        if here & 8:
            m3, l3, acc3 = _fold(s, v, kinds == 3, m3, l3, acc3, HAS_VALUE, PRECISION)
            n3 += tl.sum((seen & (kinds == 3)[None, :]).to(tl.int32), 1)
    return m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top


@triton.jit
def _class_attention(
    Q, K, V, OUT, MASS, COUNT, LSE, ENTROPY, TOP,
    row_ptr, full_count, entries, tiles, bits, order, query_first, key_first, key_length,
    slot_class, present, query_scale, bias, amounts, sinks, edited,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oc, stride_oh, stride_ol,
    stride_scale_b, stride_scale_h, stride_scale_l, stride_bias_b, stride_bias_h, stride_bias_l, stride_bias_s,
    stride_amount, stride_amount_b, stride_amount_h, stride_amount_l,
    stride_edited_b, stride_edited_h, stride_edited_l, stride_slot_b, stride_present_b,
    scale, take0, take1, take2, take3, max_share, min_mass, count_eps,
    H, group, L, S, q_blocks, layout_batch, layout_group, layout_heads,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    E: tl.constexpr, E1: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr, EDITS: tl.constexpr, KINDS: tl.constexpr,
    CHECK_KEYS: tl.constexpr, TRANSFER: tl.constexpr, GIVE: tl.constexpr, WITHIN: tl.constexpr,
    LIMITED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TRANSFER: apply a `MassTransfer` (classes as bit sets) and store one output; else store an output per class."""
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

    has_value: tl.constexpr = V is not None
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + hk * stride_kh
    if has_value:
        V += b * stride_vb + hk * stride_vh
    slot_class += b * stride_slot_b
    present += b * stride_present_b
    q1 = load_rows(Q, index, stride_ql, exists, tl.arange(0, D1), D, True)
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
    at = tl.where(exists, index, 0)
    bias_row = b * stride_bias_b + h * stride_bias_h + at * stride_bias_l
    amount_at = b * stride_amount_b + h * stride_amount_h + at * stride_amount_l

    nothing = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    zero = tl.zeros([BLOCK_Q], tl.float32)
    m0, m1, m2, m3 = nothing, nothing, nothing, nothing
    l0, l1, l2, l3 = zero, zero, zero, zero
    none = tl.zeros([BLOCK_Q], tl.int32)
    n0, n1, n2, n3 = none, none, none, none
    weighted, top = zero, nothing
    acc0, acc1, acc2, acc3 = zero, zero, zero, zero
    if has_value:
        empty = tl.zeros([BLOCK_Q, E1], tl.float32)
        acc0 = empty
        if C > 1:
            acc1 = empty
        if C > 2:
            acc2 = empty
        if C > 3:
            acc3 = empty
    for e in range(begin, middle):
        m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top = _class_entry(
            m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top,
            q1, q2, row_scale, rows, exists, bias_row, amount_at, K, V, stride_ks, stride_vs,
            tl.load(entries + e), 0, bits, order, keys_before, key_limit, slot_class, present,
            bias, stride_bias_s, amounts, stride_amount, scale,
            BLOCK_Q, BLOCK_K, D, D1, D2, E, E1, C, CAP, EDITS, KINDS, False, CHECK_KEYS, has_value, PRECISION,
        )  # fmt: skip
    for e in range(middle, end):
        m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top = _class_entry(
            m0, m1, m2, m3, l0, l1, l2, l3, n0, n1, n2, n3, acc0, acc1, acc2, acc3, weighted, top,
            q1, q2, row_scale, rows, exists, bias_row, amount_at, K, V, stride_ks, stride_vs,
            tl.load(entries + e), tl.load(tiles + e), bits, order, keys_before, key_limit, slot_class, present,
            bias, stride_bias_s, amounts, stride_amount, scale,
            BLOCK_Q, BLOCK_K, D, D1, D2, E, E1, C, CAP, EDITS, KINDS, True, CHECK_KEYS, has_value, PRECISION,
        )  # fmt: skip

    # merge the classes under one maximum
    m = tl.maximum(tl.maximum(m0, m1), tl.maximum(m2, m3))
    l = zero
    if sinks is not None:
        sink = zero + tl.load(sinks + h).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
        l += tl.exp2(sink - m)
    base = tl.where(m == float("-inf"), 0.0, m)
    f0 = tl.exp2(m0 - base)
    f1 = tl.exp2(m1 - base)
    f2 = tl.exp2(m2 - base)
    f3 = tl.exp2(m3 - base)
    l += l0 * f0 + l1 * f1 + l2 * f2 + l3 * f3
    total = tl.where(l > 0, l, 1.0)
    lse = tl.where(l > 0, base + tl.log2(total), float("-inf"))
    f0 /= total
    f1 /= total
    f2 /= total
    f3 /= total
    p0, p1, p2, p3 = l0 * f0, l1 * f1, l2 * f2, l3 * f3
    row = (b * H + h) * L + index
    if MASS is not None:
        tl.store(MASS + row * C, p0, mask=exists)
        tl.store(COUNT + row * C, n0, mask=exists)
        if C > 1:
            tl.store(MASS + row * C + 1, p1, mask=exists)
            tl.store(COUNT + row * C + 1, n1, mask=exists)
        if C > 2:
            tl.store(MASS + row * C + 2, p2, mask=exists)
            tl.store(COUNT + row * C + 2, n2, mask=exists)
        if C > 3:
            tl.store(MASS + row * C + 3, p3, mask=exists)
            tl.store(COUNT + row * C + 3, n3, mask=exists)
    if LSE is not None:
        tl.store(LSE + row, lse * LN2, mask=exists)
    if ENTROPY is not None:
        # -sum p log p = lse - sum p s over the keys, whose mass a sink logit leaves below 1
        scaled = tl.where(top == float("-inf"), 0.0, weighted * tl.exp2(top - lse))
        kept = tl.where(l > 0, p0 + p1 + p2 + p3, 0.0)
        tl.store(ENTROPY + row, tl.where(l > 0, (kept * lse - scaled) * LN2, 0.0), mask=exists)
        tl.store(TOP + row, tl.where(top == float("-inf"), 0.0, tl.exp2(top - lse)), mask=exists)
    if has_value:
        if TRANSFER:
            within = zero
            limited = zero
            count = none
            if WITHIN & 1:
                within += p0
                count += n0
            if WITHIN & 2:
                within += p1
                count += n1
            if WITHIN & 4:
                within += p2
                count += n2
            if WITHIN & 8:
                within += p3
                count += n3
            if LIMITED & 1:
                limited += p0
            if LIMITED & 2:
                limited += p1
            if LIMITED & 4:
                limited += p2
            if LIMITED & 8:
                limited += p3
            gets = p0
            if GIVE == 1:
                gets = p1
            elif GIVE == 2:
                gets = p2
            elif GIVE == 3:
                gets = p3
            share = limited / tl.maximum(within + count_eps * count.to(tl.float32), 1e-30)
            chosen = (share <= max_share) & (within >= min_mass) & (gets > 0)
            if edited is not None:
                chosen = chosen & (
                    tl.load(
                        edited + b * stride_edited_b + h * stride_edited_h + index * stride_edited_l,
                        mask=exists,
                        other=0,
                    )
                    != 0
                )
            moved = take0 * p0 + take1 * p1 + take2 * p2 + take3 * p3
            grow = moved / tl.where(gets > 0, gets, 1.0)
            f0 *= tl.where(chosen, 1.0 - take0 + grow * (GIVE == 0), 1.0)
            f1 *= tl.where(chosen, 1.0 - take1 + grow * (GIVE == 1), 1.0)
            f2 *= tl.where(chosen, 1.0 - take2 + grow * (GIVE == 2), 1.0)
            f3 *= tl.where(chosen, 1.0 - take3 + grow * (GIVE == 3), 1.0)
        dims = tl.arange(0, E1)
        where = OUT + b * stride_ob + h * stride_oh + index[:, None] * stride_ol + dims[None, :]
        inside = exists[:, None] & (dims[None, :] < E)
        out = acc0 * f0[:, None]
        if TRANSFER:
            if C > 1:
                out += acc1 * f1[:, None]
            if C > 2:
                out += acc2 * f2[:, None]
            if C > 3:
                out += acc3 * f3[:, None]
            tl.store(where, out.to(OUT.dtype.element_ty), mask=inside)
        else:
            tl.store(where, out.to(OUT.dtype.element_ty), mask=inside)
            if C > 1:
                tl.store(where + stride_oc, (acc1 * f1[:, None]).to(OUT.dtype.element_ty), mask=inside)
            if C > 2:
                tl.store(where + 2 * stride_oc, (acc2 * f2[:, None]).to(OUT.dtype.element_ty), mask=inside)
            if C > 3:
                tl.store(where + 3 * stride_oc, (acc3 * f3[:, None]).to(OUT.dtype.element_ty), mask=inside)


@dataclass
class ClassStatistics:
    """What an attention map says, without the map. All [B, H, L, ...]; rows that see nothing are 0 (lse -inf).

    mass: float32 [.., C], probability of each class. count: int32 [.., C], visible keys of each class.
    lse: natural log-sum-exp. entropy: -sum p log p over keys, nats. top: largest probability of the row.
    """

    mass: Tensor
    count: Tensor
    lse: Tensor
    entropy: Tensor
    top: Tensor


def class_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    key_class: Tensor,
    classes: int,
    *,
    scale: float,
    padding: Padding | None = None,
    transfer: MassTransfer | None = None,
    edited: Tensor | None = None,
    query_scale: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edits: Sequence[tuple[str, int | None]] = (),
    amounts: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention split by key class; arguments as `layout_attention`, no gradients.

    Args:
        key_class: int8 [B|1, S], values 0 … classes - 1 (at most 4).
        transfer: mass edit to apply in the epilogue, on rows where `edited` (bool, broadcastable to [B, H, L]) holds.

    Returns:
        (output, mass float32 [B, H, L, C], count int32 [B, H, L, C], lse [B, H, L]). With a transfer, output is
        [B, H, L, Dv] and the masses are those before the edit; else it is [C, B, H, L, Dv], the part of the output
        that each class contributes (their sum is plain attention).
    """
    return _class_op(
        query, key, value, *_layout_tensors(layout, padding), key_class, classes, query_scale, bias, amounts,
        sink_logits, edited, _sizes(layout), pack_edits(edits), len(edits), softcap or 0.0, scale,
        _transfer_numbers(transfer),
    )  # fmt: skip


def class_statistics(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout,
    key_class: Tensor,
    classes: int,
    *,
    scale: float,
    padding: Padding | None = None,
    query_scale: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edits: Sequence[tuple[str, int | None]] = (),
    amounts: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> ClassStatistics:
    """Class masses, entropy and largest probability of every row, in O(L) memory; arguments as `class_attention`."""
    found = _statistics_op(
        query, key, *_layout_tensors(layout, padding), key_class, classes, query_scale, bias, amounts, sink_logits,
        _sizes(layout), pack_edits(edits), len(edits), softcap or 0.0, scale,
    )  # fmt: skip
    return ClassStatistics(*found)


def _layout_tensors(layout: BlockLayout, padding: Padding | None) -> tuple[Tensor | None, ...]:
    padding = padding or Padding()
    return (layout.row_ptr, layout.full_count, layout.index, layout.tile, layout.bits, layout.order,
            padding.query_first, padding.key_first, padding.key_length)  # fmt: skip


def _sizes(layout: BlockLayout) -> list[int]:
    return [layout.q_len, layout.kv_len, layout.block_q, layout.block_k, layout.batch, layout.heads]


def _transfer_numbers(transfer: MassTransfer | None) -> list[float]:
    if transfer is None:
        return []
    bits = lambda classes: float(sum(1 << c for c in classes))
    take = [*transfer.take, *[0.0] * (MAX_CLASSES - len(transfer.take))]
    return [*take, transfer.max_share, transfer.min_mass, transfer.count_eps, float(transfer.give),
            bits(transfer.within), bits(transfer.limited)]  # fmt: skip


def slot_classes(
    key_class: Tensor, slots: int, order: Tensor | None, key_first: Tensor | None, classes: int, block: int
) -> tuple[Tensor, Tensor]:
    """(class int8 [B|1, slots] of the key at each slot of a layout, -1 = none; set of classes int32 [B|1, blocks])."""
    S = key_class.shape[1]
    if order is not None:
        at = order[None, :]
    else:
        at = torch.arange(slots, device=key_class.device)[None, :]
        if key_first is not None:
            at = at + key_first[:, None]
    inside = (at >= 0) & (at < S)
    batch = max(at.shape[0], key_class.shape[0])
    found = torch.gather(key_class.expand(batch, -1), 1, at.clamp(0, S - 1).expand(batch, -1).long())
    found = torch.where(inside, found, torch.full_like(found, -1))
    there = (found[..., None] == torch.arange(classes, device=found.device)).unflatten(1, (-1, block)).any(2)
    sets = (there.int() << torch.arange(classes, device=found.device, dtype=torch.int32)).sum(-1)
    return found.contiguous(), sets.int().contiguous()


def _run(
    query: Tensor, key: Tensor, value: Tensor | None, layout_tensors: tuple[Tensor | None, ...], key_class: Tensor,
    classes: int, query_scale: Tensor | None, bias: Tensor | None, amounts: Tensor | None, sink_logits: Tensor | None,
    edited: Tensor | None, layout: Sequence[int], kinds: int, edits: int, softcap: float, scale: float,
    transfer: Sequence[float],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{classes} key classes; the kernel keeps 1 to {MAX_CLASSES}")
    query, key = _last_contiguous(query), _last_contiguous(key)
    value = None if value is None else _last_contiguous(value)
    q_len, kv_len, block_q, block_k, layout_batch, layout_heads = layout
    order, query_first, key_first, key_length = layout_tensors[5:]
    B, H, L, D = query.shape
    Hkv, E = key.shape[1], D if value is None else value.shape[3]
    fresh = torch.zeros if query_first is not None else torch.empty
    options: dict[str, Any] = dict(device=query.device, dtype=torch.float32)
    mass, lse = fresh(B, H, L, classes, **options), fresh(B, H, L, **options)
    count = fresh(B, H, L, classes, device=query.device, dtype=torch.int32)
    if query_first is not None:
        lse.fill_(float("-inf"))
    out = entropy = top = None
    if value is None:
        entropy, top = fresh(B, H, L, **options), fresh(B, H, L, **options)
    else:
        copies = 1 if transfer else classes
        out = fresh(copies, B, L, H, E, device=query.device, dtype=value.dtype).transpose(2, 3)
    slots = -(-(kv_len if order is None else order.shape[0]) // block_k) * block_k
    slot_class, present = slot_classes(key_class, slots, order, key_first, classes, block_k)
    q_blocks = -(-(q_len if order is None else order.shape[0]) // block_q)
    query_scale, bias = _four(query_scale), _four(bias)
    if edited is not None:
        edited = edited.reshape((1,) * (3 - edited.ndim) + tuple(edited.shape)).to(torch.uint8)
    D1, D2 = split_dim(D)
    numbers = list(transfer) or [0.0] * 10
    chosen = config("classes", query.device, max(D, E), query.dtype)
    launch(
        _class_attention, (B * H * q_blocks,),
        query, key, value, out, mass, count, lse, entropy, top, *layout_tensors,
        slot_class, present, query_scale, bias, amounts, sink_logits, edited,
        *query.stride()[:3], *key.stride()[:3], *((0, 0, 0) if value is None else value.stride()[:3]),
        *((0, 0, 0, 0) if out is None else (out.stride(1), out.stride(0), out.stride(2), out.stride(3))),
        *_strides(query_scale, 0, 1, 2), *_strides(bias, 0, 1, 2, 3), *_strides(amounts, 0, 1, 2, 3),
        *_strides(edited, 0, 1, 2), *_strides(slot_class, 0), *_strides(present, 0),
        scale, *numbers[:7], H, H // Hkv, L, key.shape[2], q_blocks, layout_batch, H // layout_heads, layout_heads,
        BLOCK_Q=block_q, BLOCK_K=block_k, D=D, D1=D1, D2=D2, E=E, E1=power_of_two(E), C=classes, CAP=float(softcap),
        EDITS=edits, KINDS=kinds, CHECK_KEYS=key_length is not None, TRANSFER=bool(transfer), GIVE=int(numbers[7]),
        WITHIN=int(numbers[8]), LIMITED=int(numbers[9]), PRECISION=_precision(query),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    if out is not None and transfer:
        out = out[0]
    return out, mass, count, lse, entropy, top


def _class_impl(
    query: Tensor, key: Tensor, value: Tensor,
    row_ptr: Tensor, full_count: Tensor, entries: Tensor, tiles: Tensor, bits: Tensor, order: Tensor | None,
    query_first: Tensor | None, key_first: Tensor | None, key_length: Tensor | None,
    key_class: Tensor, classes: int, query_scale: Tensor | None, bias: Tensor | None, amounts: Tensor | None,
    sink_logits: Tensor | None, edited: Tensor | None, layout: Sequence[int], kinds: int, edits: int, softcap: float,
    scale: float, transfer: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (row_ptr, full_count, entries, tiles, bits, order, query_first, key_first, key_length)
    found = _run(query, key, value, tensors, key_class, classes, query_scale, bias, amounts, sink_logits, edited,
                 layout, kinds, edits, softcap, scale, transfer)  # fmt: skip
    return found[:4]  # type: ignore[return-value]


def _statistics_impl(
    query: Tensor, key: Tensor,
    row_ptr: Tensor, full_count: Tensor, entries: Tensor, tiles: Tensor, bits: Tensor, order: Tensor | None,
    query_first: Tensor | None, key_first: Tensor | None, key_length: Tensor | None,
    key_class: Tensor, classes: int, query_scale: Tensor | None, bias: Tensor | None, amounts: Tensor | None,
    sink_logits: Tensor | None, layout: Sequence[int], kinds: int, edits: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (row_ptr, full_count, entries, tiles, bits, order, query_first, key_first, key_length)
    found = _run(query, key, None, tensors, key_class, classes, query_scale, bias, amounts, sink_logits, None,
                 layout, kinds, edits, softcap, scale, [])  # fmt: skip
    return found[1:]  # type: ignore[return-value]


_class_op = torch.library.custom_op("hf_attn_patch::class_attention", _class_impl, mutates_args=())
_statistics_op = torch.library.custom_op("hf_attn_patch::class_statistics", _statistics_impl, mutates_args=())


@_class_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, L, _d = query.shape
    classes, transfer = rest[10], rest[-1]
    shape = (1 if transfer else classes, B, L, H, value.shape[3])
    out = value.new_empty(shape).transpose(2, 3)
    rows_of = lambda *more, dtype=torch.float32: query.new_empty(B, H, L, *more, dtype=dtype)
    return out[0] if transfer else out, rows_of(classes), rows_of(classes, dtype=torch.int32), rows_of()


@_statistics_op.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, L, _d = query.shape
    rows_of = lambda *more, dtype=torch.float32: query.new_empty(B, H, L, *more, dtype=dtype)
    return rows_of(rest[10]), rows_of(rest[10], dtype=torch.int32), rows_of(), rows_of(), rows_of()


def aot_cases() -> list[Case]:
    """Transfer, per-class outputs and statistics, over head dimensions and numbers of classes."""
    cases = []

    def add(
        label: str, dtype: torch.dtype, D: int, classes: int, mode: str, default: bool = False, **given: bool
    ) -> None:
        def run() -> None:
            empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
            B, H, L, int32, f32 = 2, 32, 4096, torch.int32, torch.float32
            chosen = config("classes", torch.device("meta"), D, dtype)
            q_blocks = L // chosen.block_q
            tile = empty(9, chosen.block_q, chosen.block_k // 32, dtype=int32)
            padding = [empty(B, dtype=int32) if given.get("padded") else None] * 3
            layout = (empty(q_blocks + 1, dtype=int32), empty(q_blocks, dtype=int32), empty(99, dtype=int32),
                      empty(99, dtype=int32), tile, None, *padding)  # fmt: skip
            edits = bool(given.get("edits"))
            transfer = [0.0, 0.0, 0.4, 0.4, 0.5, 0.2, 1e-6, 1.0, 6.0, 4.0] if mode == "transfer" else []
            _run(
                empty(B, H, L, D), empty(B, 8, L, D), None if mode == "statistics" else empty(B, 8, L, D), layout,
                empty(B, L, dtype=torch.int8), classes, None, None, empty(1, B, H, L, dtype=f32) if edits else None,
                None, empty(B, 1, L, dtype=torch.bool) if mode == "transfer" else None,
                [L, L, chosen.block_q, chosen.block_k, 1, 1], pack_edits([("add", 1)]) if edits else 0, int(edits),
                30.0 if given.get("softcap") else 0.0, 0.125, transfer,
            )  # fmt: skip

        cases.append(Case(label, run, default))

    for name, dtype, D, options in sizes():
        add(f"{name} {D} 4 classes transfer", dtype, D, 4, "transfer", options)
        if options:
            add(f"{name} {D} 4 classes outputs", dtype, D, 4, "outputs")
            add(f"{name} {D} 4 classes statistics", dtype, D, 4, "statistics", D == 128)
            add(f"{name} {D} 2 classes outputs", dtype, D, 2, "outputs")
            add(f"{name} {D} 4 classes transfer padded", dtype, D, 4, "transfer", padded=True)
            add(
                f"{name} {D} 4 classes transfer edits softcap",
                dtype,
                D,
                4,
                "transfer",
                edits=True,
                softcap=True,
            )
    return cases
