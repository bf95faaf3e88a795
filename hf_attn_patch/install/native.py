"""What a module would have computed without us."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..call.mask import Mask
from ..call.ragged import RaggedKV
from ..errors import CacheError, ModelMismatchError


def check_length(module: nn.Module, mask: Mask, key: Any) -> None:
    """A mask made for another number of keys than the module attends to belongs to a model that edits its mask.

    Raises:
        ModelMismatchError: the model extends its keys and its mask by means that a `Mask` does not go through.
    """
    if mask.given is None and mask.kv_len != key.shape[2] and mask.kv_len != 1:
        raise ModelMismatchError(
            f"{type(module).__name__} attends to {key.shape[2]} keys, its mask was made for {mask.kv_len}; this model "
            "changes keys and mask on its own, which a patch cannot follow"
        )


def eager_function(module: nn.Module) -> Any:
    """The eager attention function in the modeling file of `module` (what transformers uses as its default)."""
    forward = inspect.unwrap(type(module).forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward") and name in forward.__globals__:
            return forward.__globals__[name]
    raise ModelMismatchError(
        f"{type(module).__name__} has no eager attention function to fall back to; load the model with "
        "attn_implementation='sdpa'"
    )


def evicted(key: RaggedKV) -> CacheError:
    """Error for a cache of per-head spans at a site where nothing reads by spans (any more)."""
    return CacheError(
        f"this cache keeps {key} for a patch that is not active now; its evicted tokens are gone. "
        "Start with a fresh cache, or keep the patch enabled while the cache lives"
    )


def native_attention(
    module: nn.Module, native: str, query: Tensor, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Exactly what the module would have computed without us."""
    if isinstance(key, RaggedKV):
        raise evicted(key)
    if isinstance(mask, Mask):
        check_length(module, mask, key)
        facts, mask = mask, mask.native(native)
        if (
            mask is None
            and facts.causal
            and kwargs.get("is_causal") is False
            and facts.q_len > 1
            and (getattr(module, "is_causal", False))
        ):
            # the module decided `is_causal` by whether it got a mask; natively it would have got none
            kwargs = {**kwargs, "is_causal": True}
    functions = inspect.unwrap(type(module).forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    function = eager_function(module) if native == "eager" else functions.get_interface(native, None)
    return function(module, query, key, value, mask, **kwargs)
