"""Features of a vision model: the CLS (or pooled) token and the patch tokens of the last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..model.sites import base_model


def encode(
    model: Any, pixels: Any, batch: int, tick: Callable[[int], None] = lambda n: None
) -> tuple[Any, Any]:
    """(cls [n, D], patches [n, T, D]) in float32 on the CPU.

    Models without a CLS token (their token count is a plain grid) give the mean of the patches instead.
    """
    import torch

    cls, patches = [], []
    with torch.inference_mode():
        for part in pixels.split(batch):
            hidden = _last_hidden_state(model, part)
            prefix = prefix_tokens(model, part, hidden.shape[1])
            grid = hidden[:, prefix:]
            cls.append((hidden[:, 0] if prefix else grid.mean(1)).float().cpu())
            patches.append(grid.float().cpu())
            tick(len(part))
    return torch.cat(cls), torch.cat(patches)


def prefix_tokens(model: Any, pixels: Any, tokens: int) -> int:
    """Tokens before the patch grid (CLS, distillation, registers).

    Raises:
        ValueError: the token count is smaller than the grid, so the features are no token sequence of this image.
    """
    size = getattr(model.config, "patch_size", None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no patch_size in its config: its features are no grid of patches"
        )
    high, wide = (size, size) if isinstance(size, int) else size
    grid = (pixels.shape[-2] // high) * (pixels.shape[-1] // wide)
    if tokens < grid:
        raise ValueError(f"{type(model).__name__} gave {tokens} tokens for a grid of {grid} patches")
    return tokens - grid


def _last_hidden_state(model: Any, pixels: Any) -> Any:
    out = model(pixel_values=pixels, **_needs_interpolation(model, pixels))
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:  # a classification head: the backbone under it has the features
        backbone = getattr(model, model.base_model_prefix, None)
        if backbone is None or backbone is model:
            raise ValueError(
                f"{type(model).__name__} returns no last_hidden_state and has no backbone. Give the backbone model."
            )
        return _last_hidden_state(backbone, pixels)
    return hidden


def _needs_interpolation(model: Any, pixels: Any) -> dict[str, bool]:
    """ViT-like models refuse another size than the trained one unless told to interpolate; DINOv2 always does."""
    import inspect

    size = getattr(model.config, "image_size", None)
    trained = size if isinstance(size, int) else (size or [None])[0]
    # PEFT's own forward takes anything
    accepts = "interpolate_pos_encoding" in inspect.signature(base_model(model).forward).parameters
    return {"interpolate_pos_encoding": True} if accepts and trained != pixels.shape[-1] else {}
