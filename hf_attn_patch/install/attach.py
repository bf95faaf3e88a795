"""Routing the configs of a model to our dispatch, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelMismatchError
from ..model.sites import Site, base_model, find_sites, why_not_dispatchable
from .dispatch import live, register, unregister_if_unused
from .names import CHILD, EAGER_NAME, NAME
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
    model: nn.Module, sites: list[Site], context: Context | None = None
) -> list[tuple[Any, str | None]]:
    """Put an empty `PatchStack` on every site that shares a config with `sites` and route those configs to us.

    Returns:
        (config, previous implementation) pairs for `detach`.

    Raises:
        ModelMismatchError: a forward branches on the implementation's name; nothing was changed.
    """
    chosen = configs_of(model, sites)
    ids = {id(c) for c in chosen}
    sharing = [s for s in find_sites(model) if id(getattr(s.module, "config", None)) in ids]
    for site in sharing:
        if (reason := why_not_dispatchable(site.module)) is not None:
            raise ModelMismatchError(f"{site.path} cannot be patched: {reason}")
    register()
    snapshot = []
    for site in sharing:
        config = getattr(site.module, "config", None)
        if CHILD not in site.module._modules:
            native = getattr(config, "_attn_implementation", None) or "sdpa"
            site.module.add_module(CHILD, PatchStack(native, context))
    for config in chosen:
        previous = getattr(config, "_attn_implementation", None)
        if previous in (NAME, EAGER_NAME):
            continue
        snapshot.append((config, previous))
        set_implementation(config, EAGER_NAME if previous == "eager" else NAME)
    return snapshot


def detach(
    model: nn.Module, snapshot: list[tuple[Any, str | None]], keep: list[Site] | None = None
) -> list[tuple[Any, str | None]]:
    """Undo `attach`: restore configs, drop the stacks, and the registration if nobody else uses it.

    Args:
        keep: sites that stay patched; what they need stays.

    Returns:
        The part of `snapshot` that is still to be undone.
    """
    kept = {id(config) for config in configs_of(model, keep or [])}
    for config, previous in snapshot:
        ours = getattr(config, "_attn_implementation", None) in (NAME, EAGER_NAME)
        if id(config) not in kept and ours:  # what the user has chosen meanwhile stays
            set_implementation(config, previous)
    for module in model.modules():
        if CHILD in module._modules and id(getattr(module, "config", None)) not in kept:
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
