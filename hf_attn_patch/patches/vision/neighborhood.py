"""`neighborhood`: generalised neighborhood attention on token grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ModelMismatchError
from ...registry import Patch, option, register_patch
from ...rules import Neighborhood

if TYPE_CHECKING:
    from ...dispatch import Call
    from ...program import Program


@register_patch("neighborhood")
@dataclass
class NeighborhoodAttention(Patch):
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
    parts = ("vision",)
    default_part = "vision"
    needs = frozenset({"grid"})
    exclusive = frozenset({"token order"})

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
        values = lambda v: v if isinstance(v, tuple) else (v,)
        self.require(all(w >= 1 for w in values(self.window)) and values(self.window) != (), "window", ">= 1")
        self.require(all(s >= 1 for s in values(self.stride)), "stride", ">= 1")
        self.require(all(d >= 1 for d in values(self.dilation)), "dilation", ">= 1")
        if self.grid is not None:
            self.require(
                1 <= len(self.grid) <= 3 and all(g >= 1 for g in self.grid), "grid", "1 to 3 sizes >= 1"
            )
            self.rule(self.grid, 0)

    def rule(self, grid: tuple[int, ...], prefix: int) -> Neighborhood:
        """The index rule on `grid`.

        Raises:
            ModelMismatchError: window, stride or dilation do not fit the grid (the violated bound is named).
        """
        axes = len(grid)

        def per_axis(name: str) -> tuple:
            value = getattr(self, name)
            value = value if isinstance(value, tuple) else (value,) * axes
            if len(value) != axes:
                raise ModelMismatchError(
                    f"neighborhood: {name}={value} has {len(value)} axes, the grid {grid} has {axes}"
                )
            return value

        window, stride, dilation, causal = map(per_axis, ("window", "stride", "dilation", "causal"))
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

    def edit(self, program: Program, call: Call) -> None:
        grid = self.grid
        if grid is None and call.context is not None:
            grid = call.context.grid
        if grid is None:
            raise ModelMismatchError(
                f"neighborhood: no pixel values were seen before {call.path} (or its layer is recomputed by gradient "
                "checkpointing), so the token grid is unknown; pass grid=(height, width)"
            )
        tokens = math.prod(grid)
        prefix = program.q_len - tokens
        if prefix < 0 or program.mask.kv_len != program.q_len:
            raise ModelMismatchError(
                f"neighborhood: {call.path} attends {program.q_len} x {program.mask.kv_len} tokens, which is not the "
                f"grid {grid} of {tokens} tokens plus prefix tokens (a merging or windowed backbone?)"
            )
        program.restrict(self.rule(grid, prefix), call.heads)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = _grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = _grid(model)
        if grid is None:
            return []
        small = [max(1, min(3, g)) for g in grid]
        cases: list[dict[str, Any]] = [{"window": small}, {"window": small, "stride": small}]
        cases.append(
            {"window": [max(1, g // 2) for g in grid], "dilation": [2 if g >= 2 else 1 for g in grid]}
        )
        cases.append({"window": small, "causal": [True] + [False] * (len(grid) - 1)})
        return cases


def _grid(model: Any) -> tuple[int, ...] | None:
    """Token grid of a vision model at its configured image size."""
    config = getattr(model.config, "vision_config", None) or model.config
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not image or not patch:
        return None
    tubelet = getattr(config, "tubelet_size", None)
    size = tuple(image) if isinstance(image, (list, tuple)) else (image, image)
    if isinstance(tubelet, (list, tuple)):
        return (config.num_frames // tubelet[0], size[0] // tubelet[1], size[1] // tubelet[2])
    sides = tuple(patch) if isinstance(patch, (list, tuple)) else (patch, patch)
    grid = (size[0] // sides[0], size[1] // sides[1])
    return (config.num_frames // tubelet, *grid) if isinstance(tubelet, int) else grid
