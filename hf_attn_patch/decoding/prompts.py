"""The second prompt: without its image, with a sentence more, or with another picture (on inputs of ``generate``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PatchError
from ..forward.needs import image_free
from ..forward.needs.images import image_token_ids


def image_columns(config: Any, ids: Tensor) -> Tensor:
    """bool [B, L], True on placeholders of images and videos in `ids` [B, L]."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in image_token_ids(config):
        found |= ids == token
    return found


def per_token(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Those inputs that have one number per token: input_ids [B, L] and what has its shape."""
    shape = inputs["input_ids"].shape
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape}


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def without_image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt with image placeholders and their marks taken out, rows padded on the left; no pixels.

    Raises:
        PatchError: a row holds nothing but its image.
    """
    ids = inputs["input_ids"]
    image, real = image_columns(model.config, ids), _mask(inputs).bool()
    made = image_free.text_inputs(model, inputs, ids, image, real, ())
    return {
        k: v for k, v in made.items() if k not in ("use_cache", "logits_to_keep")
    }  # generate decides these


def with_sentence(config: Any, inputs: dict[str, Any], sentence: list[int], name: str) -> dict[str, Any]:
    """The prompt with the tokens `sentence` behind the last image of every row (behind the image's end mark, if any).

    Raises:
        PatchError: a row without an image.
    """
    ids, mask = inputs["input_ids"], _mask(inputs)
    inside = image_columns(config, ids)
    if not bool(inside.any(1).all()):
        row = int((~inside.any(1)).nonzero()[0])
        raise PatchError(
            f"{name}: row {row} holds no image, so there is no place for the disturbing sentence"
        )
    for token in image_free.wrapper_ids(config):
        inside |= ids == token
    new = ids.new_tensor(sentence)
    ends = [int(row.nonzero()[-1]) + 1 for row in inside]
    made = dict(inputs)
    for key, values in per_token({**inputs, "attention_mask": mask}).items():
        if key == "position_ids":
            made.pop(key, None)
            continue
        fill = new if key == "input_ids" else torch.full_like(new, int(key == "attention_mask"))
        made[key] = torch.stack([torch.cat([v[:e], fill.to(v), v[e:]]) for v, e in zip(values, ends)])
    return made


def pixel_names(inputs: dict[str, Any]) -> list[str]:
    """Keys of the pixels: ``pixel_values``, ``pixel_values_videos``."""
    return [
        k for k, v in inputs.items()
        if k.startswith("pixel_values") and isinstance(v, Tensor) and v.is_floating_point()
    ]  # fmt: skip


def image_sizes(inputs: dict[str, Any], key: str) -> list[int]:
    """How many rows of the pixel tensor `key` each image takes: 1, or its number of patches where images are given as
    one list of patches with a table of grids [images, 3]."""
    pixels = inputs[key]
    for name, grid in inputs.items():
        if "grid" in name and isinstance(grid, Tensor) and grid.ndim == 2:
            counts = grid.prod(-1)
            if int(counts.sum()) == pixels.shape[0] and ("video" in name) == ("video" in key):
                return counts.tolist()
    return [1] * pixels.shape[0]
