"""What ``generate`` knows and its forwards do not: how long the whole prompt is, and what it consists of.

While a model is patched, its `generate` (this object's, not its class') first notes that down for the forwards that it
will run, in a context variable: threads and nested calls have their own.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PatchError

if TYPE_CHECKING:
    from .context import Context

CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

_told: ContextVar[tuple[Any, ...]] = ContextVar("hf_attn_patch_generating", default=())


class Prompt:
    """A running ``generate``: of which context, length of its prompt in columns, arguments it was called with."""

    def __init__(self, context: Context, length: int | None, inputs: dict[str, Any]):
        self.context, self.length, self.inputs = context, length, inputs


class Generate:
    """``model.generate`` of a patched model (an object, so that a copy of the model gets one of its own)."""

    def __init__(self, context: Context, model: Any):
        self.context, self.model = context, model
        functools.update_wrapper(self, type(model).generate)
        self.__wrapped__ = functools.partial(type(model).generate, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        twin = memo.get(id(self.model))
        return self if twin is None else Generate(copy.deepcopy(self.context, memo), twin)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _told.set((*_told.get(), self._prompt(args, kwargs)))
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            _told.reset(token)

    def __reduce__(self) -> Any:
        return Generate, (self.context, self.model)

    def _prompt(self, args: tuple, kwargs: dict[str, Any]) -> Prompt:
        names = list(inspect.signature(type(self.model).generate).parameters)[1:]
        given = {**dict(zip(names, args)), **{k: v for k, v in kwargs.items() if v is not None}}
        ids = given.get("inputs", given.get("input_ids"))
        if getattr(self.model.config, "is_encoder_decoder", False):
            ids = given.get("decoder_input_ids")
        embeds = given.get("inputs_embeds")
        length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None
        if isinstance(embeds, Tensor) and (length is None or length < embeds.shape[1]):
            length = embeds.shape[1]
        mask, cache = given.get("attention_mask"), given.get("past_key_values", given.get("cache"))
        if cache is not None and length is not None and isinstance(mask, Tensor) and mask.shape[1] > length:
            length = mask.shape[1]  # only what is new was passed
        return Prompt(self.context, length, {**given, "input_ids": ids})


class NotContinuous:
    """Continuous batching of a patched model: refused when it is asked for, and not in the thread that would run it."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises PatchError."""
        raise PatchError(
            f"{self.name}: continuous batching (paged caches) does not run with patches. Its sequences share one row "
            "and one pool of pages, their keys reach attention only inside transformers' own sdpa, eager and flash "
            "functions, and it accepts no other attention implementation. "
            "Use generate on padded batches, or take the patches off "
            "first (hap.unpatch(model))"
        )


def generating(context: Context) -> Prompt | None:
    """The innermost ``generate`` of the model of `context` that runs in this thread, or None."""
    if torch.compiler.is_compiling():
        return None
    return next((p for p in reversed(_told.get()) if p.context is context), None)


def told_by_generate(context: Context) -> int | None:
    """Columns of the prompt of the running ``generate``, or None."""
    prompt = generating(context)
    return None if prompt is None else prompt.length


def install(context: Context, model: Any) -> bool:
    """Let ``model.generate`` tell; False where it does not generate, or its object has a `generate` of its own."""
    can = getattr(type(model), "can_generate", None)
    if can is None or not type(model).can_generate() or "generate" in model.__dict__:
        return False
    model.__dict__["generate"] = Generate(context, model)
    for name in CONTINUOUS:
        if hasattr(type(model), name) and name not in model.__dict__:
            model.__dict__[name] = NotContinuous(name)
    return True


def remove(model: Any) -> None:
    """Undo `install`."""
    if isinstance(model.__dict__.get("generate"), Generate):
        del model.__dict__["generate"]
    for name in CONTINUOUS:
        if isinstance(model.__dict__.get(name), NotContinuous):
            del model.__dict__[name]
