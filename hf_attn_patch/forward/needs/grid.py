"""The token grid of a forward, read from its pixel values; or why there is none."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import Given, Need

if TYPE_CHECKING:
    from ..running import Running


@dataclass(frozen=True)
class SeenGrid:
    """What the arguments of one forward say about its token grid.

    Attributes:
        grid: (Gh, Gw) or (T, Gh, Gw), patches in row-major order; None = unknown. images: images or videos in it.
        why_not: sentence that says why the grid is unknown. ordered: False if the tokens are in the row-major order of
            no grid, so that naming one does not help.
    """

    grid: tuple[int, ...] | None = None
    images: int | None = None
    why_not: str | None = None
    ordered: bool = True


def grid_of(pixels: Tensor, config: Any) -> tuple[int, ...] | None:
    """Patch grid of pixel values [B, C, H, W] or [B, T, C, H, W] for a vision config; None if it does not say."""
    vision = getattr(config, "vision_config", None) or config
    patch, tubelet = getattr(vision, "patch_size", None), getattr(vision, "tubelet_size", None)
    if patch is None and tubelet is None:
        return None
    if isinstance(tubelet, (tuple, list)) and len(tubelet) == 3:
        time, height, width = tubelet
    else:
        sides = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        time, height, width = tubelet or 1, sides[-2], sides[-1]
    if pixels.ndim == 4:
        return (pixels.shape[-2] // height, pixels.shape[-1] // width)
    if pixels.ndim == 5 and tubelet:
        return (pixels.shape[1] // time, pixels.shape[-2] // height, pixels.shape[-1] // width)
    return None


PACKED = SeenGrid(
    why_not="the patches of images of any resolution come in one sequence here, ordered for a merger of neighbours: "
    "there is no row-major grid to put a window on",
    ordered=False,
)


def seen_grid(given: Mapping[str, Any], parameters: Collection[str], config: Any) -> SeenGrid | None:
    """The grid that a forward with the arguments `given` works on; None if it was given no pixels.

    Args:
        parameters: names that the forward accepts. config: of the model whose forward it is.
    """
    if any("grid" in name and isinstance(value, Tensor) for name, value in given.items()):  # image_grid_thw
        return PACKED
    pixels = given.get("pixel_values", given.get("pixel_values_videos"))
    if not isinstance(pixels, Tensor):
        return None
    shapes = given.get("spatial_shapes")
    if isinstance(shapes, Tensor):  # patches of each image, padded to the longest
        return _flattened(pixels, shapes)
    grid = grid_of(pixels, config)
    if grid is None:
        return None
    if "noise" in parameters and hasattr(config, "mask_ratio") and not _in_order(given.get("noise")):
        return SeenGrid(
            why_not="this model keeps a random part of its patches in random order, so they are on no grid. To keep "
            "all in order, set model.config.mask_ratio = 0 and pass noise=torch.arange(N).expand(batch, N) "
            f"with N = {math.prod(grid)} patches",
            ordered=False,
        )
    return SeenGrid(grid, pixels.shape[0])


def _in_order(noise: Any) -> bool:
    return isinstance(noise, Tensor) and bool((noise.diff(dim=-1) > 0).all())


def _flattened(pixels: Tensor, shapes: Tensor) -> SeenGrid:
    """pixels [B, N, ...], shapes int64 [B, 2]: rows and columns of each image."""
    found = sorted({tuple(shape) for shape in shapes.tolist()})
    if len(found) > 1:
        return SeenGrid(
            why_not=f"the images of this batch have different grids ({', '.join(map(str, found[:4]))}; "
            "spatial_shapes), and one call works on one grid. Batch images of one resolution",
            ordered=False,
        )
    if math.prod(found[0]) != pixels.shape[1]:
        return SeenGrid(
            why_not=f"the grid {found[0]} (spatial_shapes) is padded to {pixels.shape[1]} patches. Prepare the images "
            f"with max_num_patches={math.prod(found[0])}",
            ordered=False,
        )
    return SeenGrid(found[0], pixels.shape[0])


@dataclass(frozen=True)
class TokenGrid(Need):
    says = "patch grid of the image or video (from pixel_values)"

    def begins(self, running: Running, given: Given) -> None:
        config = getattr(given.module, "config", None)
        running.pixels = seen_grid(given.arguments, given.names, config) or running.pixels
