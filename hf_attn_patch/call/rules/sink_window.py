"""Layout rules of causal text: sinks and a window, block-granular windows, strided shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Ranges, Rule


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
        plain = self.stride <= 4096 or torch.compiler.is_compiling()  # nobody can look at numbers then
        size = self.stride if plain else min(self.stride, max(int(n.max()) + 1, 1))
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
