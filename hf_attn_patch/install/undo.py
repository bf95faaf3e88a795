"""Taking a patch out again."""

from __future__ import annotations

from torch import nn

from ..errors import CompositionError
from ..model.sites import base_model, find_sites
from .attach import detach
from .names import STATE
from .spans import reinstall_hooks
from .stack import PatchStack
from .state import Entry, State, get_state


def _drop(base: nn.Module, state: State, entry: Entry) -> None:
    """Take one entry out; with the last one everything goes."""
    if entry in state.entries:
        state.entries.remove(entry)
    for module in base.modules():
        if isinstance(module, PatchStack) and entry.key in module.patches:
            del module.patches[entry.key]
    paths = {path for other in state.entries for path in other.paths}
    state.snapshot = detach(base, state.snapshot, [s for s in find_sites(base) if s.path in paths])
    reinstall_hooks(state, base)
    if state.entries:
        return
    base.__dict__.pop(STATE, None)


def _remove(model: nn.Module, entry: Entry) -> None:
    base = base_model(model)
    state = get_state(base)
    assert state is not None
    if state.entries[-1] is not entry:
        later = [e.key for e in state.entries[state.entries.index(entry) + 1 :]]
        raise CompositionError(
            f"{entry.key} cannot be removed before {', '.join(reversed(later))}, patched on top of it. Remove in "
            "reverse order, or everything with hap.unpatch(model)"
        )
    _drop(base, state, entry)
