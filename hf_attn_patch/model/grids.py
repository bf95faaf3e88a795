"""Token grids that a model's config names."""

from __future__ import annotations

from typing import Any

from ..errors import ModelMismatchError

Grid = tuple[int, ...]


def configured_grid(model: Any) -> Grid | None:
    """Token grid of a vision model at its configured image size; None where the config does not say."""
    return config_grid(model.config)


def config_grid(config: Any) -> Grid | None:
    """`configured_grid` of the config of a model, or of its vision part."""
    config = getattr(config, "vision_config", None) or config
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


def per_axis(name: str, option: str, value: Any, grid: Grid) -> tuple[Any, ...]:
    """`value` as one number per axis of `grid`.

    Raises:
        ModelMismatchError: it has another number of axes.
    """
    value = value if isinstance(value, tuple) else (value,) * len(grid)
    if len(value) != len(grid):
        raise ModelMismatchError(
            f"{name}: {option}={value} has {len(value)} axes, the grid {grid} has {len(grid)}"
        )
    return value
