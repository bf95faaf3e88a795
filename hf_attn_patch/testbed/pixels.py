"""Images to `pixel_values` with torch alone (no torchvision, no Pillow needed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """Callable `images -> {"pixel_values": float32 [B, C, size, size]}` with C = len(mean).

    `images` is one image or a list: Pillow images, arrays or tensors `[H, W]`, `[H, W, 3]`, `[3, H, W]`, or one
    tensor `[B, 3, H, W]`. Integers are read as 0..255, floats as 0..1. Images are resized to a square with antialiased
    bicubic interpolation, without cropping, so that pixel coordinates scale by one factor per axis.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Any) -> dict[str, Any]:
        """Raises ValueError for an image that has not 2 or 3 dimensions or 1, 3 or 4 channels."""
        import torch
        import torch.nn.functional as F

        single = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) < 4
        batch = [
            self._resized(_channels_first(image, len(self.mean)), F)
            for image in ([images] if single else images)
        ]
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return {"pixel_values": (torch.stack(batch) - mean) / std}

    def _resized(self, image: Any, F: Any) -> Any:
        if image.shape[-2:] == (self.size, self.size):
            return image
        size = (self.size, self.size)
        return F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(
            0, 1
        )


def _channels_first(image: Any, channels: int) -> Any:
    """float32 `[channels, H, W]` in 0..1."""
    import numpy as np
    import torch

    array = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in (1, 3, 4) and array.shape[-1] in (1, 3, 4):
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"pixels: cannot read an image of shape {tuple(array.shape)}; expected [H, W], [H, W, 3] or [3, H, W]"
        )
    array = array.float() if array.is_floating_point() else array.float() / 255
    array = array[:3]
    if array.shape[0] == channels:
        return array
    return array.expand(channels, -1, -1) if channels > 1 else array.mean(0, keepdim=True)
