"""Layout rules: which keys a head *reads*, as small hashable values (the sparse half of a `Program`).

A rule speaks of *positions*: the index of a token counted from the first real token of its row, so that left
padding never moves a sink. Rules say nothing about causality or padding, which are the `Mask`'s business; the
keys a query finally sees are those that the mask and every rule allow.

Convention: a *window* counts visible keys including the query's own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ranges = list[tuple[Tensor, Tensor]]  # half-open key ranges, each (lo [n], hi [n])


class Rule:
    """A static visibility rule. Subclasses are frozen dataclasses (hashable: layouts are cached by rule).

    `heads` is the number of layout heads: 1 (all heads alike), the number of KV heads, or of query heads.
    """

    heads: int = 1
    dynamic: bool = False  # chosen for one call (holds tensors): no layout of it is kept

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """bool, broadcast over layout head, query position and key position (int64 tensors)."""
        raise NotImplementedError

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        """Bounds for runs of queries, so that a layout can be built without looking at L x S elements.

        Args:
            head: layout head. q_lo, q_hi: int64 [n], runs of queries [q_lo, q_hi).

        Returns:
            (maybe, surely): ranges that together hold every key some query of the run sees, and ranges of keys
            that *every* query of the run sees. Empty or out-of-range intervals are allowed.
        """
        zero = torch.zeros_like(q_lo)
        return [(zero, zero + kv_len)], []

    def token_order(self, block: int) -> tuple[int, ...] | None:
        """A token order that makes the rule block-sparse (N-D tiles); -1 pads; None = as is."""
        return None

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        """Numbers int64 [n, c] such that blocks (of at most `block` tokens, starting at q_lo and k_lo) with equal
        numbers, of whatever head, hold equal visibility: each kind of tile is evaluated once. None = unknown."""
        return None

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        """The same for blocks of reordered tokens: int64 [nq, nk], 0 = nothing is visible, 1 = everything is.

        Args:
            q_tokens, k_tokens: positions int64 [nq, block_q], [nk, block_k], -1 = hole (a hole in the keys is
            nothing to see, one in the queries has no say).
        """
        return None

    def required_len(self) -> int | None:
        """Sequence length the rule is defined for, if it is a fixed one (vision grids)."""
        return None


@dataclass(frozen=True)
class Everything(Rule):
    """No restriction."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        everything = [(torch.zeros_like(q_lo), torch.zeros_like(q_lo) + kv_len)]
        return everything, everything

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        return torch.zeros_like(q_lo)[:, None]

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        return torch.ones(len(q_tokens), len(k_tokens), dtype=torch.long)


@dataclass(frozen=True)
class SinkWindow(Rule):
    """First `sinks` tokens and the last `window` tokens (own included): ``k < sinks or |q - k| < window``.

    Each of the two is an int, or a tuple with one value per layout head.
    """

    sinks: int | tuple[int, ...] = 4
    window: int | tuple[int, ...] = 256

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(len(v) if isinstance(v, tuple) else 1 for v in (self.sinks, self.window))

    def of(self, head: int) -> tuple[int, int]:
        """(sinks, window) of one layout head."""
        pick = lambda v: v[head] if isinstance(v, tuple) else v
        return pick(self.sinks), pick(self.window)

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        pick = lambda v: torch.tensor(v, device=q.device)[head] if isinstance(v, tuple) else v
        return (k < pick(self.sinks)) | ((q - k).abs() < pick(self.window))

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        sinks, window = self.of(head)
        zero = torch.zeros_like(q_lo)
        sink = (zero, zero + sinks)
        return [sink, (q_lo - window + 1, q_hi - 1 + window)], [sink, (q_hi - window, q_lo + window)]

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        sinks, window = self.of(head)
        distance = (q_lo - k_lo).clamp(-window - block, window + block)
        sink_part = (sinks - k_lo).clamp(0, block)
        return torch.stack([torch.full_like(q_lo, window), distance, sink_part], -1)


@dataclass(frozen=True)
class BlockSinkWindow(Rule):
    """Block-granular sink + window: key block n is read by query block m iff ``n < sink or m - n < local``.

    Counts are in blocks of `block` tokens, one value per layout head or one for all. This is the *prefill*
    layout of the original MoA kernel, which keeps between ``block * (local - 1) + 1`` and ``block * local`` tokens.
    """

    sink_blocks: tuple[int, ...] = (1,)
    local_blocks: tuple[int, ...] = (1,)
    block: int = 64

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(len(self.sink_blocks), len(self.local_blocks))

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sink = torch.tensor(self.sink_blocks, device=q.device)
        local = torch.tensor(self.local_blocks, device=q.device)
        m, n = q // self.block, k // self.block
        return (n < sink[head.clamp(max=len(sink) - 1)]) | (
            (m - n).abs() < local[head.clamp(max=len(local) - 1)]
        )

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        b = self.block
        sink = self.sink_blocks[min(head, len(self.sink_blocks) - 1)]
        local = self.local_blocks[min(head, len(self.local_blocks) - 1)]
        first, last = q_lo // b, (q_hi - 1) // b
        zero = torch.zeros_like(q_lo)
        sinks = (zero, zero + sink * b)
        maybe = ((first - local + 1) * b, (last + local) * b)
        surely = ((last - local + 1) * b, (first + local) * b)
        return [sinks, maybe], [sinks, surely]

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        sink = self.sink_blocks[min(head, len(self.sink_blocks) - 1)] * self.block
        local = self.local_blocks[min(head, len(self.local_blocks) - 1)]
        reach = local * self.block + self.block + block
        distance = (q_lo - k_lo).clamp(-reach, reach)
        return torch.stack(
            [torch.full_like(q_lo, local), distance, q_lo % self.block, (sink - k_lo).clamp(0, block)], -1
        )


@dataclass(frozen=True)
class StridedShards(Rule):
    """Block-granular local window + vertical stripes, other stripes for every head: with m, n the blocks of query
    and key, ``|m - n| < local_blocks or n mod stride in residues[head]``.

    Source: S2-Attention (arXiv 2407.17678). A key block that left the local window is read by all later queries of
    a head or by none. `residues`: per layout head, numbers in 0 .. stride - 1. `block`: tokens.
    """

    residues: tuple[tuple[int, ...], ...]
    stride: int
    local_blocks: int
    block: int = 64

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.residues)

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        m = torch.div(q, self.block, rounding_mode="floor")
        n = torch.div(k, self.block, rounding_mode="floor")
        # a stride longer than the text must not cost its length (blocks before the text are the mask's business)
        size = self.stride if self.stride <= 4096 else min(self.stride, max(int(n.max()) + 1, 1))
        stripes = torch.zeros(self.heads, size, dtype=torch.bool, device=q.device)
        for h, own in enumerate(self.residues):
            stripes[h, [r for r in own if r < size]] = True
        return ((m - n).abs() < self.local_blocks) | stripes[head, (n % self.stride).clamp(max=size - 1)]

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        b, local, own = self.block, self.local_blocks, set(self.residues[head])
        zero = torch.zeros_like(q_lo)
        first, last = q_lo // b, (q_hi - 1) // b
        if len(own) == self.stride:
            everything = [(zero, zero + kv_len)]
            return everything, everything
        near = ((first - local + 1) * b, (last + local) * b)
        surely = ((last - local + 1) * b, (first + local) * b)
        blocks = -(-kv_len // b)
        if self.stride * b <= 32 or blocks > 1 << 16:  # stripes that no layout block can fall between
            return [(zero, zero + kv_len)], [surely]
        stripes: Ranges = []
        begin = None
        for n in range(blocks + 1):  # runs of neighbouring blocks are one range
            if n < blocks and n % self.stride in own:
                begin = n if begin is None else begin
            elif begin is not None:
                stripes.append((zero + begin * b, zero + n * b))
                begin = None
        return [*stripes, near], [surely]

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        period = self.stride * self.block
        reach = self.local_blocks * self.block + self.block + block
        distance = (q_lo - k_lo).clamp(-reach, reach) + reach
        inside = torch.where(distance == 2 * reach, 0, q_lo % self.block)  # far behind, only stripes are left
        number = (distance * self.block + inside) * period + k_lo % period
        return (number * self.heads + self.residues.index(self.residues[head]))[:, None]


@dataclass(frozen=True)
class Neighborhood(Rule):
    """Generalised neighborhood attention (GNA) on a 1-D, 2-D or 3-D grid of tokens in row-major order.

    Source: NATTEN (arXiv 2204.07143, 2209.15001, 2504.16922). Per axis of length L with window W, stride s,
    dilation d, causal flag c, query index i: group g = i mod d, p = i // d, L_g = ceil((L - g) / d). The run of s
    queries shares the window of its leader: ``l = min(s (p // s) + s // 2, L_g - 1)`` (causal: ``+ s - 1``). Keys
    are ``a .. a + W - 1`` with ``a = clamp(l - W // 2, 0, L_g - W)``; causal: ``max(l - W + 1, 0) .. p``. The real
    key index is ``g + d * key``. The mask is the AND of the axes: windows shift inward at borders.

    The first `prefix` tokens (CLS, registers) see everything and are seen by everybody.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    prefix: int = 0

    def required_len(self) -> int:
        return self.prefix + math.prod(self.grid)

    def axis_visible(self, axis: int, qi: Tensor, ki: Tensor) -> Tensor:
        """The rule on one axis: bool, broadcast over coordinates."""
        L, W, s, d = self.grid[axis], self.window[axis], self.stride[axis], self.dilation[axis]
        g, p = qi % d, qi // d
        length = (L - g + d - 1) // d
        in_group = ki // d
        if self.causal[axis]:
            leader = torch.minimum(s * (p // s) + s - 1, length - 1)
            lo, hi = (leader - W + 1).clamp(min=0), p
        else:
            leader = torch.minimum(s * (p // s) + s // 2, length - 1)
            lo = torch.minimum((leader - W // 2).clamp(min=0), length - W)
            hi = lo + W - 1
        return (ki % d == g) & (in_group >= lo) & (in_group <= hi)

    def coordinates(self, position: Tensor) -> list[Tensor]:
        """Grid coordinates of token positions; prefix tokens give negative values on the first axis."""
        rest, coords = position - self.prefix, []
        for size in reversed(self.grid[1:]):
            coords.append(rest % size)
            rest = torch.div(rest, size, rounding_mode="floor")
        return [rest, *reversed(coords)]

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = None
        for axis, (qi, ki) in enumerate(zip(self.coordinates(q), self.coordinates(k))):
            axis_seen = self.axis_visible(axis, qi, ki)
            seen = axis_seen if seen is None else seen & axis_seen
        assert seen is not None
        return seen | (q < self.prefix) | (k < self.prefix)

    def axis_bounds(self, axis: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key coordinate seen on one axis by queries at `index`."""
        L, W, s, d = self.grid[axis], self.window[axis], self.stride[axis], self.dilation[axis]
        g, p = index % d, index // d
        length = (L - g + d - 1) // d
        if self.causal[axis]:
            leader = torch.minimum(s * (p // s) + s - 1, length - 1)
            return g + d * (leader - W + 1).clamp(min=0), index
        leader = torch.minimum(s * (p // s) + s // 2, length - 1)
        lo = torch.minimum((leader - W // 2).clamp(min=0), length - W)
        return g + d * lo, g + d * (lo + W - 1)

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        # Bounds on the slowest axis only. Within a dilation group windows move monotonically with the query, so
        # the extremes of a run are among its first and last d coordinates.
        inner, d, L = math.prod(self.grid[1:]), self.dilation[0], self.grid[0]
        first = ((q_lo - self.prefix) // inner).clamp(0, L - 1)
        last = ((q_hi - 1 - self.prefix) // inner).clamp(0, L - 1)
        step = torch.arange(d, device=q_lo.device)
        head_, tail = (
            torch.minimum(first[:, None] + step, last[:, None]),
            torch.maximum(last[:, None] - step, first[:, None]),
        )
        lo, hi = self.axis_bounds(0, head_)[0].amin(1), self.axis_bounds(0, tail)[1].amax(1) + 1
        zero = torch.zeros_like(q_lo)
        special = q_lo < self.prefix  # a run with a prefix query sees everything
        maybe = (
            torch.where(special, 0, self.prefix + lo * inner),
            torch.where(special, kv_len, self.prefix + hi * inner),
        )
        prefix = (zero, zero + self.prefix)
        surely = [prefix, (zero, torch.where(q_hi <= self.prefix, kv_len, 0))]
        if len(self.grid) == 1 and d == 1:
            # plain 1-D windows: what the latest window start and the earliest window end leave is seen by all
            stop = self.axis_bounds(0, first)[1] + 1
            start = self.axis_bounds(0, last)[0]
            surely.append((self.prefix + start, torch.where(special, 0, self.prefix + stop)))
        return [prefix, maybe], surely

    def tile_shape(self, block: int) -> tuple[int, ...]:
        """Box of `block` tokens (a power of two per axis, as cubic as the grid allows; slower axes get less)."""
        shape = [1] * len(self.grid)
        while math.prod(shape) < block:
            room = [a for a in range(len(shape)) if shape[a] < self.grid[a]] or [len(shape) - 1]
            axis = min(reversed(room), key=lambda a: shape[a])
            shape[axis] *= 2
        return tuple(shape)

    def token_order(self, block: int) -> tuple[int, ...] | None:
        if len(self.grid) == 1 and self.dilation[0] == 1:
            return None
        return _box_order(self.grid, self.dilation, self.tile_shape(block), self.prefix, block)

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        # The rule is a product over axes, and so is a tile: number the distinct tiles of each axis, then combine.
        hole_q, hole_k = q_tokens < 0, k_tokens < 0
        kinds = torch.zeros(len(q_tokens), len(k_tokens), dtype=torch.long)
        nothing, everything = (
            torch.zeros_like(kinds, dtype=torch.bool),
            torch.ones_like(kinds, dtype=torch.bool),
        )
        for axis, (qi, ki) in enumerate(zip(self.coordinates(q_tokens), self.coordinates(k_tokens))):
            rows, at_row = torch.unique(qi.masked_fill(hole_q, -1), dim=0, return_inverse=True)
            cols, at_col = torch.unique(ki.masked_fill(hole_k, -1), dim=0, return_inverse=True)
            known: dict[bytes, int] = {}
            number = torch.zeros(len(rows), len(cols), dtype=torch.long)
            for i, row in enumerate(rows):  # one row of pairs at a time bounds memory
                q, k = row[None, :, None], cols[:, None, :]
                seen = (self.axis_visible(axis, q, k) | (q < 0)) & (k >= 0)
                empty, full = ~(seen & (q >= 0)).flatten(1).any(1), seen.flatten(1).all(1)
                for j, pattern in enumerate(seen.numpy()):
                    if not empty[j] and not full[j]:
                        number[i, j] = known.setdefault(pattern.tobytes(), len(known) + 2)
                    else:
                        number[i, j] = 0 if empty[j] else 1
            axis_kind = number[at_row][:, at_col]
            nothing |= axis_kind == 0
            everything &= axis_kind == 1
            kinds = kinds * (len(known) + 2) + axis_kind
        kinds = (kinds + 2).masked_fill(everything, 1).masked_fill(nothing, 0)
        special = ((q_tokens < self.prefix) & ~hole_q).any(1)[:, None] | (
            (k_tokens < self.prefix) & ~hole_k
        ).any(1)[None]  # blocks with prefix tokens are looked at one by one
        return torch.where(special, kinds.max() + 2 + torch.arange(kinds.numel()).reshape(kinds.shape), kinds)


@functools.lru_cache(maxsize=64)
def _box_order(
    grid: tuple[int, ...], dilation: tuple[int, ...], tile: tuple[int, ...], prefix: int, block: int
) -> tuple[int, ...]:
    """Tokens of a row-major grid by dilation group, then by box of `tile` tokens, in each box by halves (so that
    smaller blocks are boxes too); prefix tokens follow in a block of their own. -1 fills incomplete boxes."""
    keys, shape = [], []
    for size, d, t in zip(grid, dilation, tile):
        per_group = -(-size // d)
        padded = -(-per_group // t) * t
        p = torch.arange(padded)
        index = torch.arange(d)[:, None] + d * p  # [group, place]
        keys.append(torch.where(index < size, index, -1).reshape(d, padded // t, t))
        shape.append((d, padded // t, t))
    n = len(grid)
    position = torch.zeros([s for axis in shape for s in axis], dtype=torch.long)
    hole = torch.zeros_like(position, dtype=torch.bool)
    for axis, key in enumerate(keys):
        view = [1] * (3 * n)
        view[3 * axis : 3 * axis + 3] = key.shape
        key = key.reshape(view)
        position = position * grid[axis] + key.clamp(min=0)
        hole = hole | (key < 0)
    position = (position + prefix).masked_fill(hole, -1)
    # split the in-box axes into bits, slowest bits of all axes first
    bits = [(axis, int(math.log2(t))) for axis, t in enumerate(tile)]
    split: list[int] = []
    place: dict[int, int] = {}
    for axis, (d, tiles, _) in enumerate(shape):
        place[axis] = len(split)
        split += [d, tiles] + [2] * bits[axis][1]
    position = position.reshape(split)
    groups = [place[a] for a in range(n)]
    boxes = [place[a] + 1 for a in range(n)]
    inside = sorted(
        ((bits[a][1] - 1 - i, a, place[a] + 2 + (i)) for a in range(n) for i in range(bits[a][1])),
        key=lambda x: (-x[0], x[1]),
    )
    position = position.permute(groups + boxes + [dim for _, _, dim in inside]).reshape(-1)
    parts = [position]
    if prefix:
        tail = torch.full((-(-prefix // block) * block,), -1, dtype=torch.long)
        tail[:prefix] = torch.arange(prefix)
        parts.append(tail)
    order = torch.cat(parts)
    # boxes that hold no token at all (dilation groups of unequal size) would only cost time
    order = order.reshape(-1, block)
    return tuple(order[(order >= 0).any(1)].flatten().tolist())


@dataclass(frozen=True, eq=False, repr=False)
class ChosenBlocks(Rule):
    """Key blocks that a method chose for this very call: row r of head h of batch item b reads block n iff
    ``chosen[b, h, r, n]``. Row r stands for `block_q` queries, block n for `block_k` keys, both by position.

    chosen: bool [B|1, layout heads, rows, blocks], never true for a block that lies in the future. origin: int64
    [B|1], position of the first query of row 0; negative where that is left padding, and then `block_q` is 1 (blocks
    of several queries begin at the first real one).
    """

    chosen: Tensor
    block_q: int
    block_k: int
    origin: Tensor
    dynamic = True

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.chosen.shape[1]

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch = torch.arange(self.chosen.shape[0], device=q.device).reshape(-1, 1, 1, 1)
        row = (q - self.origin.reshape(-1, 1, 1, 1)).div(self.block_q, rounding_mode="floor")
        block = k.div(self.block_k, rounding_mode="floor")
        rows, blocks = self.chosen.shape[2:]
        found = self.chosen[batch, head, row.clamp(0, rows - 1), block.clamp(0, blocks - 1)]
        return found & (k >= 0) & (block < blocks)

    def __repr__(self) -> str:
        return f"ChosenBlocks({list(self.chosen.shape)}, block_q={self.block_q}, block_k={self.block_k})"


@dataclass(frozen=True)
class OnHeads(Rule):
    """`rule` on the listed query heads, everything on the others."""

    rule: Rule
    on: tuple[int, ...]
    heads: int = 1  # number of query heads of the site

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        return self.rule.dynamic

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on = torch.zeros(self.heads, dtype=torch.bool, device=q.device)
        on[list(self.on)] = True
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else torch.zeros_like(head)
        return self.rule.visible(inner, q, k) | ~on[head]

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        if head in self.on:
            inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
            return self.rule.key_ranges(inner, q_lo, q_hi, kv_len)
        return Everything().key_ranges(head, q_lo, q_hi, kv_len)

    def token_order(self, block: int) -> tuple[int, ...] | None:
        return self.rule.token_order(block)

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
        kind = self.rule.tile_kind(inner, q_lo, k_lo, block)
        # the column that tells "on" from "off" keeps the tiles of both apart
        on = torch.full_like(q_lo, head in self.on)[:, None]
        return None if kind is None else torch.cat([on, kind * on], -1)

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        if head not in self.on:
            return Everything().block_kinds(head, q_tokens, k_tokens)
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
        return self.rule.block_kinds(inner, q_tokens, k_tokens)

    def required_len(self) -> int | None:
        return self.rule.required_len()


@dataclass(frozen=True)
class AllOf(Rule):
    """Intersection of rules (two patches on one site). Layout heads are spread over the largest head count."""

    rules: tuple[Rule, ...]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(rule.heads for rule in self.rules)

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        return any(rule.dynamic for rule in self.rules)

    def _inner(self, rule: Rule, head: Any) -> Any:
        return head * rule.heads // self.heads

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self.rules[0].visible(self._inner(self.rules[0], head), q, k)
        for rule in self.rules[1:]:
            seen = seen & rule.visible(self._inner(rule, head), q, k)
        return seen

    def token_order(self, block: int) -> tuple[int, ...] | None:
        orders = [o for o in (rule.token_order(block) for rule in self.rules) if o is not None]
        return orders[0] if orders else None

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        maybe, surely = Everything().key_ranges(head, q_lo, q_hi, kv_len)
        for rule in self.rules:
            more, sure = rule.key_ranges(self._inner(rule, head), q_lo, q_hi, kv_len)
            maybe, surely = _meet(maybe, more), _meet(surely, sure)
        return maybe, surely

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        kinds = [rule.tile_kind(self._inner(rule, head), q_lo, k_lo, block) for rule in self.rules]
        return None if any(kind is None for kind in kinds) else torch.cat(kinds, -1)  # type: ignore[arg-type]

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        kinds = [rule.block_kinds(self._inner(rule, head), q_tokens, k_tokens) for rule in self.rules]
        if any(kind is None for kind in kinds):
            return None
        stack = torch.stack(kinds, -1)  # type: ignore[arg-type]
        joint = torch.unique(stack.flatten(0, 1), dim=0, return_inverse=True)[1].reshape(stack.shape[:2]) + 2
        return joint.masked_fill((stack == 1).all(-1), 1).masked_fill((stack == 0).any(-1), 0)

    def required_len(self) -> int | None:
        lengths = {n for n in (rule.required_len() for rule in self.rules) if n is not None}
        return lengths.pop() if len(lengths) == 1 else None


def _meet(a: Ranges, b: Ranges) -> Ranges:
    """Pairwise intersections of two unions of ranges."""
    return [(torch.maximum(x[0], y[0]), torch.minimum(x[1], y[1])) for x in a for y in b]


def intersect(rules: list[Rule]) -> Rule | None:
    """The conjunction of `rules`; None for no rule at all (everything is read)."""
    if not rules:
        return None
    return rules[0] if len(rules) == 1 else AllOf(tuple(rules))
