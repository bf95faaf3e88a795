"""`biformer`: bi-level routing, every region of the image reads the regions that are most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...call.rules import ChosenCells
from ...call.token_permute import Tiles
from ...errors import ModelMismatchError
from ...kernels.chosen_cells import cell_means
from ...model.grids import Grid, config_grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import ChosenOnGrid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def region_means(x: Tensor, cell: Tensor) -> Tensor:
    """Mean over regions of the concatenated heads: [B, H, N, D], region of each token [N] -> [B, regions, H * D]."""
    return cell_means(x, cell).transpose(1, 2).flatten(2)


def route(query: Tensor, key: Tensor, cell: Tensor, topk: int, keep_self: bool = False) -> Tensor:
    """Regions that each region reads, bool [B, regions, regions]: the `topk` with the largest product of mean query
    and mean key. No gradient flows through the choice.

    Args:
        query, key: [B, H, N, D]. cell: int64 [N], region of each token. keep_self: the own region is one of them.
    """
    scores = region_means(query, cell) @ region_means(key, cell).mT
    if keep_self:
        scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    best = scores.topk(min(topk, scores.shape[2]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)


def local_enhancement(value: Tensor, grid: Grid, weight: Tensor, bias: Tensor) -> Tensor:
    """Depth-wise convolution of the values of a grid, zero border: [B, H, N, D] -> [B, H, N, D].

    weight: [H * D, 1, k, ...] (k odd, one axis per axis of the grid). bias: [H * D].
    """
    heads, channels = value.shape[1], weight.shape[0]
    image = value.transpose(1, 2).flatten(2).mT.unflatten(2, grid)
    size = weight.shape[2] // 2
    out = CONVOLUTIONS[len(grid)](
        image, weight.to(value.dtype), bias.to(value.dtype), padding=size, groups=channels
    )
    return out.flatten(2).mT.unflatten(2, (heads, -1)).transpose(1, 2)


@register_patch("biformer")
@dataclass
class BiFormer(ChosenOnGrid):
    """Bi-level routing: regions of the image read the regions whose mean key fits their mean query best.

    Source: BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810 (rayleizhu/BiFormer 1697bbb
    `ops/bra_legacy.py`, `ops/bra_nchw.py`, `ops/torch/rrsda.py`, READ and RAN).

    Formula: the grid is cut into regions of ``floor(size / regions)`` tokens per axis. With Q_r, K_r the means over
    region r of all heads' queries and keys side by side, region r reads the `topk` regions with the largest
    Q_r . K_s, the same in every head: ``o = softmax(scale q k^T) v`` over their tokens and all prefix tokens; prefix
    tokens read everything. ``lce`` k > 0 adds a depth-wise k x k convolution of the values to the output of patches;
    its weights [H D, 1, k, k] start at 0, are trained and saved with the patch.

    Neutral value: topk at least the number of regions, lce=0 (or untrained).

    Differs from the original: a rule for a loaded model, never shown by the authors (their models are trained with
    it); the model's own scale instead of C^-1/2; prefix tokens; no soft routing, which scales keys and values by the
    routing weight; a grid that `regions` does not divide gets more and smaller regions at its end and no pads, which
    the original attends. Queries with rotary position are averaged as they are. `keep_self` is ours.
    """

    paper = "BiFormer: Vision Transformer with Bi-Level Routing Attention"
    arxiv = "2303.08810"
    trainable = True
    exclusive = frozenset({"token order", "query and key source"})

    regions: int | tuple[int, ...] = option(
        7, help="regions per side of the grid (one number, or one per axis)"
    )
    topk: int = option(4, help="regions that each region reads")
    keep_self: bool = option(False, help="the own region is always one of them")
    lce: int = option(0, help="side of the depth-wise convolution of the values (original: 5); 0 = none")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require_sizes("regions")
        self.require(self.topk >= 1, "topk", ">= 1")
        self.require(
            self.lce == 0 or (self.lce > 0 and self.lce % 2 == 1), "lce", "an odd number, or 0 for none"
        )
        self.require_grid()

    def tiles(self, grid: Grid) -> Tiles:
        """The regions of `grid`.

        Raises:
            ModelMismatchError: more regions than tokens on an axis.
        """
        regions = per_axis(self.name, "regions", self.regions, grid)
        for axis, (count, size) in enumerate(zip(regions, grid)):
            if count > size:
                raise ModelMismatchError(
                    f"biformer: {count} regions on axis {axis} of the grid {grid}, which has {size} tokens; at most "
                    f"{size} fit"
                )
        return Tiles(grid, tuple(size // count for count, size in zip(regions, grid)))

    def fit(self, grid: Grid) -> None:
        self.tiles(grid)

    def check(self, site: Site) -> None:
        if self.lce and (site.num_kv_heads is None or site.num_kv_heads != site.num_heads):
            raise ModelMismatchError(
                f"biformer: {site.path} has {site.num_heads} query heads and {site.num_kv_heads} KV heads; the "
                "convolution adds the values of one KV head to one query head. Use lce=0"
            )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        if not self.lce:
            return {}
        assert site.num_heads is not None and site.head_dim is not None
        channels, axes = site.num_heads * site.head_dim, self._axes(site)
        weight = torch.zeros(channels, 1, *[self.lce] * axes)
        return {"weight": nn.Parameter(weight), "bias": nn.Parameter(torch.zeros(channels))}

    def _axes(self, site: Site) -> int:
        grid = self.grid or config_grid(getattr(site.module, "config", None))
        return 2 if grid is None else len(grid)

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        query, key, value = program.query[:, :, prefix:], program.key[:, :, prefix:], program.value  # type: ignore[index]
        cell = self.tiles(grid).cell().to(query.device)
        key = key.repeat_interleave(program.num_heads // program.num_kv_heads, 1)
        chosen = route(query, key, cell, self.topk, self.keep_self)
        if self.lce:
            assert isinstance(value, Tensor)
            weight, bias = call.tensors.weight, call.tensors.bias
            assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
            term = local_enhancement(value[:, :, prefix:], grid, weight, bias)
            program.add(F.pad(term, (0, 0, prefix, 0)), call.heads)
        return ChosenCells(chosen[:, None], cell, cell, prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return None if configured_grid(model) is None else {"regions": 1, "topk": 1}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None:
            return []
        regions = [min(2, g) for g in grid]
        return [{"regions": regions, "topk": 2}, {"regions": regions, "topk": 1, "keep_self": True, "lce": 3}]
