"""Layout rules: which keys a head *reads*, as small hashable values (the sparse half of a `Program`).

A rule speaks of *positions*: the index of a token counted from the first real token of its row, so that left
padding never moves a sink. Rules say nothing about causality or padding, which are the `Mask`'s business; the
keys a query finally sees are those that the mask and every rule allow.

Convention: a *window* counts visible keys including the query's own.
"""

from __future__ import annotations

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

    def required_len(self) -> int | None:
        """Sequence length the rule is defined for, if it is a fixed one (vision grids)."""
        return None


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


@dataclass(frozen=True)
class OnHeads(Rule):
    """`rule` on the listed query heads, everything on the others."""

    rule: Rule
    on: tuple[int, ...]
    heads: int = 1  # number of query heads of the site

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on = torch.zeros(self.heads, dtype=torch.bool, device=q.device)
        on[list(self.on)] = True
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else torch.zeros_like(head)
        return self.rule.visible(inner, q, k) | ~on[head]

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        if head in self.on:
            inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
            return self.rule.key_ranges(inner, q_lo, q_hi, kv_len)
        everything = [(torch.zeros_like(q_lo), torch.zeros_like(q_lo) + kv_len)]
        return everything, everything

    def token_order(self, block: int) -> tuple[int, ...] | None:
        return self.rule.token_order(block)

    def required_len(self) -> int | None:
        return self.rule.required_len()


@dataclass(frozen=True)
class AllOf(Rule):
    """Intersection of rules (two patches on one site). Layout heads are spread over the largest head count."""

    rules: tuple[Rule, ...]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(rule.heads for rule in self.rules)

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

    def required_len(self) -> int | None:
        lengths = {n for n in (rule.required_len() for rule in self.rules) if n is not None}
        return lengths.pop() if len(lengths) == 1 else None


def intersect(rules: list[Rule]) -> Rule | None:
    """The conjunction of `rules`; None for no rule at all (everything is read)."""
    if not rules:
        return None
    return rules[0] if len(rules) == 1 else AllOf(tuple(rules))
