"""Where the image tokens of a prompt lie in their picture: columns of the prompt, and rows x columns of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchError
from ..forward.needs.images import image_token_ids


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one picture. row: of the batch. columns: int64 [h * w], line by line. grid: (h, w)."""

    row: int
    columns: Tensor
    grid: tuple[int, int]

    def on_grid(self, values: Tensor) -> Tensor:
        """[..., S] over the columns of the prompt -> [..., h, w]."""
        return values[..., self.columns.to(values.device)].unflatten(-1, self.grid)


def image_tokens(
    config: Any, inputs: dict[str, Any], grid: tuple[int, int] | None = None
) -> list[ImageTokens]:
    """The pictures of a batch, in the order of their tokens.

    The grid comes from ``image_grid_thw`` (patches before merging) where there is one; else a run of n tokens is taken
    for a square. grid: (h, w) of every picture, for models that do neither (newline tokens, several tiles).

    Raises:
        PatchError: no image token, or a run of tokens that is no square and has no grid.
    """
    ids = inputs["input_ids"]
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in image_token_ids(config):
        found |= ids == token
    if not bool(found.any()):
        raise PatchError("the prompt holds no image token, so there is no picture to show anything on")
    table = next(
        (v for k, v in inputs.items() if "grid" in k and "video" not in k and isinstance(v, Tensor)), None
    )
    sizes = None
    if table is not None and grid is None:
        merged = int(table.prod(-1).sum()) // int(found.sum())
        side = math.isqrt(merged)
        sizes = [(int(r[:-2].prod()) * int(r[-2]) // side, int(r[-1]) // side) for r in table]
    pictures: list[ImageTokens] = []
    for row in range(ids.shape[0]):
        columns = found[row].nonzero()[:, 0]
        while columns.numel():
            if sizes is not None:
                size = sizes[len(pictures)]
            else:
                run = int((columns.diff() == 1).long().cumprod(0).sum()) + 1
                size = grid or (math.isqrt(run), math.isqrt(run))
                if grid is None and size[0] * size[1] != run:
                    raise PatchError(
                        f"row {row} has {run} image tokens in a row, which is no square, and the inputs hold no grid; "
                        "say how they lie with grid=(rows, columns)"
                    )
            count = size[0] * size[1]
            if count > columns.numel():
                raise PatchError(
                    f"row {row} has {columns.numel()} image tokens left, a picture of {size} needs {count}"
                )
            pictures.append(ImageTokens(row, columns[:count], size))
            columns = columns[count:]
    return pictures
