"""Routing the configs of a model to our dispatch, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelMismatchError
from ..model.sites import Site, base_model, find_sites, why_not_dispatchable
from .dispatch import live, lock, register, unregister_if_unused
from .found import other_states
from .names import CHILD
from .routed import RoutedName, is_ours, native_of
from .stack import PatchStack, stacks_of

if TYPE_CHECKING:
    from ..forward.context import Context

# -- switching configs ------------------------------------------------------------------------------------------


def configs_of(model: nn.Module, sites: list[Site]) -> list[Any]:
    """The config objects that decide the attention implementation of `sites`: the modules' own, and those of the
    transformers models around them, which build the masks."""
    from transformers import PreTrainedModel

    found: dict[int, Any] = {}
    for site in sites:
        config = getattr(site.module, "config", None)
        if config is not None:
            found[id(config)] = config
        names = site.path.split(".")
        for end in range(len(names) - 1, -1, -1):
            owner = model.get_submodule(".".join(names[:end]))
            if isinstance(owner, PreTrainedModel):
                found[id(owner.config)] = owner.config
                break
    return list(found.values())


def set_implementation(config: Any, name: str | None) -> None:
    """Set the attention implementation of one config object and of no other.

    ``set_attn_implementation`` would also reach into sub-configs, and refuses whole model classes by a regular
    expression over their source; a patch of part="text" must leave the vision tower alone.
    """
    config._attn_implementation_internal = name


def attach(
    model: nn.Module,
    sites: list[Site],
    context: Context | None = None,
    snapshot: list[tuple[Any, str | None]] | None = None,
) -> list[tuple[Any, str | None]]:
    """Put an empty `PatchStack` on every site that shares a config with `sites` and route those configs to us.

    Args:
        snapshot: (config, previous implementation) pairs of earlier calls; changed in place, before each switch,
            so that an interrupted call can be undone.

    Returns:
        `snapshot`, for `detach`.

    Raises:
        ModelMismatchError: a forward branches on the implementation's name; nothing was changed.
    """
    snapshot = [] if snapshot is None else snapshot
    chosen = configs_of(model, sites)
    ids = {id(c) for c in chosen}
    sharing = [s for s in find_sites(model) if id(getattr(s.module, "config", None)) in ids]
    for site in sharing:
        if (reason := why_not_dispatchable(site.module)) is not None:
            raise ModelMismatchError(f"{site.path} cannot be patched: {reason}")
    natives = {id(config): _native(model, config, snapshot) for config in chosen}
    stacks: list[PatchStack] = []
    try:
        with lock:
            register()
            for site in sharing:
                native = natives[id(site.module.config)] or "sdpa"
                if CHILD not in site.module._modules:
                    stacks.append(PatchStack(native, context))
                    site.module.add_module(CHILD, stacks[-1])
                for stack in stacks_of(site.module):
                    stack.native = native  # the user may have chosen another one since the last patch
        for config in chosen:
            if is_ours(config._attn_implementation) and any(c is config for c, _ in snapshot):
                continue
            snapshot[:] = [pair for pair in snapshot if pair[0] is not config]
            snapshot.append((config, natives[id(config)]))
            set_implementation(config, RoutedName(natives[id(config)], config))
    except BaseException:
        for stack in stacks:
            live.discard(stack)
        raise
    return snapshot


def _native(model: nn.Module, config: Any, snapshot: list[tuple[Any, str | None]]) -> str | None:
    """The implementation `config` asks for without patches: one of our names may be there already, from an earlier
    patch, from a patch on a model inside or around this one, or left in a config that came from elsewhere."""
    current = getattr(config, "_attn_implementation", None)
    if is_ours(current):
        for pairs in (snapshot, *(state.snapshot for state in other_states(model))):
            for known, previous in pairs:
                if known is config:
                    return previous
    return native_of(current)


class Follow:
    """Keeps the routing of a patched model when somebody chooses another attention implementation for it meanwhile
    (``set_attn_implementation``): what was chosen becomes what runs where no patch is, and what an undo leaves.

    Asked before every forward (an object, so that a copy of the model gets one of its own).
    """

    def __init__(self, state: Any):
        self.state = state

    def __call__(self) -> None:
        for config, _ in self.state.snapshot:
            if not is_ours(getattr(config, "_attn_implementation", None)):
                self._take(config)

    def _take(self, config: Any) -> None:
        model, chosen = self.state.context.model, config._attn_implementation
        for state in (self.state, *other_states(model)):
            state.snapshot[:] = [(c, chosen if c is config else before) for c, before in state.snapshot]
        for module in model.modules():
            if getattr(module, "config", None) is config:
                for stack in stacks_of(module):
                    stack.native = chosen or "sdpa"
        set_implementation(config, RoutedName(chosen, config))


def detach(
    model: nn.Module, snapshot: list[tuple[Any, str | None]], keep: list[Site] | None = None
) -> list[tuple[Any, str | None]]:
    """Undo `attach`: restore configs, drop the stacks, and the registration if nobody else uses it. Safe to repeat.

    Args:
        keep: sites that stay patched; what they need stays.

    Returns:
        The part of `snapshot` that is still to be undone.
    """
    kept = {id(config) for config in configs_of(model, keep or [])}
    others = other_states(model)  # patched through a model inside or around this one
    shared = {id(config) for state in others for config, _ in state.snapshot}
    theirs = {id(m) for state in others for e in state.entries[:1] for m in e.model.modules()}
    for config, previous in snapshot:
        ours = is_ours(getattr(config, "_attn_implementation", None))
        if id(config) not in kept | shared and ours:  # what the user has chosen meanwhile stays
            set_implementation(config, previous)
    for module in model.modules():
        if CHILD not in module._modules or (config := id(getattr(module, "config", None))) in kept:
            continue
        if config in shared and id(module) in theirs:
            continue
        for stack in stacks_of(module):
            live.discard(stack)
        del module._modules[CHILD]
    unregister_if_unused()
    return [(config, previous) for config, previous in snapshot if id(config) in kept]


@contextmanager
def dispatched(model: nn.Module) -> Iterator[None]:
    """Route every site of `model` through our dispatch without any patch (coverage and overhead checks)."""
    model = base_model(model)
    snapshot = attach(model, find_sites(model))
    try:
        yield
    finally:
        detach(model, snapshot)
