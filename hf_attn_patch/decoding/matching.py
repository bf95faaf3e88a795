"""Image-prompt matching: which pixels of a picture a question is about (the first half of AGLA)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

SIDE = 384  # the published code works on pictures of this side
BLUR = 0.02  # sigma of the blur, relative to the side


def gradcam(attention: Tensor, gradient: Tensor, text_mask: Tensor) -> Tensor:
    """``mean_h(A relu(dA))`` averaged over the words, as a map [B, P, P].

    attention, gradient: [B, H, T, 1 + P * P] of a cross-attention of text on image (column 0 is the image's CLS).
    text_mask: [B, T], 1 on real tokens; the first (CLS) and the last real one (SEP) are left out.
    (Lackel/AGLA efa1263 lavis/models/blip_models/blip_image_text_matching.py, READ and RAN)
    """
    seen = (attention * gradient.clamp(min=0)).mean(1)[..., 1:]  # [B, T, P * P]
    at, length = torch.arange(text_mask.shape[1], device=text_mask.device), text_mask.sum(1, keepdim=True)
    words = ((at >= 1) & (at < length - 1)).to(seen.dtype)[..., None]
    side = math.isqrt(seen.shape[-1])
    return ((seen * words).sum(1) / words.sum(1).clamp(min=1)).unflatten(-1, (side, side))


def relevance(cam: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A map [h, w] as pixels [side, side] in 0 … 1: cubic spline (zeros outside), blur, both rescaled.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ConfigError("agla: enlarging the map needs scipy: pip install 'hf_attn_patch[eval]'") from error

    small = _rescaled(cam)
    # scikit-image's resize(order=3, mode="constant") of the original, in terms of what it calls
    factors = (side / cam.shape[0], side / cam.shape[1])
    large = ndimage.zoom(small, factors, order=3, mode="grid-constant", grid_mode=True)
    large = np.clip(large, small.min(), small.max())
    return _rescaled(ndimage.gaussian_filter(large, BLUR * side, mode="reflect"))


def _rescaled(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.ones_like(values)


def kept_pixels(relevant: np.ndarray, fraction: float) -> np.ndarray:
    """bool [side, side]: the pixels not below the value at place int(n * fraction) of the descending order."""
    order = np.sort(relevant, axis=None)[::-1]
    return relevant >= order[int(order.size * min(fraction, 1 - 1e-5))]


def kept_fraction(score: float) -> float:
    """``1 - s / 2`` for the cosine s of picture and text: the better they match, the less is kept."""
    return min(1 - score / 2, 1 - 1e-5)


def black_out(image: Any, keep: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with the pixels outside `keep` [side, side] black (nearest pixel of the mask)."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ConfigError(
            f"agla: a picture has shape {list(pixels.shape)} and type {pixels.dtype}; give PIL images in RGB, or "
            "arrays [H, W, 3] of uint8"
        )
    rows, columns = ((np.arange(n) * m // n) for n, m in zip(pixels.shape[:2], keep.shape))
    return np.where(keep[rows][:, columns][..., None], pixels, 0).astype(np.uint8)


def match(model: Any, processor: Any, image: Any, text: str, block: int) -> tuple[np.ndarray, float]:
    """(Grad-CAM map [P, P] of the "match" logit, cosine of picture and text) from a BLIP image-text matching model.

    model: ``BlipForImageTextRetrieval`` ("Salesforce/blip-itm-large-coco"), or one with its two heads and
    ``text_encoder.encoder.layer[block].crossattention.self``. Parameters get no gradients.

    Raises:
        ConfigError: the model has no such layer.
    """
    try:
        site = model.text_encoder.encoder.layer[block].crossattention.self
    except (AttributeError, IndexError) as error:
        raise ConfigError(
            f"agla: {type(model).__name__} has no text_encoder.encoder.layer[{block}].crossattention.self; give "
            "a BlipForImageTextRetrieval as matcher, and a layer it has with block="
        ) from error
    made = processor(images=image, text=text, return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in dict(made).items()}
    kept: list[Tensor] = []
    handle = site.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    try:
        with torch.enable_grad():
            # a graph to the probabilities exists whether or not the parameters want gradients
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype).detach().requires_grad_()
            scores = model(**inputs, use_itm_head=True)[0]
            gradient = torch.autograd.grad(scores[:, 1].sum(), kept[0])[0]
    finally:
        handle.remove()
    with torch.no_grad():
        cosine = float(model(**inputs, use_itm_head=False)[0].flatten()[0])
    cam = gradcam(kept[0].detach().double(), gradient.double(), inputs["attention_mask"])[0]
    return cam.cpu().numpy(), cosine
