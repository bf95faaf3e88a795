"""Tiles of a `BlockLayout`: which blocks are candidates, what their elements are, and sharing equal ones.

Work is kept far below L x S: bounds of a rule (`Rule.key_ranges`, or `Rule.block_kinds` where tokens are
reordered) leave open only boundary blocks, and of those only one of each *kind* is evaluated elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..call.rules import Rule

PIECE = 1 << 21  # elements evaluated at once


@dataclass(frozen=True)
class Shape:
    """Sizes of a layout under construction; `heads` are layout heads, `slots` the length of a token order."""

    q_len: int
    kv_len: int
    q_offset: int
    causal: bool
    window: int | None
    block_q: int
    block_k: int
    heads: int
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.block_k % 32 or self.block_q % 32 or min(self.block_q, self.block_k) < 32:
            raise ValueError(f"blocks are multiples of 32 tokens, got {self.block_q} x {self.block_k}")

    @property
    def nq(self) -> int:
        return -(-(self.slots or self.q_len) // self.block_q)

    @property
    def nk(self) -> int:
        return -(-(self.slots or self.kv_len) // self.block_k)

    def q_range(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [lo, hi) of query block m."""
        lo = self.q_offset + m * self.block_q
        return lo, (lo + self.block_q).clamp(max=self.q_offset + self.q_len)


class Pairs(NamedTuple):
    """Candidate entries: batch, layout head, query block, key block (int64 [N]), surely full (bool [N]), and
    `kind` int64 [N, c]: entries of one kind have equal tiles."""

    b: Tensor
    h: Tensor
    m: Tensor
    n: Tensor
    full: Tensor
    kind: Tensor


@dataclass(frozen=True, eq=False)
class Predicate(Rule):
    """A vectorised function as a rule (hashed by identity)."""

    fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads: int = 1

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.fn(head, q, k)


def ranged_pairs(rule: Rule, shape: Shape) -> Pairs:
    """Candidates of a rule over tokens in place, from its key ranges."""
    m = torch.arange(shape.nq)
    q_lo, q_hi = shape.q_range(m)
    parts = []
    for head in range(shape.heads):
        maybe, surely = rule.key_ranges(head, q_lo, q_hi, shape.kv_len)
        found = torch.cat([_touched(m, *_cut(lo, hi, q_lo, q_hi, shape), shape) for lo, hi in maybe]).unique()
        at, n = found // shape.nk, found % shape.nk
        k_lo, k_hi = n * shape.block_k, (n + 1) * shape.block_k
        full = torch.zeros_like(at, dtype=torch.bool)
        for lo, hi in surely:
            lo, hi = _cut(lo, hi, q_lo, q_hi, shape, sure=True)
            full |= (k_lo >= lo[at]) & (k_hi <= hi[at])
        kind = rule.tile_kind(head, q_lo[at], k_lo, max(shape.block_q, shape.block_k))
        if kind is None:
            kind = torch.stack([torch.full_like(at, head), at, n], -1)
        kind = torch.cat([kind, mask_kind(shape, q_lo[at], k_lo)], -1)
        parts.append(Pairs(torch.zeros_like(at), torch.full_like(at, head), at, n, full, kind))
    return Pairs(*(torch.cat(column) for column in zip(*parts)))


def mask_kind(shape: Shape, q_lo: Tensor, k_lo: Tensor) -> Tensor:
    """What causality, window and the ends of the sequence contribute to the kind of a tile, int64 [N, 3]."""
    reach = shape.block_q + shape.block_k
    distance = (q_lo - k_lo).clamp(min=-reach, max=reach + (shape.window or 0))
    if not shape.causal and shape.window is None:
        distance = torch.zeros_like(distance)
    q_size = (shape.q_offset + shape.q_len - q_lo).clamp(max=shape.block_q)
    k_size = (shape.kv_len - k_lo).clamp(max=shape.block_k)
    return torch.stack([distance, q_size, k_size], -1)


def _cut(
    lo: Tensor, hi: Tensor, q_lo: Tensor, q_hi: Tensor, shape: Shape, sure: bool = False
) -> tuple[Tensor, Tensor]:
    """Limit key ranges by causality, window and the ends of the sequence."""
    lo, hi = lo.clamp(min=0), hi.clamp(max=shape.kv_len)
    if shape.causal:
        hi = torch.minimum(hi, q_lo + 1 if sure else q_hi)
    if shape.window is not None:
        lo = torch.maximum(lo, (q_hi if sure else q_lo + 1) - shape.window)
    return lo, hi


def _touched(m: Tensor, lo: Tensor, hi: Tensor, shape: Shape) -> Tensor:
    """Flat numbers m * nk + n of the key blocks that the ranges touch."""
    first = torch.div(lo, shape.block_k, rounding_mode="floor")
    count = (torch.div(hi - 1, shape.block_k, rounding_mode="floor") - first + 1).clamp(min=0)
    count = torch.where(hi > lo, count, 0)
    at = torch.repeat_interleave(m, count)
    step = torch.arange(at.numel()) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return at * shape.nk + first[at] + step


def ordered_pairs(rule: Rule, shape: Shape, order: Tensor) -> Pairs:
    """Candidates of a rule over reordered tokens, from its block kinds (or every pair of blocks)."""
    q_tokens, k_tokens = order.reshape(-1, shape.block_q), order.reshape(-1, shape.block_k)
    holes = (k_tokens < 0).any(1)
    parts = []
    for head in range(shape.heads):
        kinds = rule.block_kinds(head, q_tokens, k_tokens)
        if kinds is None:
            kinds = 2 + torch.arange(len(q_tokens) * len(k_tokens)).reshape(len(q_tokens), len(k_tokens))
        m, n = (kinds != 0).nonzero(as_tuple=True)
        kind = kinds[m, n]
        full = (kind == 1) & ~holes[n]
        # "everything" over a key block with holes still needs a tile, which then depends on the holes
        kind = torch.stack([torch.full_like(m, head), kind, torch.where(kind == 1, n, -1)], -1)
        parts.append(Pairs(torch.zeros_like(m), torch.full_like(m, head), m, n, full, kind))
    return Pairs(*(torch.cat(column) for column in zip(*parts)))


def classify(pairs: Pairs, rule: Rule, shape: Shape, order: Tensor | None) -> tuple[Pairs, Tensor, Tensor]:
    """Evaluate one tile per kind; drop empty entries, promote full ones, share equal tiles.

    Returns:
        (pairs that remain, tile number int64 [N] or -1 for full, packed tiles int32 [T, block_q, block_k / 32]).
    """
    device = pairs.m.device
    number = torch.full_like(pairs.m, -1)
    open_ = (~pairs.full).nonzero()[:, 0]
    if not open_.numel():
        return (
            pairs,
            number,
            torch.zeros(0, shape.block_q, shape.block_k // 32, dtype=torch.int32, device=device),
        )
    kinds, kind = torch.unique(_numbered(pairs.kind[open_]), return_inverse=True)
    example = torch.empty(len(kinds), dtype=torch.long, device=device).scatter_(0, kind, open_)
    known: dict[bytes, int] = {}
    packed: list[np.ndarray] = []
    meaning = []  # per kind: tile number, -1 full, -2 empty
    for piece in example.split(max(1, PIECE // (shape.block_q * shape.block_k))):
        seen, real = _elements(rule, shape, order, pairs.h[piece], pairs.m[piece], pairs.n[piece])
        empty = ~(seen & real[:, :, None]).flatten(1).any(1)
        full = seen.flatten(1).all(1)
        bits = pack(seen).cpu().numpy()
        for i, (is_empty, is_full) in enumerate(zip(empty.tolist(), full.tolist())):
            if is_empty or is_full:
                meaning.append(-2 if is_empty else -1)
                continue
            tile = known.setdefault(bits[i].tobytes(), len(packed))
            if tile == len(packed):
                packed.append(bits[i])
            meaning.append(tile)
    number[open_] = torch.tensor(meaning, device=device)[kind]
    keep = number > -2
    tiles = np.stack(packed) if packed else np.zeros((0, shape.block_q, shape.block_k // 32), np.int32)
    return Pairs(*(column[keep] for column in pairs)), number[keep], torch.from_numpy(tiles).to(device)


def _numbered(kind: Tensor) -> Tensor:
    """One int64 per row of [N, c], equal for equal rows only (comparing whole rows is several times slower)."""
    low = kind.amin(0)
    number, room = torch.zeros_like(kind[:, 0]), 1
    for column, (least, span) in enumerate(zip(low.tolist(), (kind.amax(0) - low + 1).tolist())):
        if room > (1 << 62) // span:  # too many combinations for one number: count those there are
            number = torch.unique(number, return_inverse=True)[1]
            room = kind.shape[0]
        number, room = number * span + (kind[:, column] - least), room * span
    return number


def _elements(
    rule: Rule, shape: Shape, order: Tensor | None, h: Tensor, m: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """(visibility bool [x, block_q, block_k] of blocks, real bool [x, block_q]: rows that are queries)."""
    if order is None:
        q = shape.q_offset + m[:, None] * shape.block_q + torch.arange(shape.block_q, device=m.device)
        k = n[:, None] * shape.block_k + torch.arange(shape.block_k, device=m.device)
        real, exists = q < shape.q_offset + shape.q_len, k < shape.kv_len
    else:
        q, k = order.reshape(-1, shape.block_q)[m], order.reshape(-1, shape.block_k)[n]
        real, exists = q >= 0, k >= 0
    head, q, k = h[:, None, None], q[:, :, None], k[:, None, :]
    seen = rule.visible(head, q, k) & exists[:, None, :]
    if shape.causal:
        seen = seen & (k <= q)
    if shape.window is not None:
        seen = seen & (k > q - shape.window)
    # rows that are no query may hold anything: True lets blocks be full (their keys must still exist)
    return (seen | ~real[:, :, None]) & exists[:, None, :], real


def pack(seen: Tensor) -> Tensor:
    """bool [T, q, k] -> int32 [T, q, k / 32]; key j is bit j % 32 of word j // 32."""
    if seen.device.type == "cpu":
        words = np.packbits(seen.contiguous().numpy(), axis=-1, bitorder="little").view("<i4")
        return torch.from_numpy(words.astype(np.int32))
    bit = torch.arange(32, device=seen.device)
    words = (seen.unflatten(-1, (-1, 32)).long() << bit).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(bits: Tensor) -> Tensor:
    """int32 [T, q, k / 32] -> bool [T, q, k]."""
    if bits.device.type == "cpu":
        bytes_ = bits.contiguous().numpy().astype("<i4").view(np.uint8)
        return torch.from_numpy(np.unpackbits(bytes_, axis=-1, bitorder="little").astype(bool))
    bit = torch.arange(32, device=bits.device)
    return ((bits[..., None] >> bit) & 1).bool().flatten(-2)
