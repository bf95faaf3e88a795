"""The public calls: `patch`, `patched`, `unpatch`, `load`, `active`, `plan`, `prompt`.

Everything is checked before the first change; if something fails half-way, the model is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import registry
from .errors import PatchError
from .install.found import entries_of
from .install.handle import PatchHandle
from .install.patching import patch_model
from .install.plan import plan as plan
from .install.state import get_state as get_state
from .install.undo import remove_all
from .model.selection import Selector
from .model.wrappers import transformers_models


def patch(
    model: Any,
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
        model: a transformers model, or what holds one (PEFT, DDP, a compiled module, a pipeline); changed in place.
            A wrapper of several independent models (a policy and its reference) gets the patch on each of them.
        name_or_config: a method name (see `available`) or a config object.
        part: "text", "vision", "audio", "encoder", "decoder", "cross" or "bridge" (resamplers, Q-formers, ...);
            None = where the method belongs.
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
    return patch_model(
        model, name_or_config, part=part, layers=layers, heads=heads, impl=impl, cache=cache, **options
    )


def unpatch(model: Any) -> int:
    """Remove every patch from `model`, also those made through an object inside or around it; returns their number."""
    return remove_all(model)


def active(model: Any) -> list[PatchHandle]:
    """Handles of the patches on `model`, in order of `patch()` calls (works on copies of a patched model too).

    A patch made through a model inside or around `model` is listed as well; its handle removes it.
    """
    held = [base for _, base in transformers_models(model)]
    return [PatchHandle(model if held == [e.model] else e.model, e) for _, e in entries_of(model)]


@contextmanager
def patched(model: Any, name_or_config: str | registry.Patch, **options: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a ``with`` block, undone even if the block raises.

    Patches that were made inside the block and are still there at its end go first, in reverse order.
    """
    before = [entry for _, entry in entries_of(model)]
    try:
        try:
            yield patch(model, name_or_config, **options)
        finally:
            remove_all(model, but=before)
    except BaseException:
        remove_all(model, but=before)  # nothing is left to do, unless the undo itself was interrupted
        raise


def load(
    model: Any, directory: str | Path, *, impl: str | None = None, revision: str | None = None
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
    model: Any,
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

    What is said holds in this thread or asyncio task, and in tasks started inside the block. A *thread* started inside
    does not know it (``asyncio.to_thread`` does: it copies the context): say it in the thread. Nor is it bound to a
    generator: a block around a ``yield`` also reaches what the caller runs meanwhile, and two generators that hold
    such blocks open at a time are refused; say it around every forward there.
    """
    states = {id(state): state for state, _ in entries_of(model)}
    if not states:
        raise PatchError("hap.prompt needs a patched model; call hap.patch first")
    with ExitStack() as stack:
        for state in states.values():
            stack.enter_context(state.context.prompt(length=length, image_keys=image_keys, marked=marked))
        yield
