"""What `patch()` keeps on a transformers model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import registry
from ..forward.context import Context, copy_with_model
from ..model.sites import base_model
from .names import STATE


@dataclass(eq=False)  # two equal calls are still two calls
class Entry:
    """One active `patch()` call on a model."""

    key: str
    config: registry.Patch
    part: str | None
    layers: Any
    heads: Any
    impl: str
    cache: str
    paths: list[str]
    model: Any = field(repr=False)
    enabled: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return copy_with_model(self, memo)


class State:
    """What `patch()` keeps on a transformers model: active entries, previous configs, context and its hooks."""

    def __init__(self, model: nn.Module):
        self.entries: list[Entry] = []
        self.snapshot: list[tuple[Any, str | None]] = []
        self.context = Context(model)
        self.cache_note = ""


def get_state(model: nn.Module) -> State | None:
    """The patch state of the transformers model inside `model`, or None."""
    return base_model(model).__dict__.get(STATE)
