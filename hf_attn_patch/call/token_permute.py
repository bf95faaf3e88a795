"""Tokens of a 1-D, 2-D or 3-D grid in the order of tiles: spatial neighbours become neighbours in memory.

    tiles = Tiles((14, 14), (7, 7))
    x = tiles.permute(tokens)        # [..., N, D] -> [..., slots, D], tile after tile
    tokens = tiles.restore(x)        # back, bit for bit

Sources: `token_permute` of NATTEN 0.21.7 (READ and RAN: equal, golden `natten__permute_*`); the block partition of
VMoBA, arXiv 2506.23858 (READ and RAN: equal, golden `vmoba__partition`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Tiles of `tile` tokens on a row-major `grid`, per residue class of `dilation`.

    Order: residue classes, then tiles, then the tokens of a tile, each row-major. Where tiles do not fill the grid
    the last ones have holes (slots of no token).

    Raises:
        ValueError: another number of axes than the grid, or a size below 1.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, sizes in (("tile", self.tile), ("dilation", self.dilation or (1,) * len(self.grid))):
            if len(sizes) != len(self.grid) or any(s < 1 for s in sizes):
                raise ValueError(f"{name} {sizes} does not fit the grid {self.grid}: one size >= 1 per axis")

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def per_tile(self) -> int:
        """Slots of a tile."""
        return math.prod(self.tile)

    def order(self) -> Tensor:
        """Token of each slot, int64 [residue classes, tiles, slots of a tile]; -1 = hole."""
        return _order(self)

    def slots(self) -> Tensor:
        """Slot of each token, int64 [N]: the inverse of `order`."""
        return _slots(self)

    def cell(self) -> Tensor:
        """Number of the tile of each token, int64 [N]."""
        return self.slots() // self.per_tile

    def permute(self, x: Tensor, dim: int = -2) -> Tensor:
        """`x` with its N tokens along `dim` in slot order; holes are 0.

        Raises:
            ValueError: `x` has another number of tokens.
        """
        if x.shape[dim] != self.tokens:
            raise ValueError(f"{x.shape[dim]} tokens along dim {dim} are no grid {self.grid}")
        order = self.order().flatten().to(x.device)
        out = x.index_select(dim, order.clamp(min=0))
        shape = [1] * x.ndim
        shape[dim] = -1
        return out.masked_fill((order < 0).reshape(shape), 0)

    def restore(self, x: Tensor, dim: int = -2) -> Tensor:
        """The N tokens of `permute`d `x` in row-major order."""
        return x.index_select(dim, self.slots().to(x.device))


@functools.lru_cache(maxsize=64)
def _order(tiles: Tiles) -> Tensor:
    axes, n = [], len(tiles.grid)
    for size, tile, d in zip(tiles.grid, tiles.tile, tiles.dilation or (1,) * n):
        count = -(-size // (tile * d))
        at = torch.arange(d)[:, None, None] + d * torch.arange(count * tile).reshape(count, tile)
        axes.append(torch.where(at < size, at, -1))  # [residue, tile, place]
    token = torch.zeros((), dtype=torch.long)
    hole = torch.zeros((), dtype=torch.bool)
    for axis, (at, size) in enumerate(zip(axes, tiles.grid)):
        shape = [1] * (3 * n)
        shape[axis], shape[n + axis], shape[2 * n + axis] = at.shape
        at = at.reshape(shape)
        token, hole = token * size + at.clamp(min=0), hole | (at < 0)
    flat = token.masked_fill(hole, -1)
    return flat.flatten(2 * n).flatten(n, 2 * n - 1).flatten(0, n - 1)


@functools.lru_cache(maxsize=64)
def _slots(tiles: Tiles) -> Tensor:
    order = _order(tiles).flatten()
    slots = torch.empty(tiles.tokens, dtype=torch.long)
    at = (order >= 0).nonzero()[:, 0]
    slots[order[at]] = at
    return slots
