"""Carrying out a plan, all or nothing."""

from __future__ import annotations

import copy

from torch import nn

from ..model import selection
from ..model.selection import Selector
from ..model.sites import base_model
from .attach import attach
from .handle import PatchHandle
from .names import STATE
from .plan import Plan
from .spans import reinstall_hooks
from .stack import SitePatch, stacks_of
from .state import Entry, State, get_state
from .undo import _drop


def _apply(model: nn.Module, made: Plan, layers: Selector, heads: Selector) -> PatchHandle:
    base = base_model(model)
    known = get_state(base)
    fresh, state = known is None, known or State(base)
    names = {e.key for e in state.entries}
    key, number = made.config.name, 2
    while key in names or hasattr(nn.ModuleDict, key):  # a child called "clear" or "keys" would hide a method
        key, number = f"{made.config.name}_{number}", number + 1
    entry = Entry(
        key, made.config, made.part, selection.plain(layers), selection.plain(heads), made.impl, made.cache,
        [s.path for s in made.sites], base,
    )  # fmt: skip
    pieces = [SitePatch(site, entry, kinds) for site, kinds in zip(made.sites, made.variants)]
    try:
        base.__dict__[STATE] = state
        state.snapshot += attach(base, made.sites, state.context)
        for site, piece in zip(made.sites, pieces):
            like = next(site.module.parameters(), None)
            if like is not None:
                piece.to(device=like.device)
            for number, stack in enumerate(stacks_of(site.module)):
                stack.patches[key] = piece if number == 0 else copy.deepcopy(piece)
        state.entries.append(entry)
        reinstall_hooks(state, base)
    except BaseException:
        _drop(base, state, entry)
        if fresh:
            base.__dict__.pop(STATE, None)
        raise
    return PatchHandle(model, entry)
