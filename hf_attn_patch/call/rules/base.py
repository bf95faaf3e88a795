"""`Rule`: the base of all layout rules, and the one that restricts nothing."""

from __future__ import annotations

from dataclasses import dataclass

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
