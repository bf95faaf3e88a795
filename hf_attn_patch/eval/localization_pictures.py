"""Pictures of `localization`: boxes on a scene, a heat map over it, and where the map's largest value lies."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

SIDE = 160  # pixels of a picture: as wide as the page shows it
VEIL = (
    0.35,
    0.9,
)  # opacity of a map at its least and at its largest value: what nobody looks at is dark, but visible


def enlarged(heat: Any, side: int) -> Any:
    """A map [rows, columns], bilinearly to [side, side]; pointing and energy are read from the same."""
    import torch

    return torch.nn.functional.interpolate(
        heat[None, None].float(), (side, side), mode="bilinear", align_corners=False
    )[0, 0]


def overlay(image: Any, heat: Any) -> np.ndarray:
    """`heat` [rows, columns], from its least to its largest value, over a square `image` (PIL or [H, W, 3] uint8) made
    grey; uint8 [H, W, 3].

    Raises:
        ImportError: matplotlib, whose colours these are, is missing.
    """
    from matplotlib import colormaps

    grey = np.asarray(image, dtype=np.float64).mean(-1, keepdims=True) / 255
    large = enlarged(heat, len(grey)).cpu().numpy()
    share = (large - large.min()) / max(float(large.max() - large.min()), 1e-12)
    weight = VEIL[0] + (VEIL[1] - VEIL[0]) * share[..., None]
    colored = (1 - weight) * grey + weight * colormaps["inferno"](share)[..., :3]
    return np.round(255 * colored).astype(np.uint8)


def drawn(image: Any, boxes: Sequence[Sequence[int]], heat: Any = None) -> str:
    """A scene as a PNG of `SIDE` pixels (data URI) with boxes, and over it a map [rows, columns] with a ring around its
    largest value.

    Raises:
        ImportError: as `overlay`.
    """
    from PIL import Image, ImageDraw

    side = image.size[0]
    if heat is not None:
        image = Image.fromarray(overlay(image, heat))
    scale = SIDE / side
    large = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(large)
    for box in boxes:
        left, top, right, bottom = (round(scale * v) for v in box)
        for offset, color in ((0, "black"), (1, "white")):  # seen on any ground
            pen.rectangle(
                (left + offset, top + offset, right - 1 - offset, bottom - 1 - offset), outline=color
            )
    if heat is not None:
        x, y = (scale * (v + 0.5) for v in peak(heat, side))
        for radius, color in ((6, "black"), (5, "white"), (4, "black")):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color)
    return png(large)


def peak(heat: Any, side: int) -> tuple[int, int]:
    """(x, y) in pixels of the largest value of a map brought to `side` x `side`."""
    place = int(enlarged(heat, side).argmax())
    return place % side, place // side


def png(image: Any) -> str:
    """A picture of at most 128 colours as a data URI, some 10 kB at `SIDE` pixels."""
    from PIL import Image

    file = io.BytesIO()
    few = image.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
