"""What enters an attention module, and its queries before they are normalised.

Both are recorded by hooks that run just before the attention function of the same call, so gradient checkpointing,
which runs a layer again, records them again; nothing has to travel from one run to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import Hooks, Need

if TYPE_CHECKING:
    from ..context import Context

# children that normalise queries (or queries and keys) per head
QUERY_NORMS = ("q_norm", "q_layernorm", "q_layer_norm", "query_layernorm", "query_norm", "qk_norm")


def query_norm(module: nn.Module) -> nn.Module | None:
    """The child of an attention module that normalises its queries, found by its name; None if it has none."""
    children = (module._modules.get(name) for name in QUERY_NORMS)
    return next((child for child in children if child is not None), None)


def by_head(x: Tensor, heads: int, length: int) -> Tensor | None:
    """[B, L, H, D], [B, H, L, D] or [B, L, H * D] as [B, L, H, D]; None if it is none of them.

    Where H = L the strides tell: both layouts are views of a projection [B, L, H * D], in which a token is one stretch.
    """
    if x.ndim == 3 and x.shape[1] == length and x.shape[2] % heads == 0:
        return x.unflatten(2, (heads, -1))
    if x.ndim != 4 or {x.shape[1], x.shape[2]} != {heads, length}:
        return None
    tokens_first = x.stride(1) >= x.stride(2) if heads == length else x.shape[1] == length
    return x if tokens_first else x.transpose(1, 2)


class _Site:
    """Pre-hooks of one attention module (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, path: str):
        self.context, self.path = context, path

    def enters(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        running = self.context.running()
        running.layers.get(self.path, {}).pop("query", None)
        if hidden is not None:
            running.note(self.path, "attention", hidden)

    def normalises(self, module: nn.Module, args: tuple) -> None:
        running = self.context.running()
        if "query" not in running.layers.get(self.path, {}):  # one module may serve queries, then keys
            running.note(self.path, "query", args[0])


@dataclass(frozen=True)
class AttentionInput(Need):
    says = "hidden states entering the attention module"
    in_pieces = True
    carried = False

    def install(self, hooks: Hooks) -> None:
        for path in hooks.paths:
            hooks.before(hooks.model.get_submodule(path), _Site(hooks.context, path).enters)


@dataclass(frozen=True)
class QueryBeforeNorm(Need):
    says = "queries before the model normalises them"
    in_pieces = True
    carried = False

    def install(self, hooks: Hooks) -> None:
        for path in hooks.paths:
            norm = query_norm(hooks.model.get_submodule(path))
            if norm is not None:
                hooks.before(norm, _Site(hooks.context, path).normalises, kwargs=False)
