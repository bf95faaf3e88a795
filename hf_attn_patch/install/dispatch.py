"""The one attention function and the one mask function that transformers is told about.

Both are registered under the same name at the first `patch()` and dropped when no patched model is left: an
attention function without a mask function of the same name gets no mask at all and attends to padding. What a
call should do is read from the attention module itself (its child ``attn_patch``, a `PatchStack`), so copies,
devices, PEFT and several models in one process need no global table.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor, nn

from ..call.mask import Mask
from ..forward.checkpointing import FACTS
from .names import CHILD, EAGER_NAME, NAME
from .native import native_attention
from .routed import warn_unpatched

lock = (
    threading.RLock()
)  # else another thread may forget the names before the first stack of this one is `live`
live: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every `PatchStack`: who still needs the registration


def attention_forward(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers."""
    stack = module._modules.get(CHILD)
    if (
        stack is None
    ):  # a module that shares its config with patched ones but was no site when they were patched
        kwargs.pop(FACTS, None)
        warn_unpatched(module.config)
        native = "eager" if getattr(module.config, "_attn_implementation", NAME) == EAGER_NAME else "sdpa"
        return native_attention(module, native, query, key, value, attention_mask, kwargs)
    return stack(module, query, key, value, attention_mask, kwargs)


def mask_function(**arguments: Any) -> Mask | None:
    """The mask function registered with transformers: returns facts instead of a tensor."""
    return _make_mask("sdpa", arguments)


def eager_mask_function(**arguments: Any) -> Mask | None:
    """`mask_function` for models that were loaded with eager attention."""
    return _make_mask("eager", arguments)


def _make_mask(flavour: str, arguments: dict[str, Any]) -> Mask | None:
    given = arguments.get("attention_mask")
    if isinstance(given, Mask):  # an inner model may be handed the mask that an outer one made
        return given
    mask = Mask.from_transformers(flavour, **arguments)
    if arguments.get("allow_is_bidirectional_skip") and not mask.restricts:
        return None  # as transformers does: modules that are no sites may take another path without a mask
    return mask


def register() -> None:
    """Tell transformers about both functions, under both names. Safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    with lock:
        for name, mask in ((NAME, mask_function), (EAGER_NAME, eager_mask_function)):
            AttentionInterface.register(name, attention_forward)
            AttentionMaskInterface.register(name, mask)


def unregister_if_unused() -> bool:
    """Forget both names once no patched model (or copy of one) is alive. True if they are gone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    with lock:
        if len(live):
            return False
        for name in (NAME, EAGER_NAME):
            for interface in (AttentionInterface, AttentionMaskInterface):
                # there is no public way to take a registration back
                interface._global_mapping.pop(name, None)
        return True


def registered() -> bool:
    """True if transformers currently knows our attention function."""
    from transformers import AttentionInterface

    return NAME in AttentionInterface._global_mapping
