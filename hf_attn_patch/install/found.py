"""Patches on a model, found through any object that holds it or is held by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..model.wrappers import base_model, modules_in, transformers_models
from .names import CHILD, STATE
from .stack import PatchStack, SitePatch, stacks_of

if TYPE_CHECKING:
    from .state import Entry, State


def state_on(base: nn.Module) -> State | None:
    """The state of the transformers model that was patched, and of no other."""
    return base.__dict__.get(STATE)


def patches_in(module: nn.Module) -> list[SitePatch]:
    """The patches of every site below `module`, in module order."""
    found = []
    for one in module.modules():
        if CHILD in one._modules:
            found += [patch for stack in stacks_of(one) for patch in stack.site_patches()]
    return found


def entries_of(thing: Any) -> list[tuple[State, Entry]]:
    """(state, entry) of every patch that touches `thing`, whichever object around or inside it was patched.

    Raises:
        ModelMismatchError: there is no transformers model in `thing`, nor any patch.
    """
    states: dict[int, State] = {}
    touched: set[int] = set()
    for root in modules_in(thing):
        for module in root.modules():
            if (state := state_on(module)) is not None:
                states.setdefault(id(state), state)
                touched.update(id(entry) for entry in state.entries)
        for patch in patches_in(root):
            touched.add(id(patch.entry))
            if (state := state_on(patch.entry.model)) is not None:
                states.setdefault(id(state), state)
    if not states and not transformers_models(thing):
        base_model(thing)  # says what was expected
    return [(s, entry) for s in states.values() for entry in s.entries if id(entry) in touched]


def other_states(model: nn.Module) -> list[State]:
    """States of patches made through other model objects, which may share modules and configs with `model`."""
    from .dispatch import live

    found: dict[int, State] = {}
    for stack in list(live):
        for patch in stack.site_patches() if isinstance(stack, PatchStack) else ():
            state = state_on(patch.entry.model)
            if state is not None and patch.entry.model is not model:
                found.setdefault(id(state), state)
    return list(found.values())
