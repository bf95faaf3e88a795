"""Taking a patch out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import CompositionError
from ..model.sites import find_sites
from .attach import detach
from .found import entries_of, state_on
from .names import STATE
from .spans import reinstall_hooks
from .stack import PatchStack
from .state import Entry, State


def carry_through(undo: Callable[[], Any]) -> None:
    """Run `undo`, which is safe to repeat, to its end: after an interrupt it is run again, then that goes on."""
    try:
        undo()
    except BaseException:
        undo()
        raise


def drop(base: nn.Module, state: State, entry: Entry) -> None:
    """Take one entry out; with the last one everything goes. Safe to repeat."""
    if entry in state.entries:
        state.entries.remove(entry)
    for module in base.modules():
        if isinstance(module, PatchStack) and entry.key in module.patches:
            if (
                module.patches[entry.key].entry is entry
            ):  # a model inside or around this one may use the same key
                del module.patches[entry.key]
    paths = {path for other in state.entries for path in other.paths}
    state.snapshot = detach(base, state.snapshot, [s for s in find_sites(base) if s.path in paths])
    reinstall_hooks(state, base)
    if state.entries:
        return
    base.__dict__.pop(STATE, None)


def remove(entry: Entry) -> None:
    """Undo the last patch of a model.

    Raises:
        CompositionError: it is not the last one; nothing was changed.
    """
    base = entry.model
    state = state_on(base)
    if state is None or entry not in state.entries:
        return
    if state.entries[-1] is not entry:
        later = [e.key for e in state.entries[state.entries.index(entry) + 1 :]]
        raise CompositionError(
            f"{entry.key} cannot be removed before {', '.join(reversed(later))}, patched on top of it. Remove in "
            "reverse order, or everything with hap.unpatch(model)"
        )
    carry_through(lambda: drop(base, state, entry))


def remove_all(thing: Any, but: list[Entry] | None = None) -> int:
    """Undo every patch that touches `thing`, last one first; returns how many there were.

    Args:
        but: entries that stay.
    """
    stay = {id(entry) for entry in but or []}
    count = 0
    for state, entry in reversed(entries_of(thing)):
        if id(entry) not in stay:
            carry_through(lambda s=state, e=entry: drop(e.model, s, e))  # type: ignore[misc]
            count += 1
    return count
