"""Two-stream decoding: the logits of a prompt against those of the same prompt with less, or another, image.

>>> import hf_attn_patch as hap
>>> stream = hap.two_stream(model, "vcd", inputs=inputs, alpha=1.0)
>>> model.generate(**inputs, logits_processor=[stream])

Methods are dataclasses, one file each; nothing is patched for good, and the second stream has a cache of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import Decoding, Given, available, build, get, register_decoding

if TYPE_CHECKING:
    from .processor import TwoStream, decoded, processors, two_stream

__all__ = [
    "Decoding",
    "Given",
    "TwoStream",
    "available",
    "build",
    "decoded",
    "get",
    "processors",
    "register_decoding",
    "two_stream",
]


def __getattr__(
    name: str,
) -> Any:  # the processor's base class is transformers', which listing methods does not need
    if name in ("TwoStream", "decoded", "processors", "two_stream"):
        return getattr(importlib.import_module(".processor", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
