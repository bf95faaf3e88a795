"""One attention call of a transformers module as a neutral `Program`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..call.mask import Mask
from ..call.program import Program
from ..errors import ModelMismatchError
from ..forward.running import Running
from .names import CHILD
from .native import check_length

# What modeling code passes besides q, k, v and mask, and that is either in the Program already (mask, window) or
# irrelevant to the result. Anything else that carries a tensor is refused: ignoring it would be silently wrong.
_KNOWN_KWARGS = {
    "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic", "cache",
    "softcap", "s_aux", "position_bias", "position_embeddings", "past_key_values", "cache_position", "layer_idx",
    "attention_mask", "token_type_ids", "mm_token_type_ids", "return_dict", "logits_to_keep", "head_mask",
    "num_items_in_batch", "shift_labels",  # for the loss: Trainer gives them to the model, which hands everything on
}  # fmt: skip


def make_program(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, kwargs: dict[str, Any]
) -> Program:
    """One attention call of a transformers module as a neutral `Program`.

    Raises:
        ModelMismatchError: the module passes something that changes its attention and that a Program cannot hold.
    """
    unknown = [
        k
        for k, v in kwargs.items()
        if k not in _KNOWN_KWARGS and (isinstance(v, Tensor) or (isinstance(v, (tuple, list)) and v))
    ]
    if unknown:
        raise ModelMismatchError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function; a patch would ignore "
            "that and compute something else. Exclude these layers with layers=..., or leave the model unpatched"
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    mask = Mask.of(attention_mask, query, key, causal=causal)
    check_length(module, mask, key)
    running = running_of(module)
    seen = running.seen if running is not None and causal else None
    if mask.given is not None and seen is not None and seen + mask.q_len < mask.kv_len:
        mask.q_offset = (
            seen  # a static cache is longer than what was seen, and a given mask does not say where we are
        )
    scaling = kwargs.get("scaling")
    position_bias = kwargs.get("position_bias")
    return Program(
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        position_bias=position_bias if isinstance(position_bias, Tensor) else None,
        dropout=float(kwargs.get("dropout") or 0.0),
        need_weights=wants_weights(module, kwargs),
    )


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True if this forward was asked for attention probabilities."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        running = running_of(module)
        asked = None if running is None else running.output_attentions
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def running_of(module: nn.Module) -> Running | None:
    """The running forward of the model whose attention module this is."""
    context = getattr(module._modules.get(CHILD), "context", None)
    return None if context is None else context.running()
