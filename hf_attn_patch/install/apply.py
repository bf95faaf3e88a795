"""Carrying out a plan, all or nothing."""

from __future__ import annotations

import copy

from torch import nn

from ..model import selection
from ..model.selection import Selector
from ..model.survey import Survey
from .attach import Follow, attach
from .found import entries_of, state_on
from .handle import PatchHandle
from .localize import localized
from .names import STATE
from .plan import Plan
from .spans import reinstall_hooks
from .stack import SitePatch, stacks_of
from .state import Entry, State
from .undo import carry_through, drop


def apply(survey: Survey, made: Plan, layers: Selector, heads: Selector) -> PatchHandle:
    """Put the patch of `made` on the model of `survey`; after any error or interrupt the model is as before."""
    base = survey.base
    state = state_on(base) or State(base)
    names = {e.key for e in state.entries}
    key, number = made.config.name, 2
    while key in names or hasattr(nn.ModuleDict, key):  # a child called "clear" or "keys" would hide a method
        key, number = f"{made.config.name}_{number}", number + 1
    entry = Entry(
        key, made.config, made.part, selection.plain(layers), selection.plain(heads), made.impl, made.cache,
        [s.path for s in made.sites], base,
    )  # fmt: skip
    pieces = []
    for site, kinds in zip(made.sites, made.variants):
        here, local = localized(site, kinds)
        pieces.append(SitePatch(here, entry, local))
        if (device := survey.devices[site.path]) is not None:
            pieces[-1].to(device=device)
    try:
        handle = PatchHandle(survey.given, entry, [e for _, e in entries_of(survey.given)])
        base.__dict__[STATE] = state
        attach(base, made.sites, state.context, state.snapshot)
        state.context.follow = Follow(state)
        for site, piece in zip(made.sites, pieces):
            for number, stack in enumerate(stacks_of(site.module)):
                stack.patches[key] = piece if number == 0 else copy.deepcopy(piece)
        state.entries.append(entry)
        reinstall_hooks(state, base)
        return handle
    except BaseException:
        carry_through(lambda: drop(base, state, entry))
        raise
