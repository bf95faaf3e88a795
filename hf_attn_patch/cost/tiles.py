"""How many tiles of the attention map a pattern touches: an upper bound of its speed-up."""

from __future__ import annotations

from dataclasses import dataclass

from ..call.rules import Rule
from ..kernels.layout import BlockLayout, layout_for

TILE = 64  # tokens per side of what the kernels skip


@dataclass(frozen=True)
class Tiles:
    """Of one head, on average over the layout heads. pairs, possible_pairs: (query, key) pairs read, and allowed by
    causality. visited, possible: tiles of `tile` x `tile` tokens with at least one such pair. full: tiles visited that
    need no mask. keys: keys in tiles that anybody visits."""

    pairs: float
    possible_pairs: int
    visited: float
    possible: int
    full: float
    keys: float
    tile: int

    @property
    def speedup(self) -> float:
        """Dense tiles / tiles visited: what no kernel that skips whole tiles can beat."""
        return self.possible / self.visited if self.visited else float("inf")

    @property
    def wasted(self) -> float:
        """Share of the work in visited tiles that is thrown away, beyond what dense attention throws away: 0 is perfect
        block sparsity."""
        useful = self.pairs / self.possible_pairs
        return 1 - min(useful / (self.visited / self.possible), 1.0) if self.visited else 0.0

    def __str__(self) -> str:
        pairs, tiles = self.pairs / self.possible_pairs, self.visited / self.possible
        read = f"reads {pairs:.1%} of the pairs, {tiles:.1%} of the tiles"
        if self.visited >= self.possible:
            if self.pairs >= self.possible_pairs:
                return f"{read}: dense"
            return f"{read}: saves 0 %, every {self.tile}-token tile is touched, and a kernel skips whole tiles only"
        fit = (
            "perfect block sparsity"
            if self.wasted < 0.005
            else f"{self.wasted:.0%} of their work is thrown away"
        )
        return f"{read}: at most {self.speedup:.2f} x as fast as dense; {fit}"


def tiles_of(
    rule: Rule | None,
    q_len: int,
    kv_len: int,
    q_offset: int = 0,
    causal: bool = False,
    window: int | None = None,
    tile: int = TILE,
) -> Tiles:
    """Count the tiles of a rule (None: everything) exactly, from the layout the kernels run on.

    q_offset: position of the first query. window: sliding window of the model itself, in the pattern but not in the
    dense attention it is compared with.
    """
    if rule is not None and rule.dynamic:
        layout = BlockLayout.from_rule(rule, q_len, kv_len, q_offset, causal, window, tile, tile)
    else:
        layout = layout_for(rule, q_len, kv_len, q_offset, causal, window, tile, tile)
    copies = layout.batch * layout.heads
    elements, blocks = layout.density()
    entries = layout.entries
    group = layout.rows // layout.q_blocks  # batch item and head of each entry
    seen = (group * layout.k_blocks + layout.index.long()).unique().numel()
    return Tiles(
        pairs=layout.visible_count() / copies,
        possible_pairs=layout.possible_count(),
        visited=entries / copies,
        possible=round(entries / copies / blocks) if blocks else layout.q_blocks * layout.k_blocks,
        full=int((layout.tile < 0).sum()) / copies,
        keys=min(seen * tile / copies, kv_len),
        tile=tile,
    )
