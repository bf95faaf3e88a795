"""Hidden states that enter the layer of a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import PatchError
from ...model.sites import layer_module
from .base import Hooks, Need

if TYPE_CHECKING:
    from ..context import Context


class _Layer:
    """Pre-hook of one layer (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, path: str):
        self.context, self.path = context, path

    def enters(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None:
            raise PatchError(f"{type(module).__name__} got no hidden states as first argument or by name")
        self.context.running().note(self.path, "layer", hidden)


@dataclass(frozen=True)
class LayerInput(Need):
    says = "hidden states entering the layer"
    in_pieces = True

    def install(self, hooks: Hooks) -> None:
        for path in hooks.paths:
            hooks.before(layer_module(hooks.model, path), _Layer(hooks.context, path).enters)
