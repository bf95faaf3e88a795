"""What `patch()` keeps on a transformers model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import registry
from ..errors import PatchError
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


def aux_losses(model: nn.Module, weighted: bool = False) -> dict[str, Tensor]:
    """Auxiliary losses of the last forward of `model` in training mode, ``{"moh.balance": 0-d tensor}``.

    Each is a mean over sites and still has its graph: a loop that computes its own loss (and gives the model no labels)
    adds ``sum(hap.aux_losses(model, weighted=True).values())``. A forward with labels has added them already.

    Args:
        weighted: multiply by the weights of the patches, as the added sum does.

    Raises:
        PatchError: nothing is patched.
    """
    state = get_state(model)
    if state is None:
        raise PatchError("aux_losses needs a patched model; call hap.patch first")
    return state.context.losses.means(weighted)
