"""Layout rules on token grids beside `rules.Neighborhood`: windows that are cut at borders, and discs.

Tokens are a 1-D, 2-D or 3-D grid in row-major order after `prefix` tokens (CLS, registers), which see everything and
are seen by everybody.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Ranges, Rule
from .neighborhood import Neighborhood


@dataclass(frozen=True)
class BlockWindows(Neighborhood):
    """Blocks of queries that share one window, cut at the borders of the grid (`Neighborhood` shifts it inward).

    Per axis of length L, with block size `stride` s, `window` W = s + 2 h and `start` o in 0 .. s - 1: query i lies in
    block n = floor((i - o) / s) and sees the keys ``o + n s - h .. o + n s + s - 1 + h`` that exist. h = 0 is a
    partition: Swin (o = 0), shifted Swin (o = s // 2), MaxViT blocks; h > 0 is HaloNet with its padding masked. A
    block that the border cuts is a smaller block. `dilation` is 1, `causal` is False on every axis.
    """

    start: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        halo: tuple[int, ...],
        start: tuple[int, ...],
        prefix: int,
    ) -> BlockWindows:
        """The rule from sizes per axis: `block` queries share a window that reaches `halo` keys further each way."""
        window = tuple(b + 2 * h for b, h in zip(block, halo))
        return cls(grid, window, block, (1,) * len(grid), (False,) * len(grid), prefix, start)

    def axis_bounds(self, axis: int, index: Tensor) -> tuple[Tensor, Tensor]:
        L, s, start = self.grid[axis], self.stride[axis], self.start[axis]
        halo = (self.window[axis] - s) // 2
        first = start + (index - start).div(s, rounding_mode="floor") * s
        return (first - halo).clamp(min=0), (first + s - 1 + halo).clamp(max=L - 1)

    def axis_visible(self, axis: int, qi: Tensor, ki: Tensor) -> Tensor:
        lo, hi = self.axis_bounds(axis, qi)
        return (ki >= lo) & (ki <= hi)

    def token_order(self, block: int) -> tuple[int, ...] | None:
        # the tokens of a window lie together, because a box of 64 tokens need not be a multiple of any window:
        # 7 x 7 windows on 14 x 14 tokens touch every pair of 8 x 8 boxes, and a quarter of the pairs of windows
        if len(self.grid) == 1 or (self.window != self.stride and math.prod(self.stride) < block):
            return super().token_order(block)
        return _window_order(self.grid, self.stride, self.start, self.prefix, block)


@functools.lru_cache(maxsize=64)
def _window_order(
    grid: tuple[int, ...], window: tuple[int, ...], start: tuple[int, ...], prefix: int, block: int
) -> tuple[int, ...]:
    """Tokens of a row-major grid window by window, no window across a multiple of `block` where it fits into one;
    prefix tokens follow in a block of their own. -1 pads."""
    token = torch.arange(math.prod(grid))
    cell = torch.zeros_like(token)
    for at, size, w, o in zip(torch.unravel_index(token, grid), grid, window, start):
        cell = cell * (size // w + 2) + (at - o).div(w, rounding_mode="floor") + 1
    order: list[int] = []
    windows = (token[cell == c] + prefix for c in cell.unique())
    for members in [*(w.tolist() for w in windows), list(range(prefix))]:
        room = -len(order) % block
        if len(members) > room or (members and members[0] < prefix):
            order += [-1] * room
        order += members
    order += [-1] * (-len(order) % block)
    return tuple(order)


@dataclass(frozen=True)
class Disc(Rule):
    """Keys in a disc around the query: squared distance on the grid ``sum_axes (q - k)^2 < radius^2``, strictly, cut at
    the borders (CLEAR, arXiv 2412.16112). In one axis it is a window, in three a ball."""

    grid: tuple[int, ...]
    radius: float
    prefix: int = 0

    def required_len(self) -> int:
        return self.prefix + math.prod(self.grid)

    def coordinates(self, position: Tensor) -> tuple[Tensor, ...]:
        """Grid coordinates of token positions; prefix tokens (and holes, -1) give those of the first patch."""
        return torch.unravel_index((position - self.prefix).clamp(min=0), self.grid)

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        pairs = zip(self.coordinates(q), self.coordinates(k))
        squared = torch.stack(torch.broadcast_tensors(*((a - b) ** 2 for a, b in pairs))).sum(0)
        return (squared < self.radius**2) | (q < self.prefix) | (k < self.prefix)

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        # bounds on the slowest axis only; a run with a prefix query sees everything
        inner, reach = math.prod(self.grid[1:]), math.ceil(self.radius) - 1
        zero, special = torch.zeros_like(q_lo), q_lo < self.prefix
        first = (q_lo - self.prefix).div(inner, rounding_mode="floor") - reach
        last = (q_hi - 1 - self.prefix).div(inner, rounding_mode="floor") + reach + 1
        lo = torch.where(special, 0, self.prefix + first.clamp(min=0) * inner)
        hi = torch.where(special, kv_len, self.prefix + last.clamp(max=self.grid[0]) * inner)
        prefix = (zero, zero + self.prefix)
        return [prefix, (lo, hi)], [prefix, (zero, torch.where(q_hi <= self.prefix, kv_len, 0))]

    def token_order(self, block: int) -> tuple[int, ...] | None:
        ones = (1,) * len(self.grid)
        return Neighborhood(self.grid, ones, ones, ones, (False,) * len(self.grid), self.prefix).token_order(
            block
        )

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        # Only distances count, so two pairs of blocks are alike if their tokens are arranged alike and lie equally far
        # apart. Boxes around the tokens decide most pairs: those that are too far, and those that are near throughout.
        shapes, corners = [], []
        for tokens in (q_tokens, k_tokens):
            at = torch.stack(self.coordinates(tokens), -1)  # [n, block, axes]
            hole = (tokens < 0)[..., None]
            low = at.masked_fill(hole, 1 << 30).amin(1)
            high = at.masked_fill(hole, -(1 << 30)).amax(1)
            arranged = (at - low[:, None]).masked_fill(hole, -1).flatten(1)
            shapes.append(torch.unique(arranged, dim=0, return_inverse=True)[1])
            corners.append((low, high))
        (q_low, q_high), (k_low, k_high) = corners
        gap = torch.maximum(k_low[None] - q_high[:, None], q_low[:, None] - k_high[None]).clamp(min=0)
        span = torch.maximum(k_high[None] - q_low[:, None], q_high[:, None] - k_low[None])
        nothing = (gap**2).sum(-1) >= self.radius**2
        everything = ((span**2).sum(-1) < self.radius**2) & ~(k_tokens < 0).any(1)[None]
        offset = k_low[None] - q_low[:, None]  # [nq, nk, axes]
        kinds = shapes[0][:, None] * (int(shapes[1].max()) + 1) + shapes[1][None]
        for axis, size in enumerate(self.grid):
            kinds = kinds * (2 * size) + offset[..., axis] + size
        kinds = (kinds + 2).masked_fill(everything, 1).masked_fill(nothing, 0)
        own = [((t >= 0) & (t < self.prefix)).any(1) for t in (q_tokens, k_tokens)]
        special = own[0][:, None] | own[1][None]  # blocks with prefix tokens are looked at one by one
        alone = int(kinds.max()) + 2 + torch.arange(kinds.numel()).reshape(kinds.shape)
        return torch.where(special, alone, kinds)


@dataclass(frozen=True)
class Appended(Rule):
    """Who reads keys that were put behind `tokens` tokens (`Program.append`): the patches (rows from `prefix` on) of
    the heads `on` (None = all) read all of them, and of the tokens those of `inner` (None = no token). Everybody
    else reads all tokens and no appended key.
    """

    tokens: int
    prefix: int
    inner: Rule | None = None
    on: tuple[int, ...] | None = None
    heads: int = 1

    def _chosen(self, head: int) -> bool:
        return self.on is None or head in self.on

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        chosen = torch.tensor([self._chosen(h) for h in range(self.heads)], device=q.device)[head]
        reads = (q >= self.prefix) & chosen
        seen = ~reads
        if self.inner is not None:
            seen = seen | self.inner.visible(torch.zeros_like(head), q, k.clamp(max=self.tokens - 1))
        return torch.where(k < self.tokens, seen, reads)

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        zero, all_tokens = torch.zeros_like(q_lo), torch.full_like(q_lo, self.tokens)
        if not self._chosen(head):
            return [(zero, all_tokens)], [(zero, all_tokens)]
        maybe: Ranges = [(all_tokens, torch.where(q_hi > self.prefix, kv_len, 0))]
        surely: Ranges = [(all_tokens, torch.where(q_lo >= self.prefix, kv_len, 0))]
        maybe.append((zero, torch.where(q_lo < self.prefix, self.tokens, 0)))
        surely.append((zero, torch.where(q_hi <= self.prefix, self.tokens, 0)))
        if self.inner is not None:
            more, sure = self.inner.key_ranges(0, q_lo, q_hi, self.tokens)
            maybe += [(lo, hi.clamp(max=self.tokens)) for lo, hi in more]
            surely += [(lo, hi.clamp(max=self.tokens)) for lo, hi in sure]
        return maybe, surely
