"""`neighborhood`: generalised neighborhood attention on token grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...call.rules import Neighborhood
from ...errors import ModelMismatchError
from ...model.grids import Grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import GridPatch


@register_patch("neighborhood")
@dataclass
class NeighborhoodAttention(GridPatch):
    """Generalised neighborhood attention on 1-D, 2-D and 3-D token grids.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922; NAT 2204.07143; DiNAT 2209.15001 (NATTEN 0.21.7,
    READ and RAN). The exact index rule is in `rules.Neighborhood`.

    Formula: a patch token reads the keys whose grid position lies in its window on every axis (windows shift
    inward at borders and are never cut), plus all prefix tokens (CLS, registers); prefix tokens read everything.

    Neutral value: window = grid, stride and dilation 1.

    Equivalents (checked): stride = window = block size is Swin / MaxViT block attention; dilation = grid / window is
    MaxViT grid attention; window = block + 2 halo with stride = block is HaloNet away from borders.

    Differs from NATTEN: prefix tokens are part of the same softmax; window, stride and dilation are checked
    against the grid of each image, which is taken from the pixel values (``grid`` overrides it).
    """

    paper = "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light"
    arxiv = "2504.16922"

    window: int | tuple[int, ...] = option(7, help="keys per axis (one number, or one per axis)")
    stride: int | tuple[int, ...] = option(
        1, help="queries per axis that share one window; stride = window: blocks"
    )
    dilation: int | tuple[int, ...] = option(1, help="distance of neighbouring keys per axis")
    causal: bool | tuple[bool, ...] = option(False, help="per axis: see no later key on this axis")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require_sizes("window", "stride", "dilation")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> Neighborhood:
        window, stride, dilation, causal = (
            per_axis(self.name, name, getattr(self, name), grid)
            for name in ("window", "stride", "dilation", "causal")
        )
        for axis, (size, w, s, d) in enumerate(zip(grid, window, stride, dilation)):
            if w * d > size:
                raise ModelMismatchError(
                    f"neighborhood: window {w} x dilation {d} = {w * d} exceeds axis {axis} of the grid {grid}; "
                    f"at most {size // d} fits"
                )
            if s > w:
                raise ModelMismatchError(
                    f"neighborhood: stride {s} exceeds window {w} on axis {axis}: keys would be skipped"
                )
        return Neighborhood(tuple(grid), window, stride, dilation, causal, prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None:
            return []
        small = [max(1, min(3, g)) for g in grid]
        cases: list[dict[str, Any]] = [{"window": small}, {"window": small, "stride": small}]
        cases.append(
            {"window": [max(1, g // 2) for g in grid], "dilation": [2 if g >= 2 else 1 for g in grid]}
        )
        cases.append({"window": small, "causal": [True] + [False] * (len(grid) - 1)})
        return cases
