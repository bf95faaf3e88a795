"""Layout rule of neighborhood attention on 1-D, 2-D and 3-D token grids."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Ranges, Rule


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
