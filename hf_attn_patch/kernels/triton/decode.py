"""Decode attention: a few query rows over long keys, split over the keys and merged by log-sum-exp.

    o = softmax(cap(scale * query_scale * q k^T) over visible keys) v * head_gate

Flash-Decoding (Dao et al., 2023): a program owns one KV head and one chunk of its keys; the query heads that share the
KV head, times the rows, are the rows of one product, so K and V are read once. Partial outputs are normalised and
merged with weights exp(lse_i - max lse). (The kernel of MoA, arXiv 2406.14909, multiplies by the sum once more: not
followed.) Time goes into reading K and V, so scores stay in natural units, which rounds less than folding log2(e) into
the scale.

Which blocks of keys a program walks follows from arithmetic on the device (padding, causality, window, spans), so time
follows the span of a head and no value has to be known on the host: the call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .aot import Case, sizes
from .configs import Config
from .launch import launch, power_of_two, split_dim
from .scores import LN2, LOG2E, load_rows, soft_cap

# block_q: most rows (query heads of a group times query tokens) of one program; block_k: keys per step
configs.rows(
    "decode",
    other=[
        (64, 2, Config(64, 64, 4, 3)),
        (128, 2, Config(32, 64, 4, 3)),
        (256, 2, Config(32, 32, 4, 2)),
        (64, 4, Config(16, 32, 4, 2)),
        (256, 4, Config(16, 16, 4, 2)),
    ],
    gfx942=[  # 64 KiB of LDS
        (64, 2, Config(64, 64, 4, 2)),
        (128, 2, Config(32, 64, 4, 2)),
        (256, 2, Config(32, 32, 4, 2)),
        (128, 4, Config(16, 32, 4, 2)),
        (256, 4, Config(16, 16, 4, 2)),
    ],
)
MERGE_STEP = 16  # partial results per step of the merge


@triton.jit
def _close(m, l, sink):
    """(factor of the accumulator, log-sum-exp) of rows with maximum m and sum l; `sink`: logit without a value."""
    top = m
    if sink is not None:
        top = tl.maximum(m, sink.to(tl.float32))
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2((m - base) * LOG2E)
    total = l * shrink
    if sink is not None:
        total += tl.exp2((sink.to(tl.float32) - base) * LOG2E)
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    log_sum = tl.where(some, base + tl.log2(divisor) * LN2, float("-inf"))
    return tl.where(some, shrink / divisor, 0.0), log_sum


@triton.jit(do_not_specialize=["S", "q_first", "kv_offset", "splits"])
def _decode(
    query, key, value, out, lse,
    q_columns, columns, starts, ends, sinks, spans, allowed, lengths, kv_heads, query_scale, sink_logits, head_gate,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_cb, stride_ab, stride_an, stride_ag, stride_al, stride_nb, stride_nn,
    stride_sb, stride_sh, stride_sl, stride_gb, stride_gl, stride_gh,
    B, H, n, G, L, S, q_first, kv_offset, splits, window, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    CAUSAL: tl.constexpr, LATE: tl.constexpr, HAS_MERGE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows to one chunk of keys: the final output, or a partial one with HAS_MERGE."""
    split = tl.program_id(1)
    tiles = tl.cdiv(G * L, ROWS)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    here = pair % n  # KV head within key and value; `kv`: within the layer
    b = (pair // n).to(tl.int64)
    kv = here
    if kv_heads is not None:
        kv = tl.load(kv_heads + here)
    kv = kv.to(tl.int64)

    r = tile * ROWS + tl.arange(0, ROWS)
    live = r < G * L
    g = (r // L).to(tl.int64)
    l = (r % L).to(tl.int64)
    head = kv * G + g
    if q_columns is not None:
        q_col = tl.load(q_columns + l, mask=live, other=0).to(tl.int32)
    else:
        q_col = q_first + (r % L)
    q_low = tl.min(tl.where(live, q_col, 2147483647), 0)
    q_high = tl.max(tl.where(live, q_col, -1), 0)

    start = 0
    if starts is not None:
        start = tl.load(starts + b).to(tl.int32)
    length = S
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b * stride_nb + kv * stride_nn).to(tl.int32), S)
    sink = 0
    span = 0
    if spans is not None:
        span = tl.load(spans + kv).to(tl.int32)
        if sinks is not None:
            sink = tl.load(sinks + kv).to(tl.int32)

    # columns [low, high) of which some row may see some
    low = kv_offset
    high = kv_offset + length
    if columns is not None:
        low = 0
        high = 2147483647
    low = tl.maximum(low, start)
    if ends is not None:
        high = tl.minimum(high, tl.load(ends + b).to(tl.int32))
    if CAUSAL:
        high = tl.minimum(high, q_high + 1)
    if window is not None:
        low = tl.maximum(low, q_low - window + 1)
    recent = low  # columns from here on may be inside a span, columns below `early` are sinks
    early = low
    if spans is not None:
        recent = tl.maximum(low, q_low - span + 1)
        early = tl.minimum(start + sink, high)

    # blocks to walk: first those of the sinks, then the others; this split's share of both
    if columns is None:
        sink_from = (low - kv_offset) // BLOCK_K
        sink_to = tl.maximum(tl.cdiv(tl.maximum(early - kv_offset, 0), BLOCK_K), sink_from)
        if spans is None:
            sink_to = sink_from
        near_from = tl.maximum((recent - kv_offset) // BLOCK_K, sink_to)
        near_to = tl.maximum(tl.cdiv(tl.maximum(high - kv_offset, 0), BLOCK_K), near_from)
        sink_blocks = sink_to - sink_from
    else:
        sink_from = 0
        near_from = 0
        near_to = tl.cdiv(length, BLOCK_K)
        sink_blocks = 0
    share = tl.cdiv(sink_blocks + near_to - near_from, splits)
    first = split * share
    last = tl.minimum(first + share, sink_blocks + near_to - near_from)

    d1 = tl.arange(0, D1)
    e1 = tl.arange(0, E1)
    q_rows = query + b * stride_qb
    q_at = head * stride_qh + l * stride_ql
    q1 = load_rows(q_rows, q_at, 1, live, d1, D, True)
    if D2 > 0:
        q2 = load_rows(q_rows, q_at, 1, live, D1 + tl.arange(0, D2), D, True)
    factor = tl.full([ROWS], 1.0, tl.float32) * scale
    if query_scale is not None:
        at = b * stride_sb + head * stride_sh + l * stride_sl
        factor *= tl.load(query_scale + at, mask=live, other=0.0).to(tl.float32)
    k_rows = key + b * stride_kb + here.to(tl.int64) * stride_kh
    v_rows = value + b * stride_vb + here.to(tl.int64) * stride_vh

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, E1], tl.float32)
    if E2 > 0:
        acc2 = tl.zeros([ROWS, E2], tl.float32)
    for step in range(first, last):
        block = tl.where(step < sink_blocks, sink_from + step, near_from + step - sink_blocks)
        slot = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = slot < length
        if columns is not None:
            col = tl.load(columns + b * stride_cb + slot, mask=inside, other=-1).to(tl.int32)
            some = inside & (col >= low) & (col < high)
        else:
            col = kv_offset + slot
            some = (col >= low) & (col < high)
        # `some`: keys that a row may see. Values of others may be NaN and 0 * NaN is NaN, so they are not loaded; where
        # that depends on other loads they are dropped LATE, since a load that waits for a load is not pipelined
        seen = some[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (col[None, :] <= q_col[:, None])
        if window is not None:
            seen = seen & (col[None, :] > q_col[:, None] - window)
        if spans is not None:
            some = some & ((col < early) | (col >= recent))
            seen = seen & ((col < early)[None, :] | (col[None, :] > q_col[:, None] - span))
        if allowed is not None:
            at = b * stride_ab + here.to(tl.int64) * stride_an + g * stride_ag + l * stride_al
            flag = tl.load(allowed + at[:, None] + slot[None, :], mask=seen, other=0)
            seen = seen & (flag != 0)
            some = tl.max(seen.to(tl.int32), 0) > 0

        present = some
        if LATE:
            present = inside
        index = slot.to(tl.int64)
        k1 = load_rows(k_rows, index, stride_ks, inside, d1, D, True)
        s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(k_rows, index, stride_ks, inside, D1 + tl.arange(0, D2), D, True)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
        s *= factor[:, None]
        if cap is not None:
            s = soft_cap(s, cap)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((m - base) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        m = top
        v1 = load_rows(v_rows, index, stride_vs, present, e1, E, True)
        if LATE:
            v1 = tl.where(some[:, None], v1, 0.0)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if E2 > 0:
            v2 = load_rows(v_rows, index, stride_vs, present, E1 + tl.arange(0, E2), E, True)
            if LATE:
                v2 = tl.where(some[:, None], v2, 0.0)
            acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None], input_precision=PRECISION)

    row = (b * H + head) * L + l
    if HAS_MERGE:
        row += split.to(tl.int64) * B * H * L
        weight, log_sum = _close(m, total, None)
    else:
        logit = None
        if sink_logits is not None:
            logit = tl.load(sink_logits + head, mask=live, other=0.0)
        weight, log_sum = _close(m, total, logit)
        if head_gate is not None:
            at = b * stride_gb + l * stride_gl + head * stride_gh
            weight *= tl.load(head_gate + at, mask=live, other=0.0).to(tl.float32)
    tl.store(lse + row, log_sum, mask=live)
    at = out + row[:, None] * E
    acc1 *= weight[:, None]
    tl.store(at + e1[None, :], acc1.to(out.dtype.element_ty), mask=live[:, None] & (e1[None, :] < E))
    if E2 > 0:
        acc2 *= weight[:, None]
        e2 = E1 + tl.arange(0, E2)
        tl.store(at + e2[None, :], acc2.to(out.dtype.element_ty), mask=live[:, None] & (e2[None, :] < E))


@triton.jit(do_not_specialize=["splits"])
def _decode_merge(
    part, part_lse, out, lse, sink_logits, head_gate, stride_gb, stride_gl, stride_gh, rows, H, L, splits,
    E: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row of the output from its partial ones: sum_i w_i o_i / sum_i w_i, w_i = exp(lse_i - max lse)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    i = tl.arange(0, STEP)
    m = float("-inf")
    for begin in range(0, splits, STEP):
        at = part_lse + (begin + i).to(tl.int64) * rows + row
        m = tl.maximum(m, tl.max(tl.load(at, mask=begin + i < splits, other=float("-inf")), 0))
    base = tl.where(m == float("-inf"), 0.0, m)
    acc = tl.zeros([BLOCK_E], tl.float32)
    total = 0.0
    for begin in range(0, splits, STEP):
        at = (begin + i).to(tl.int64) * rows + row
        x = tl.load(part_lse + at, mask=begin + i < splits, other=float("-inf"))
        some = x > float("-inf")
        w = tl.exp2((x - base) * LOG2E)
        o = tl.load(part + at[:, None] * E + e[None, :], mask=some[:, None] & (e[None, :] < E), other=0.0)
        acc += tl.sum(o * w[:, None], 0)
        total += tl.sum(w, 0)
    head = (row // L) % H
    logit = None
    if sink_logits is not None:
        logit = tl.load(sink_logits + head)
    weight, log_sum = _close(m, total, logit)
    if head_gate is not None:
        at = row // L // H * stride_gb + row % L * stride_gl + head * stride_gh
        weight *= tl.load(head_gate + at).to(tl.float32)
    tl.store(lse + row, log_sum)
    tl.store(out + row * E + e, (acc * weight).to(out.dtype.element_ty), mask=e < E)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else tuple(x.stride()[:dims])


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@functools.lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as int32; kept, since a decode step must not wait for a copy from the host."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _split_count(device: torch.device, programs: int, slots: int, block: int) -> int:
    """Splits such that every multiprocessor gets about two programs and every program at least two blocks."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // max(programs, 1), triton.cdiv(slots, 2 * block)))


def _decode_groups_impl(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    q_columns: Tensor | None,
    q_first: int,
    kv_offset: int,
    columns: Sequence[Tensor],
    heads: Sequence[int],
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    spans: Tensor | None,
    allowed: Sequence[Tensor],
    lengths: Tensor | None,
    query_scale: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    head_gate: Tensor | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Stage 1 for each group of KV heads into shared buffers, then one merge. `columns`, `allowed`: one per group or
    none; `heads`: KV head of every head of every group (empty: a single group that holds all, in order)."""
    B, H, L, D = query.shape
    E = values[0].shape[3]
    kv_heads = sum(k.shape[1] for k in keys)
    G = H // kv_heads
    config = configs.config("decode", query.device, max(D, E), query.dtype)
    rows = min(power_of_two(G * L), config.block_q)
    tiles = triton.cdiv(G * L, rows)
    if splits is None:
        slots = max(k.shape[2] for k in keys)
        if window is not None and not columns:
            slots = min(slots, window + L + config.block_k)
        splits = _split_count(query.device, B * kv_heads * tiles, slots, config.block_k)

    query = _dense_last(query)
    if query_scale is not None:
        query_scale = query_scale.expand(B, H, L, 1)
    if head_gate is not None:
        head_gate = head_gate.expand(B, L, H)
    if lengths is not None:
        lengths = lengths.expand(B, kv_heads)
    out = torch.empty((B, H, L, E), dtype=query.dtype, device=query.device)
    lse = torch.empty((B, H, L), dtype=torch.float32, device=query.device)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty((splits, B, H, L, E), dtype=torch.float32, device=query.device)
        part_lse = torch.empty((splits, B, H, L), dtype=torch.float32, device=query.device)

    D1, D2 = split_dim(D)
    E1, E2 = split_dim(E)
    done = 0
    for i, (key, value) in enumerate(zip(keys, values)):
        key, value = _dense_last(key), _dense_last(value)
        n, S = key.shape[1:3]
        chosen = None
        if heads:
            chosen = _on_device(tuple(heads[done : done + n]), query.device)
            done += n
        flags = None
        if allowed:
            flags = allowed[i]
            by_query_head = flags.shape[1] == n * G
            flags = flags.unflatten(1, (n, G)) if by_query_head else flags.unsqueeze(2)
            flags = _dense_last(flags.view(torch.uint8)).expand(B, n, G, L, S)
        cols = columns[i].expand(B, S) if columns else None
        launch(
            _decode, (B * n * tiles, splits),
            query, key, value, part, part_lse,
            q_columns, cols, starts, ends, sinks, spans, flags, lengths, chosen,
            query_scale, sink_logits, head_gate,
            *_strides(query, 3), *_strides(key, 3), *_strides(value, 3),
            *_strides(cols, 1), *_strides(flags, 4), *_strides(lengths, 2), *_strides(query_scale, 3),
            *_strides(head_gate, 3),
            B, H, n, G, L, S, q_first, kv_offset, splits, window, scale, softcap,
            num_warps=config.num_warps, num_stages=config.num_stages,
            D=D, D1=D1, D2=D2, E=E, E1=E1, E2=E2, CAUSAL=causal, LATE=bool(columns or allowed),
            HAS_MERGE=splits > 1, ROWS=rows, BLOCK_K=config.block_k,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )  # fmt: skip
    if splits > 1:
        launch(
            _decode_merge, (B * H * L,),
            part, part_lse, out, lse, sink_logits, head_gate, *_strides(head_gate, 3), B * H * L, H, L, splits,
            num_warps=1 if E <= 64 else 2, num_stages=1, E=E, BLOCK_E=power_of_two(E), STEP=MERGE_STEP,
        )  # fmt: skip
    return out, lse


_decode_groups = torch.library.custom_op("hf_attn_patch::decode_ragged", mutates_args=())(_decode_groups_impl)


@_decode_groups.register_fake
def _(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty((*query.shape[:3], values[0].shape[3])),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    )


def _decode_impl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_columns: Tensor | None,
    q_first: int,
    kv_offset: int,
    columns: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    spans: Tensor | None,
    allowed: Tensor | None,
    lengths: Tensor | None,
    query_scale: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    head_gate: Tensor | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """A single group that holds all KV heads."""
    return _decode_groups_impl(
        query, [key], [value], scale, q_columns, q_first, kv_offset, [] if columns is None else [columns], [],
        starts, ends, causal, window, sinks, spans, [] if allowed is None else [allowed], lengths,
        query_scale, softcap, sink_logits, head_gate, splits,
    )  # fmt: skip


_decode_op = torch.library.custom_op("hf_attn_patch::decode", mutates_args=())(_decode_impl)


@_decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    )


def _check(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], options: dict[str, Any]) -> None:
    """Raise ValueError for what a kernel would read out of bounds or silently misread."""
    heads = sum(k.shape[1] for k in keys)
    if query.shape[1] % heads:
        raise ValueError(f"decode: {query.shape[1]} query heads are no multiple of {heads} KV heads")
    for k, v in zip(keys, values):
        if k.shape[:3] != v.shape[:3] or k.shape[0] != query.shape[0] or k.shape[3] != query.shape[3]:
            raise ValueError(
                f"decode: query {list(query.shape)}, key {list(k.shape)} and value {list(v.shape)} do not fit"
            )
        if not k.dtype == v.dtype == query.dtype:
            raise ValueError(
                f"decode: query, key, value are {query.dtype}, {k.dtype}, {v.dtype}; want one dtype"
            )
    if options["sinks"] is not None and options["spans"] is None:
        raise ValueError("decode: sinks only widen spans; pass spans too (or neither)")
    sizes = {"q_columns": query.shape[2], "starts": query.shape[0], "ends": query.shape[0]}
    sizes |= {"sinks": heads, "spans": heads, "sink_logits": query.shape[1]}
    for name, size in sizes.items():
        x = options[name]
        if isinstance(x, Tensor) and (x.shape != (size,) or not x.is_contiguous()):
            raise ValueError(f"decode: {name} must be a contiguous vector of {size}, got {list(x.shape)}")


def _common(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the operators take them: the first query column is an int or a tensor of its own."""
    first = options["q_columns"]
    is_tensor = isinstance(first, Tensor)
    return {**options, "q_columns": first if is_tensor else None, "q_first": 0 if is_tensor else int(first)}


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    q_columns: Tensor | int,
    kv_offset: int = 0,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Tensor | None = None,
    spans: Tensor | None = None,
    allowed: Tensor | None = None,
    lengths: Tensor | None = None,
    query_scale: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    head_gate: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few query rows; no gradients. Index tensors are int32 or int64; memory at keys that no rule lets
    any row see may hold anything, NaN included.

    Args:
        query: [B, H, L, D]. key: [B, n, S, D]. value: [B, n, S, Dv], n divides H.
        q_columns: [L], column of each row; or the column of the first row, as an int.
        columns: [B, S], column held by each slot, -1 = empty (a ring buffer); None: slot j holds column kv_offset + j.
        starts: [B], first real column of each batch row (left padding); positions count from there.
        ends: [B], columns from here on are not visible (right padding, the unfilled part of a static cache).
        causal: column <= query column. window: column > query column - window (the own key counts).
        sinks, spans: [n]; a key is visible if position < sinks or position > query position - spans.
        allowed: bool or uint8 [B|1, 1|n|H, 1|L, S], any further restriction, by slot.
        lengths: [n] or [B, n], how many slots of each KV head are in use.
        query_scale: broadcastable to [B, H, L, 1]. softcap: tanh cap of scores. sink_logits: [H], logits without a
            value. head_gate: broadcastable to [B, L, H].
        splits: chunks of keys that are worked on in parallel; None = enough to fill the GPU.

    Returns:
        (output [B, H, L, Dv], log-sum-exp of the scores (of the sink logit too) float32 [B, H, L]). A row that sees
        nothing has output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit together; sinks without spans.
    """
    options = {k: v for k, v in locals().items() if k not in ("query", "key", "value")}
    _check(query, [key], [value], options)
    return _decode_op(query, key, value, **_common(options))


def decode_ragged(
    query: Tensor, groups: Any, *, allowed: Sequence[Tensor] = (), **options: Any
) -> tuple[Tensor, Tensor]:
    """`decode` over a `RaggedKV`: groups of KV heads with keys, values and columns of their own; nothing is copied.

    Args:
        groups: `kernels.ragged.RaggedKV`. allowed: none, or one tensor per group, as in `decode`, with the heads of
            that group. options: as in `decode`, per KV head of the whole layer; `columns` come with the groups.

    Returns, Raises: as `decode`; TypeError for an option that it does not have.
    """
    defaults = {**(decode.__kwdefaults__ or {}), **options}
    unknown = set(options) - set(decode.__kwdefaults__ or {}) - {"scale", "q_columns"}
    if unknown or "columns" in options:
        raise TypeError(f"decode_ragged() does not take {sorted(unknown | ({'columns'} & set(options)))}")
    parts = groups.groups
    keys, values = [p.key for p in parts], [p.value for p in parts]
    _check(query, keys, values, defaults)
    given = {"columns": [p.columns for p in parts], "allowed": list(allowed)}
    heads = [h for p in parts for h in p.heads]
    return _decode_groups(query, keys, values, heads=heads, **_common({**defaults, **given}))


def aot_cases() -> list[Case]:
    """Everything a user can ask for, by dtype, head dimension and combination of options."""

    def case(
        name: str, dtype: torch.dtype, dim: int, rows: int, split: int, default: bool, kind: str
    ) -> Case:
        meta = functools.partial(torch.empty, device="meta")
        B, H, n, S = 2, 8, 2, 4096
        ints = lambda *shape: meta(shape, dtype=torch.int32)
        given: dict[str, Any] = dict.fromkeys(decode.__kwdefaults__ or {})
        given |= {"scale": 0.125, "q_columns": ints(rows), "kv_offset": 0, "causal": True, "splits": split}
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "plain": lambda: {},
            "first column": lambda: {"q_columns": S - rows, "starts": ints(B)},
            "bidirectional": lambda: {"causal": False, "ends": ints(B)},
            "window": lambda: {"window": 512, "starts": ints(B)},
            "spans": lambda: {"sinks": ints(n), "spans": ints(n), "starts": ints(B), "lengths": ints(n)},
            "ring": lambda: {"columns": ints(B, S), "sinks": ints(n), "spans": ints(n), "starts": ints(B)},
            "allowed": lambda: {"allowed": meta((1, n, rows, S), dtype=torch.bool), "ends": ints(B)},
            "gpt-oss": lambda: {"window": 128, "starts": ints(B), "sink_logits": meta((H,), dtype=dtype)},
            "cap, scale, gate": lambda: {
                "softcap": 50.0,
                "query_scale": meta((1, 1, rows, 1)),
                "head_gate": meta((B, rows, H), dtype=dtype),
            },
        }

        def run() -> None:
            call = _common({**given, **makers[kind]()})
            q = meta((B, H, rows, dim), dtype=dtype)
            k, v = (meta((B, n, S, dim), dtype=dtype) for _ in range(2))
            if kind == "ring":
                call |= {"columns": [call["columns"]], "allowed": []}
                _decode_groups_impl(q, [k], [v], heads=[1, 0], **call)
            else:
                _decode_impl(q, k, v, **call)

        return Case(f"decode {kind} {name} D{dim} L{rows} splits{split}", run, default)

    cases = []
    usual = {(64, 1, "spans"), (128, 1, "first column"), (128, 16, "window"), (128, 1, "ring")}
    kinds = (
        "first column",
        "bidirectional",
        "window",
        "spans",
        "ring",
        "allowed",
        "gpt-oss",
        "cap, scale, gate",
    )
    for name, dtype, dim, options in sizes():
        for rows, split in ((1, 8), (16, 1)):
            for kind in ("plain", *kinds[: 8 if rows == 1 else 3]) if options else ("plain",):
                cases.append(
                    case(name, dtype, dim, rows, split, options and (dim, rows, kind) in usual, kind)
                )
    return cases
