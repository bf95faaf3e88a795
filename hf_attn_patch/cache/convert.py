"""Whether the layers of a cache can be swapped, and where the real tokens of its rows begin."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..call.mask import Mask, first_true


def first_real(attention_mask: Any) -> Tensor | None:
    """Column of the first real token of each row, int64 [B], from whatever a model got as `attention_mask`: a 2-D
    tensor, or masks that were made already (per layer type); None if it does not say."""
    if isinstance(attention_mask, dict):
        attention_mask = next((m for m in attention_mask.values() if isinstance(m, Mask)), None)
    if isinstance(attention_mask, Mask):
        return attention_mask.start
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return first_true(attention_mask.bool())


def real_with_holes(attention_mask: Any) -> Tensor | None:
    """bool [B, columns], True on real tokens, where some row has padding between them; None: there is none.

    One wait for the device, in forwards that may change what a cache keeps.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((m for m in attention_mask.values() if isinstance(m, Mask)), None)
    if isinstance(attention_mask, Mask):
        attention_mask = attention_mask.padding
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    real = attention_mask.bool()
    resumes = real[:, 1:] & ~real[:, :-1] & (real.cumsum(1)[:, :-1] > 0)
    return real if bool(resumes.any()) else None


def convertible(cache: Any, layers: list[int]) -> tuple[Any, str | None]:
    """The part of `cache` whose layers can be swapped, and why not (None = can).

    Only plain dynamic layers are swapped: sliding layers are bounded already, static and quantised ones have
    another purpose. Layers of a lazily built cache are created here.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    if getattr(inner, "offloading", False):
        return inner, "the cache is offloaded"
    lazy = getattr(inner, "layer_class_to_replicate", None)
    if lazy is DynamicLayer:
        while len(inner.layers) <= max(layers):
            inner.layers.append(lazy())
    if not hasattr(inner, "layers") or max(layers) >= len(inner.layers):
        return inner, f"{type(inner).__name__} has no layer {max(layers)}"
    return inner, None
