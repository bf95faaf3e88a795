"""Layout rules that hold what was chosen for one call, element by element (blocks: `rules.ChosenBlocks`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rules import Rule


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
