"""From a `BlockLayout` to few large matrix products: query blocks that read the same pattern form a *bucket*.

A bucket is one batch of products. Its keys are a list of *runs*, consecutive keys that move by a constant step from
block to block (a sliding window) or not at all (sinks): such a run is a strided view of K and costs no copy, and
several runs are merged by log-sum-exp. Patterns with many pieces (N-D neighborhoods) become one gathered run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .layout import BlockLayout
from .tiles import unpack

LONG = 512  # keys: a stretch of full entries this long becomes a run of its own, without a mask
MASKS_KEPT = 1 << 24  # elements of additive masks that one layout keeps


@dataclass(eq=False)
class Run:
    """Keys read by a bucket of n query blocks.

    start: int64 [n] first key of each block, with `width` consecutive keys; or index: int64 [n, width] any keys.
    mask: bool [rows, width], None = all visible.
    """

    width: int
    start: list[int] = field(default_factory=list)
    index: Tensor | None = None
    mask: Tensor | None = None
    blind: Tensor | None = None  # bool [rows]: sees nothing of this run
    additive: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def step(self) -> int | None:
        """Constant distance of neighbouring starts, None if there is none."""
        steps = set(np.diff(self.start).tolist())
        return None if len(steps) > 1 else steps.pop() if steps else 0

    def bias(self, dtype: torch.dtype, copies: int, keep: bool) -> Tensor | None:
        """The mask as an additive [1, 1, copies * rows, width] (0 or -inf), one copy per packed query head."""
        if self.mask is None:
            return None
        if (dtype, copies) in self.additive:
            return self.additive[dtype, copies]
        bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
        bias = bias.masked_fill_(~self.mask, float("-inf")).repeat(copies, 1)[None, None]
        if keep:
            self.additive[dtype, copies] = bias
        return bias


@dataclass
class Bucket:
    """Query blocks with one pattern: `blocks` are their numbers, `rows` how many queries each has."""

    blocks: list[int]
    rows: int
    runs: list[Run]
    dead: Tensor | None = None  # bool [rows]: sees nothing at all


@dataclass
class Group:
    """Layout heads that read the same blocks. complete: every query block has entries."""

    heads: tuple[int, ...]
    buckets: list[Bucket]
    complete: bool
    everything: bool


@dataclass
class Plan:
    """What the bucket executor runs; derived from a layout and cached on it. heads: number of layout heads."""

    heads: int

    block_q: int
    order: Tensor | None  # int64 [slots], token of each slot (holes repeat token 0)
    slot: Tensor | None  # int64 [tokens], slot of each token
    groups: list[Group]
    keep_masks: bool


def cost(plan: Plan) -> float:
    """Estimated work per query head, in multiply-adds of one head dimension: to choose between block sizes."""
    total = 0.0
    for group in plan.groups:
        for bucket in group.buckets:
            # gathering a key costs about as much as multiplying it with 24 queries, one call as much as 20000 pairs
            work = sum(r.width * (bucket.rows * (1.0 if r.mask is None else 1.15) + 24 * (r.index is not None))
                       for r in bucket.runs)  # fmt: skip
            total += len(group.heads) * (len(bucket.blocks) * (work + 32 * bucket.rows) + 20000)
    return total / plan.heads


def plan_of(layout: BlockLayout) -> Plan:
    """The plan of a static layout (batch 1), made once."""
    if "plan" not in layout.cached:
        layout.cached["plan"] = _make(layout)
    return layout.cached["plan"]


def _make(layout: BlockLayout) -> Plan:
    nq = layout.q_blocks
    ptr, index, tile = (x.cpu().numpy() for x in (layout.row_ptr, layout.index, layout.tile))
    tiles = unpack(layout.bits.cpu())
    alike: dict[bytes, list[int]] = {}
    for head in range(layout.heads):
        lo, hi = ptr[head * nq], ptr[(head + 1) * nq]
        counts = np.diff(ptr[head * nq : (head + 1) * nq + 1])
        alike.setdefault(counts.tobytes() + index[lo:hi].tobytes() + tile[lo:hi].tobytes(), []).append(head)
    possible = layout.possible_count()
    groups = []
    for heads in alike.values():
        buckets = _buckets(layout, heads[0], ptr, index, tile, tiles)
        seen = sum(_visible(layout, bucket) for bucket in buckets)
        groups.append(
            Group(
                tuple(heads),
                buckets,
                complete=sum(len(b.blocks) for b in buckets) == nq,
                everything=layout.order is None and seen == possible,
            )
        )
    order = slot = None
    if layout.order is not None:
        order = layout.order.clamp(min=0)
        slot = torch.empty(layout.q_len, dtype=torch.long)
        real = layout.order >= 0
        slot[layout.order[real]] = real.nonzero()[:, 0]
    masks = sum(r.mask.numel() for g in groups for b in g.buckets for r in b.runs if r.mask is not None)
    return Plan(layout.heads, layout.block_q, order, slot, groups, keep_masks=masks <= MASKS_KEPT)


def _visible(layout: BlockLayout, bucket: Bucket) -> int:
    per_block = sum(bucket.rows * r.width if r.mask is None else int(r.mask.sum()) for r in bucket.runs)
    return per_block * len(bucket.blocks)


def _buckets(
    layout: BlockLayout, head: int, ptr: np.ndarray, index: np.ndarray, tile: np.ndarray, tiles: Tensor
) -> list[Bucket]:
    nq, slots = layout.q_blocks, layout.q_len if layout.order is None else layout.order.numel()
    found: dict[bytes, tuple[list[int], list[np.ndarray], np.ndarray, int]] = {}
    for m in range(nq):
        entries = slice(ptr[head * nq + m], ptr[head * nq + m + 1])
        blocks, kinds = index[entries], tile[entries]
        if not len(blocks):
            continue
        sort = blocks.argsort()
        blocks, kinds = blocks[sort], kinds[sort]
        rows = min(layout.block_q, slots - m * layout.block_q)
        near = np.diff(blocks) == 1
        key = kinds.tobytes() + near.tobytes() + rows.to_bytes(4, "little")
        bucket = found.setdefault(key, ([], [], kinds, rows))
        bucket[0].append(m)
        bucket[1].append(blocks)
    return [
        _bucket(layout, ms, np.stack(blocks), kinds, rows, tiles)
        for ms, blocks, kinds, rows in found.values()
    ]


def _bucket(
    layout: BlockLayout, ms: list[int], blocks: np.ndarray, kinds: np.ndarray, rows: int, tiles: Tensor
) -> Bucket:
    bk = layout.block_k
    cuts = _cuts(blocks[0], kinds, bk)
    runs = []
    for a, b in zip(cuts[:-1], cuts[1:]):
        mask, width = _mask(kinds[a:b], rows, bk, tiles), (b - a) * bk
        first = 0
        if mask is not None:  # keys at the ends that no row sees are not read
            used = mask.any(0).nonzero()[:, 0]
            if not used.numel():
                continue
            first, width = int(used[0]), int(used[-1]) + 1 - int(used[0])
            mask = mask[:, first : first + width].contiguous()
        runs.append(Run(width, (blocks[:, a] * bk + first).tolist(), mask=_some(mask)))
    long = [r for r in runs if r.mask is None and r.width >= LONG and r.step() is not None]
    rest = [r for r in runs if r not in long]
    if len(rest) > 2 or any(r.step() is None for r in rest):
        rest = [_gather(rest, rows)]
    runs = long + rest
    dead = torch.ones(rows, dtype=torch.bool)
    for run in runs:
        if run.mask is None:
            dead &= False
        else:
            blind = ~run.mask.any(1)
            run.blind = blind if blind.any() else None
            dead &= blind
    return Bucket(ms, rows, runs, dead if dead.any() else None)


def _cuts(blocks: np.ndarray, kinds: np.ndarray, block_k: int) -> list[int]:
    """Where one run of entries ends and the next begins: at gaps, and around long stretches of full entries."""
    cuts = {0, len(blocks)} | {int(i) + 1 for i in np.flatnonzero(np.diff(blocks) != 1)}
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (kinds < 0).astype(np.int8), [0]])))
    for a, b in zip(edges[::2].tolist(), edges[1::2].tolist()):
        if (b - a) * block_k >= LONG:
            cuts |= {a, b}
    return sorted(cuts)


def _mask(kinds: np.ndarray, rows: int, block_k: int, tiles: Tensor) -> Tensor | None:
    if (kinds < 0).all():
        return None
    parts = [
        tiles[k, :rows] if k >= 0 else torch.ones(rows, block_k, dtype=torch.bool) for k in kinds.tolist()
    ]
    return torch.cat(parts, 1)


def _some(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask


def _gather(runs: list[Run], rows: int) -> Run:
    """All runs as one gathered run of exactly the keys that some row sees."""
    index = torch.cat([torch.tensor(r.start)[:, None] + torch.arange(r.width) for r in runs], 1)
    ones = lambda r: torch.ones(rows, r.width, dtype=torch.bool)
    mask = torch.cat([ones(r) if r.mask is None else r.mask for r in runs], 1)
    used = mask.any(0)
    return Run(int(used.sum()), index=index[:, used].contiguous(), mask=_some(mask[:, used].contiguous()))
