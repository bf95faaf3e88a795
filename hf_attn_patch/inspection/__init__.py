"""Looking into attention while a model runs: statistics (`capture`), the flow to the image (`attention_flow`), maps of
every head (`head_maps`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_flow import Flow, HeatMap
    from .capture import AttentionTable
    from .heads import HeadMaps, attention_distance, head_maps, nmi
    from .image_grid import ImageTokens, image_tokens

_HOMES = {
    "AttentionTable": "capture",
    "Flow": "attention_flow",
    "HeatMap": "attention_flow",
    "HeadMaps": "heads",
    "ImageTokens": "image_grid",
    "attention_distance": "heads",
    "head_maps": "heads",
    "nmi": "heads",
    "image_tokens": "image_grid",
}
__all__ = [
    "AttentionTable", "Flow", "HeadMaps", "HeatMap", "ImageTokens", "attention_distance", "head_maps",
    "image_tokens", "nmi",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
