"""The public calls: `patch`, `patched`, `unpatch`, `load`, `active`, `plan`, `prompt`.

Everything is checked before the first change; if something fails half-way, the model is put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import registry
from .errors import PatchError
from .install.apply import _apply
from .install.handle import PatchHandle
from .install.plan import plan
from .install.state import get_state
from .install.undo import _drop
from .model import selection
from .model.selection import Selector
from .model.sites import base_model


def patch(
    model: nn.Module,
    name_or_config: str | registry.Patch,
    *,
    part: str | None = None,
    layers: Selector = None,
    heads: Selector = None,
    impl: str = "auto",
    cache: str = "auto",
    **options: Any,
) -> PatchHandle:
    """Change how a loaded model attends.

    Args:
        model: a transformers model, or a wrapper (PEFT) around one. It is changed in place.
        name_or_config: a method name (see `available`) or a config object.
        part: "text", "vision", "audio", "encoder", "decoder" or "cross"; None = where the method belongs.
        layers: layers within the part: ints, slices, "0-3,-2:" or a mapping from such a pattern to option overrides.
        heads: query heads, in the same notation.
        impl: executor: "auto", or "reference", "torch", "triton" (forced: raises instead of falling back).
        cache: "auto" frees the KV cache of what the method never reads again, "keep" leaves caches alone.
        options: fields of the method's config.

    Returns:
        A `PatchHandle`; also usable in a ``with`` statement.

    Raises:
        PatchError: one of its subclasses, before anything was changed (see `errors`).
    """
    layers, heads = selection.settled(layers), selection.settled(heads)
    made = plan(
        model, name_or_config, part=part, layers=layers, heads=heads, impl=impl, cache=cache, **options
    )
    for note in made.warnings:
        warnings.warn(f"{made.config.name}: {note}", stacklevel=2)
    return _apply(model, made, layers, heads)


def unpatch(model: nn.Module) -> int:
    """Remove every patch from `model`; returns how many there were (0 is fine)."""
    base = base_model(model)
    state = get_state(base)
    count = 0
    while state is not None and state.entries:
        _drop(base, state, state.entries[-1])
        count += 1
    return count


def active(model: nn.Module) -> list[PatchHandle]:
    """Handles of the patches on `model`, in order of `patch()` calls (works on copies of a patched model too)."""
    state = get_state(model)
    return [PatchHandle(model, entry) for entry in state.entries] if state else []


@contextmanager
def patched(model: nn.Module, name_or_config: str | registry.Patch, **options: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a ``with`` block, undone even if the block raises."""
    handle = patch(model, name_or_config, **options)
    try:
        yield handle
    finally:
        handle.remove()


def load(
    model: nn.Module, directory: str | Path, *, impl: str | None = None, revision: str | None = None
) -> PatchHandle:
    """Put a saved patch adapter on `model`.

    Args:
        directory: local folder, or a hub id. impl: overrides the saved executor choice.
        revision: commit, tag or branch of a hub id; a commit pins what is read.

    Raises:
        AdapterError: missing, damaged, newer, out of bounds, or an option names a file. ModelMismatchError: made for
            another model.
    """
    from .install.adapters import load as load_adapter

    return load_adapter(model, directory, impl=impl, revision=revision)


@contextmanager
def prompt(
    model: nn.Module,
    *,
    length: int | None = None,
    image_keys: Tensor | None = None,
    marked: Any = None,
) -> Iterator[None]:
    """Tell the patches of `model` facts they cannot see in this forward.

    Args:
        length: tokens of the prompt, when prompt and answer are scored in one forward without a cache.
        image_keys: bool [B, S], True on image tokens, when the model is called with `inputs_embeds` only.
        marked: token ranges ``[[start, end], ...]`` for every row, or one such list per row (`pasta`), counted
            from the first real token of a row, end excluded.
    """
    state = get_state(model)
    if state is None:
        raise PatchError("hap.prompt needs a patched model; call hap.patch first")
    with state.context.prompt(length=length, image_keys=image_keys, marked=marked):
        yield
