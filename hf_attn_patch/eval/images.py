"""Images for vision tasks without a download: scikit-learn's handwritten digits, or a folder of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def digits(count: int, seed: int) -> tuple[Any, list[int]]:
    """`count` real 8 x 8 digits in a seeded order: float32 [count, 3, 8, 8] in 0 … 1, and their labels.

    Raises:
        ValueError: scikit-learn is missing, or it has fewer images.
    """
    import numpy as np
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    data = load_digits()
    if not 0 < count <= len(data.images):
        raise ValueError(f"asked for {count} digits, scikit-learn has {len(data.images)}")
    order = np.random.default_rng(seed).permutation(len(data.images))[:count]
    pixels = torch.from_numpy(data.images[order]).float()[:, None].expand(-1, 3, -1, -1) / 16
    return pixels.contiguous(), [int(label) for label in data.target[order]]


def folder(path: str, count: int) -> list[Any]:
    """The first `count` images of a folder (recursive, sorted by name) as PIL images in RGB.

    Raises:
        ValueError: no such folder, no images in it, or Pillow is missing.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"images={path!r} is not a folder")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES)[:count]
    if not files:
        raise ValueError(f"images={path!r} holds no {', '.join(SUFFIXES)} file")
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("reading image files needs Pillow: pip install pillow") from error
    return [Image.open(f).convert("RGB") for f in files]


def pixel_values(model: Any, processor: Any, images: Any, size: int | None) -> Any:
    """Images as the model wants them, [n, C, height, width] on its device and in its dtype.

    size: side in pixels, None = as the processor does. A processor that cannot be told a size (neither a keyword
    ``size`` nor an attribute) is refused when one is asked for.

    Raises:
        ValueError: see above.
    """
    if size is None:
        values = _call(processor, images)
    elif hasattr(processor, "image_mean"):  # an image processor of transformers
        square = {"height": size, "width": size}
        values = _call(processor, images, size=square, crop_size=square)
    elif hasattr(processor, "size"):
        values = _call(_resized(processor, size), images)
    else:
        raise ValueError(
            f"size={size} was asked for, {type(processor).__name__} has no size to set. Leave size out."
        )
    return values.to(device=model.device, dtype=model.dtype)


def _resized(processor: Any, size: int) -> Any:
    """A copy of a callable with an attribute `size` (the testbed's are frozen dataclasses), set to `size`."""
    import copy
    import dataclasses

    if dataclasses.is_dataclass(processor) and not isinstance(processor, type):
        return dataclasses.replace(processor, **{"size": size})
    copied = copy.copy(processor)
    copied.size = size
    return copied


def _call(processor: Any, images: Any, **kwargs: Any) -> Any:
    import torch

    if isinstance(images, torch.Tensor) and hasattr(processor, "image_mean"):
        images = list(images)
        kwargs.setdefault("do_rescale", False)  # ours are 0 … 1 already
    if kwargs or hasattr(processor, "image_mean"):
        return processor(images, return_tensors="pt", **kwargs)["pixel_values"]
    return processor(images)["pixel_values"]
