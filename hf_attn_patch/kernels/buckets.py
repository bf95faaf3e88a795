"""Unedited softmax attention over static layouts, bucket by bucket, with its own backward pass (CPU).

The backward pass recomputes probabilities from the log-sum-exp of the whole row, so nothing but q, k, v, the output
and one number per row is kept, and each run of keys can be differentiated alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Bucket, Group, Plan, Run

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CHUNK_BYTES = 3 << 20  # packed queries, or gathered keys, of one product: what a core's cache holds


def attend_plan(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, whole: Callable[..., Tensor] | None
) -> Tensor:
    """softmax(scale q k^T) v over the keys of a plan.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv], on the CPU.

    Returns:
        [B, H, L, Dv]; rows that see no key are 0.
    """
    wide = value.shape[3] - key.shape[3]
    if wide > 0:  # the flash kernel wants one width; zeros add nothing to q . k
        query, key = F.pad(query, (0, wide)), F.pad(key, (0, wide))
    elif wide < 0:
        value = F.pad(value, (0, -wide))
    if plan.order is not None:
        query, key, value = (x.index_select(2, plan.order) for x in (query, key, value))
    dense = [] if whole is None else [group for group in plan.groups if group.everything]
    if dense:  # heads that read everything are plain attention
        plan = replace(plan, groups=[group for group in plan.groups if not group.everything])
    if not plan.groups:
        out = torch.zeros_like(query[..., : value.shape[3]])
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _Attend.apply(query, key, value, plan, scale)
    else:
        out, _ = _forward(query, key, value, plan, scale, False)
    for group in dense:
        for kv, heads in _pieces(group, plan.heads, query.shape[1], key.shape[1]):
            assert whole is not None
            part = whole(_pick(query, heads), _pick(key, kv), _pick(value, kv))
            out = part if len(heads) == out.shape[1] else out.index_copy(1, torch.tensor(heads), part)
    if plan.slot is not None:
        out = out.index_select(2, plan.slot)
    return out[..., :wide] if wide < 0 else out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
        out, lse = _forward(query, key, value, plan, scale, True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        return *_backward(grad, query, key, value, out, lse, ctx.plan, ctx.scale), None, None


def _pieces(group: Group, layout_heads: int, H: int, Hkv: int) -> Iterator[tuple[list[int], list[int]]]:
    """(KV heads, query heads) of a group, so that every KV head of a piece serves equally many query heads."""
    size, per = H // Hkv, H // layout_heads
    serves: dict[int, list[int]] = {}
    for h in group.heads:
        for q in range(h * per, (h + 1) * per):
            serves.setdefault(q // size, []).append(q)
    for count in sorted({len(q) for q in serves.values()}):
        kv = [n for n, q in serves.items() if len(q) == count]
        yield kv, [q for n in kv for q in serves[n]]


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Heads of [B, H, L, ...] (the tensor itself if these are all, else a copy)."""
    return x if heads == list(range(x.shape[1])) else x[:, heads]


class _Piece:
    """K, V of some KV heads and the query heads they serve, flattened over the batch: n = B * len(kv)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, kv: list[int], heads: list[int]):
        self.heads, self.kv, self.batch = heads, kv, query.shape[0]
        self.copies = len(heads) // len(kv)
        self.key, self.value = (_pick(x, kv).contiguous().flatten(0, 1) for x in (key, value))
        self.query = self.by_kv(_pick(query, heads))

    def by_kv(self, x: Tensor) -> Tensor:
        """[B, heads, L, ...] -> [B, kv, copies, L, ...]."""
        return x.unflatten(1, (len(self.kv), self.copies))

    def rows(self, x: Tensor, blocks: list[int], bucket: Bucket, block_q: int) -> Tensor:
        """Rows of query blocks from [B, kv, copies, L, ...]: [B * kv, n, copies * rows, ...]."""
        n = len(blocks)
        if blocks[-1] - blocks[0] == n - 1 and (n == 1 or bucket.rows == block_q):
            x = x[:, :, :, blocks[0] * block_q : blocks[0] * block_q + n * bucket.rows]
            x = x.unflatten(3, (n, bucket.rows))
        else:
            whole = x.shape[3] // block_q * block_q
            x = x[:, :, :, :whole].unflatten(3, (-1, block_q))[:, :, :, blocks]
        return x.transpose(2, 3).reshape(x.shape[0] * x.shape[1], n, self.copies * bucket.rows, *x.shape[5:])

    def put(self, target: Tensor, blocks: list[int], bucket: Bucket, block_q: int, x: Tensor) -> None:
        """Write [B * kv, n, copies * rows, ...] where `rows` took it from."""
        n = len(blocks)
        x = x.reshape(self.batch, len(self.kv), n, self.copies, bucket.rows, *x.shape[3:]).transpose(2, 3)
        if blocks[-1] - blocks[0] == n - 1 and (n == 1 or bucket.rows == block_q):
            part = target[:, :, :, blocks[0] * block_q : blocks[0] * block_q + n * bucket.rows]
            part.unflatten(3, (n, bucket.rows)).copy_(x)
        else:
            whole = target.shape[3] // block_q * block_q
            target[:, :, :, :whole].unflatten(3, (-1, block_q))[:, :, :, blocks] = x.to(target.dtype)

    def keys(self, run: Run, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """K and V of blocks lo..hi of a bucket: [n, blocks, width, D], views where starts are evenly spaced."""
        if run.index is not None:
            index = run.index[lo:hi]
            shape = (self.key.shape[0], *index.shape, -1)
            flat = index.flatten()
            return self.key.index_select(1, flat).view(shape), self.value.index_select(1, flat).view(shape)
        step = run.start[lo + 1] - run.start[lo] if hi - lo > 1 else 0
        out = []
        for x in (self.key, self.value):
            n, S, D = x.shape
            offset = x.storage_offset() + run.start[lo] * D
            out.append(x.as_strided((n, hi - lo, run.width, D), (S * D, step * D, D, 1), offset))
        return out[0], out[1]


def _chunks(bucket: Bucket, piece: _Piece) -> Iterator[tuple[int, int]]:
    n, D = piece.key.shape[0], piece.key.shape[2]
    tokens = piece.copies * bucket.rows
    if any(run.index is not None for run in bucket.runs):
        tokens += 2 * sum(run.width for run in bucket.runs)
    size = max(1, CHUNK_BYTES // (n * tokens * D * piece.key.element_size()))
    for lo in range(0, len(bucket.blocks), size):
        yield lo, min(lo + size, len(bucket.blocks))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    B, H, L, D = query.shape
    complete = (
        all(group.complete for group in plan.groups) and sum(len(g.heads) for g in plan.groups) == plan.heads
    )
    out = query.new_empty(B, H, L, D) if complete else query.new_zeros(B, H, L, D)
    high = torch.promote_types(query.dtype, torch.float32)
    lse = torch.zeros(B, H, L, dtype=high) if want_lse else None
    for group in plan.groups:
        for kv, heads in _pieces(group, plan.heads, H, key.shape[1]):
            piece = _Piece(query, key, value, kv, heads)
            target = piece.by_kv(_pick(out, heads))
            sums = None if lse is None else piece.by_kv(_pick(lse, heads))
            for bucket in group.buckets:
                for lo, hi in _chunks(bucket, piece):
                    blocks = bucket.blocks[lo:hi]
                    q = piece.rows(piece.query, blocks, bucket, plan.block_q)
                    o, l = _runs(q, piece, bucket, lo, hi, scale, plan.keep_masks)
                    piece.put(target, blocks, bucket, plan.block_q, o)
                    if sums is not None:
                        piece.put(sums, blocks, bucket, plan.block_q, l)
            if len(heads) < H:  # `_pick` made a copy
                out[:, heads] = target.flatten(1, 2)
                if lse is not None and sums is not None:
                    lse[:, heads] = sums.flatten(1, 2)
    return out, lse


def _runs(
    q: Tensor, piece: _Piece, bucket: Bucket, lo: int, hi: int, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of query blocks over all runs of their bucket."""
    out = lse = None
    copies = piece.copies
    for run in bucket.runs:
        k, v = piece.keys(run, lo, hi)
        o, l = flash(q, k, v, 0.0, False, attn_mask=run.bias(q.dtype, copies, keep), scale=scale)
        if run.blind is not None:
            blind = run.blind.repeat(copies)  # whatever the kernel leaves for such rows, 0 and -inf are right
            o, l = o.masked_fill(blind[:, None], 0.0), l.masked_fill(blind, float("-inf"))
        if out is None or lse is None:
            out, lse = o, l
            continue
        share = torch.sigmoid(l - lse)[..., None].to(o.dtype)
        lse = torch.logaddexp(lse, l)
        out = torch.lerp(out, o, share)
    assert out is not None and lse is not None
    if bucket.dead is not None:
        dead = bucket.dead.repeat(copies)
        out, lse = out.masked_fill(dead[:, None], 0.0), lse.masked_fill(dead, 0.0)
    return out, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    high = torch.promote_types(query.dtype, torch.float32)  # several blocks add to one key
    H, Hkv = query.shape[1], key.shape[1]
    dq = torch.zeros(query.shape, dtype=query.dtype)
    dk, dv = torch.zeros(key.shape, dtype=high), torch.zeros(value.shape, dtype=high)
    for group in plan.groups:
        for kv, heads in _pieces(group, plan.heads, H, Hkv):
            piece = _Piece(query, key, value, kv, heads)
            given = [piece.by_kv(_pick(x, heads)) for x in (grad, out, lse)]
            mine = piece.by_kv(torch.zeros_like(_pick(query, heads), memory_format=torch.contiguous_format))
            sums = [torch.zeros(piece.key.shape, dtype=high) for _ in range(2)]
            for bucket in group.buckets:
                for lo, hi in _chunks(bucket, piece):
                    blocks = bucket.blocks[lo:hi]
                    take = lambda x: piece.rows(x, blocks, bucket, plan.block_q)  # noqa: B023
                    q, (g, o, l) = take(piece.query), (take(x) for x in given)
                    total = None
                    for run in bucket.runs:
                        k, v = piece.keys(run, lo, hi)
                        bias = run.bias(q.dtype, piece.copies, plan.keep_masks)
                        part = flash_backward(g, q, k, v, o, l, 0.0, False, attn_mask=bias, scale=scale)
                        total = part[0] if total is None else total + part[0]
                        for target, p in zip(sums, part[1:]):
                            _add(target, p, run, lo, hi)
                    assert total is not None
                    piece.put(mine, blocks, bucket, plan.block_q, total)
            dq[:, heads] += mine.flatten(1, 2)
            for target, s in zip((dk, dv), sums):
                target[:, kv] += s.unflatten(0, (-1, len(kv)))
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def _add(target: Tensor, part: Tensor, run: Run, lo: int, hi: int) -> None:
    """Add gradients [n, blocks, width, D] of the keys of a run to [n, S, D]."""
    if run.index is not None:
        target.index_add_(1, run.index[lo:hi].flatten(), part.flatten(1, 2).to(target.dtype))
        return
    for i, start in enumerate(run.start[lo:hi]):
        target[:, start : start + run.width] += part[:, i]
