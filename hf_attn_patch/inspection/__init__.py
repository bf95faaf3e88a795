"""Looking into attention while a model runs: statistics (`capture`), the flow to the image (`attention_flow`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_flow import Flow, HeatMap
    from .capture import AttentionTable
    from .image_grid import ImageTokens, image_tokens

_HOMES = {
    "AttentionTable": "capture",
    "Flow": "attention_flow",
    "HeatMap": "attention_flow",
    "ImageTokens": "image_grid",
    "image_tokens": "image_grid",
}
__all__ = ["AttentionTable", "Flow", "HeatMap", "ImageTokens", "image_tokens"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
