"""Layout rules that hold what was chosen for one call: blocks, columns and diagonals, cells of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Rule


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


@dataclass(frozen=True, eq=False, repr=False)
class ColumnsDiagonals(Rule):
    """Some columns and some diagonals of the attention map: the query at position q of head h of batch item b reads the
    key at position k iff ``columns[b, h, k] or diagonals[b, h, q - k]``. Queries from position `until` on read all.

    columns, diagonals: bool [B|1, layout heads, n]; positions and distances from n on are not chosen. until: int64
    [B|1]. Keys later than the query are the mask's business: where it shows some, they stay visible.
    """

    columns: Tensor
    diagonals: Tensor
    until: Tensor
    dynamic = True

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.columns.shape[1]

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch = torch.arange(self.columns.shape[0], device=q.device).reshape(-1, 1, 1, 1)
        distance, size = q - k, self.columns.shape[2]
        column = self.columns[batch, head, k.clamp(0, size - 1)] & (k >= 0) & (k < size)
        diagonal = self.diagonals[batch, head, distance.clamp(0, size - 1)] & (distance < size)
        return column | diagonal | (distance < 0) | (q >= self.until.reshape(-1, 1, 1, 1))

    def counts(self) -> Tensor:
        """Keys that the query at each position reads, its own past only: float64 [B|1, layout heads, n].

        A key that is chosen twice counts once: the number of those is a convolution of columns and diagonals.
        """
        columns, diagonals = self.columns.double(), self.diagonals.double()
        size = self.columns.shape[2]
        product = torch.fft.rfft(columns, 2 * size) * torch.fft.rfft(diagonals, 2 * size)
        both = torch.fft.irfft(product, 2 * size)[..., :size].round()
        read = columns.cumsum(-1) + diagonals.cumsum(-1) - both
        position = torch.arange(size, device=columns.device)
        return torch.where(position >= self.until.reshape(-1, 1, 1), position + 1.0, read)

    def __repr__(self) -> str:
        columns, diagonals = (float(x.sum(-1).double().mean()) for x in (self.columns, self.diagonals))
        per_head = f"{columns:.0f} columns, {diagonals:.0f} diagonals per head"
        return f"ColumnsDiagonals({list(self.columns.shape)}, {per_head})"


@dataclass(frozen=True, eq=False, repr=False)
class ChosenCells(Rule):
    """Cells of a token grid that a method chose for this call: a query of cell m of head h of batch item b reads the
    keys of cell n iff ``chosen[b, h, m, n]``. Cells of any shape and size, others for queries than for keys; a query
    that chooses for itself is a cell of its own.

    chosen: bool [B|1, layout heads, query cells, key cells]. q_cell, k_cell: cell of each token of the grid, int64 [N],
    or [layout heads, N] where heads cut the grid differently. prefix: tokens before the grid, which read everything and
    are read by everybody.
    """

    chosen: Tensor
    q_cell: Tensor
    k_cell: Tensor
    prefix: int = 0
    dynamic = True

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.chosen.shape[1]

    @property
    def tokens(self) -> int:
        """N, tokens of the grid."""
        return self.k_cell.shape[-1]

    def required_len(self) -> int:
        return self.prefix + self.tokens

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch = torch.arange(self.chosen.shape[0], device=q.device).reshape(-1, 1, 1, 1)

        def cell(of: Tensor, position: Tensor) -> Tensor:
            at = (position - self.prefix).clamp(0, self.tokens - 1)
            return of[at] if of.ndim == 1 else of[head, at]

        found = self.chosen[batch, head, cell(self.q_cell, q), cell(self.k_cell, k)]
        return found | (q < self.prefix) | (k < self.prefix)

    def alike(self) -> list[tuple[list[int], ChosenCells]]:
        """The rule as rules of one cut each, with the layout heads of each."""
        if self.q_cell.ndim == self.k_cell.ndim == 1:
            return [(list(range(self.heads)), self)]
        wide = lambda x: x.expand(self.heads, -1)
        cuts: dict[bytes, list[int]] = {}
        for head, cut in enumerate(torch.cat([wide(self.q_cell), wide(self.k_cell)], 1).cpu()):
            cuts.setdefault(cut.numpy().tobytes(), []).append(head)
        return [
            (
                on,
                ChosenCells(
                    self.chosen[:, on], wide(self.q_cell)[on[0]], wide(self.k_cell)[on[0]], self.prefix
                ),
            )
            for on in cuts.values()
        ]

    def share(self) -> Tensor:
        """Of the pairs of grid tokens, how many are read (0-d)."""
        total = self.chosen.new_zeros((), dtype=torch.float64)
        for _, rule in self.alike():
            queries = torch.bincount(rule.q_cell, minlength=self.chosen.shape[2]).double()
            keys = torch.bincount(rule.k_cell, minlength=self.chosen.shape[3]).double()
            total = total + torch.einsum("bhmn,m,n->", rule.chosen.double(), queries, keys)
        return total / (self.chosen.shape[0] * self.heads * self.tokens**2)

    def __repr__(self) -> str:
        return f"ChosenCells({list(self.chosen.shape)}, {self.tokens} tokens, prefix={self.prefix})"
