"""`vmoba`: every patch reads the blocks of the grid that score best, cut another way in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...call.rules import ChosenCells
from ...call.token_permute import Tiles
from ...errors import ModelMismatchError
from ...kernels.block_selection import select_threshold, select_topk
from ...kernels.chosen_cells import cell_means
from ...model.grids import Grid, configured_grid
from ...registry import option, register_patch
from ..on_grid import ChosenOnGrid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call

KINDS = {"slab": 1, "tile": 2, "cube": 3}  # axes that a kind cuts

Pool = Literal["query", "head", "block", "all"]


def blocks_of(grid: Grid, sizes: tuple[int, ...]) -> Tiles:
    """Blocks of a grid: one size cuts the first axis into slabs, several cut the last axes into tiles or cubes."""
    rest = len(grid) - len(sizes)
    return Tiles(grid, (*sizes, *grid[1:]) if len(sizes) == 1 else (*grid[:rest], *sizes))


def pick(scores: Tensor, own: Tensor, pool: Pool, topk: int, threshold: float) -> Tensor:
    """Blocks that each query reads, bool [B, H, N, blocks], its own block included.

    Args:
        scores: [B, H, N, blocks], -inf = may not be read. own: bool [N, blocks]. topk: blocks per query (the pool's
            mean), the own one included; 0 = the fewest that hold `threshold` of the pool's min-max normalised scores.
        pool: what is ranked together: the blocks of one query, all pairs of a head, of a block, or of all heads.

    Raises:
        ValueError: topk with ``pool="block"``.
    """
    B, H, N, blocks = scores.shape
    own = own.expand(B, H, -1, -1)
    if pool == "block":
        if topk:
            raise ValueError("a block has no topk: pool='block' needs threshold")
        ranked, forced = (x.permute(0, 3, 1, 2).reshape(B, 1, blocks, H * N) for x in (scores, own))
    elif pool == "all":
        ranked, forced = (x.reshape(B, 1, H * N, blocks) for x in (scores, own))
    else:
        ranked, forced = scores, own
    per: Literal["query", "head"] = "head" if pool in ("head", "all") else "query"
    if topk:
        index = select_topk(ranked, topk, always=forced, per=per)
    else:
        index = select_threshold(ranked, threshold, always=forced, per=per, masses="minmax", least=1)
    width = ranked.shape[-1]
    found = torch.zeros(*index.shape[:-1], width + 1, dtype=torch.bool, device=scores.device)
    found = found.scatter(-1, torch.where(index < 0, width, index).long(), True)[..., :-1]
    if pool == "block":
        return found.reshape(B, blocks, H, N).permute(0, 2, 3, 1)
    return found.reshape(scores.shape)


@register_patch("vmoba")
@dataclass
class VMoBA(ChosenOnGrid):
    """Every patch reads the blocks that score best, in slabs, tiles or cubes of the grid, layer by layer in turn.

    Source: VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv 2506.23858 (KwaiVGI/VMoBA 4da72ff
    `src/vmoba.py`, READ and RAN; it has no licence file, so facts only).

    Formula: layer i cuts the grid into blocks of kind ``kinds[i mod n]``: ``slab`` of `slab` frames (rows of a 2-D
    grid), ``tile`` of `tile` tokens over all frames, ``cube``. The score of a block is q . mean(k), in fp32.
    A query reads its own block, and of the others those chosen from a pool: per ``query``, all pairs of a ``head``
    (the paper's method), of a key ``block``, or of ``all`` heads. With ``threshold``, scores are min-max normalised
    over the pool and pairs are added by falling score until they hold this share of its sum (at least one per
    pool); with ``topk`` the best topk blocks per query on average, the own one included. Prefix tokens (CLS) read
    everything and are read by everybody.

    Neutral value: threshold=1.

    Differs from the original code: every batch item has its own pool, where the original packs the batch into one;
    threshold 1 reads everything (there, by rounding or by a wrong index, it does not); blocks that do not divide the
    grid are smaller at its end, where the original stops; one call over the union instead of two merged by
    log-sum-exp; `layers` says which layers stay dense, instead of a first layer and a first step. Its default pool is
    ``query``, against its paper; here it is the paper's.
    """

    paper = "VMoBA: Mixture-of-Block Attention for Video Diffusion Models"
    arxiv = "2506.23858"
    exclusive = frozenset({"token order", "query and key source"})

    slab: int = option(2, help="frames (rows of a 2-D grid) per slab")
    tile: tuple[int, ...] = option((3, 4), help="height and width of a tile, which spans all frames")
    cube: tuple[int, ...] = option((4, 6, 4), help="frames, height and width of a cube")
    kinds: tuple[str, ...] | None = option(
        None,
        help=f"of {', '.join(KINDS)}: what the layers cut in turn; default: all that the grid has axes for",
    )
    pool: Literal["query", "head", "block", "all"] = option("head", help="what is ranked together")
    threshold: float = option(0.25, help="share of the pool's scores that is read")
    topk: int = option(0, help="blocks per query, the own one included; 0 = use threshold")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [8, 14, 14]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require_sizes("slab", "tile", "cube")
        self.require(len(self.tile) == 2, "tile", "two sizes")
        self.require(len(self.cube) == 3, "cube", "three sizes")
        known = self.kinds is None or (self.kinds != () and all(k in KINDS for k in self.kinds))
        self.require(known, "kinds", f"some of {', '.join(KINDS)}")
        self.require(0 < self.threshold <= 1, "threshold", "in (0, 1]")
        self.require(self.topk >= 0, "topk", ">= 0")
        self.require(
            not (self.topk and self.pool == "block"), "topk", "0 with pool='block', which needs a threshold"
        )
        self.require_grid()

    def sizes(self, grid: Grid) -> list[tuple[int, ...]]:
        """Block sizes of the layers in turn.

        Raises:
            ModelMismatchError: a kind needs more axes than the grid has, or a block is larger than the grid.
        """
        found = []
        for kind in self.kinds or [kind for kind, axes in KINDS.items() if axes <= len(grid)]:
            if KINDS[kind] > len(grid):
                raise ModelMismatchError(
                    f"vmoba: a {kind} cuts {KINDS[kind]} axes, the grid {grid} has {len(grid)}; leave it out of kinds"
                )
            value = getattr(self, kind)
            sizes = value if isinstance(value, tuple) else (value,)
            axes = grid[:1] if len(sizes) == 1 else grid[-len(sizes) :]
            if any(size > length for size, length in zip(sizes, axes)):
                raise ModelMismatchError(f"vmoba: {kind} {value} exceeds the axes {axes} of the grid {grid}")
            found.append(sizes)
        return found

    def fit(self, grid: Grid) -> None:
        self.sizes(grid)

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        sizes = self.sizes(grid)
        cell = blocks_of(grid, sizes[call.layer % len(sizes)]).cell().to(program.query.device)
        means = cell_means(program.key[:, :, prefix:], cell)  # type: ignore[index]
        query = program.query[:, :, prefix:].detach().to(means.dtype)
        scores = query @ means.repeat_interleave(program.num_heads // program.num_kv_heads, 1).mT
        own = torch.nn.functional.one_hot(cell, means.shape[2]).bool()
        chosen = pick(scores, own, self.pool, self.topk, self.threshold)
        return ChosenCells(chosen, torch.arange(len(cell), device=cell.device), cell, prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return None if configured_grid(model) is None else {**cls._small(model), "threshold": 1.0}

    @classmethod
    def _small(cls, model: Any) -> dict[str, Any]:
        grid = configured_grid(model) or ()
        last = [1, 1, 1, *grid][-3:]
        small = [max(1, g // 2) for g in last]
        return {"slab": 1, "tile": [1, small[2]], "cube": [1, 1, small[2]]}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if configured_grid(model) is None:
            return []
        small = cls._small(model)
        return [
            {**small, "threshold": 0.3},
            {**small, "pool": "query", "topk": 2},
            {**small, "pool": "block", "threshold": 0.2, "kinds": ["tile"]},
            {**small, "pool": "all", "threshold": 0.2, "kinds": ["slab"]},
        ]
