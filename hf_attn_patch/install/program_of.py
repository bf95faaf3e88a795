"""One attention call of a transformers module as a neutral `Program`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..call.mask import Mask
from ..call.program import Program
from ..call.ragged import RaggedKV
from ..errors import ModelMismatchError
from ..forward.running import Running
from .native import check_length

# What modeling code passes besides q, k, v and mask, and that is either in the Program already (mask, window) or
# irrelevant to the result. Anything else that carries a tensor is refused: ignoring it would be silently wrong.
_KNOWN_KWARGS = {
    "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic", "cache",
    "softcap", "s_aux", "position_bias", "position_embeddings", "past_key_values", "cache_position", "layer_idx",
    "attention_mask", "token_type_ids", "mm_token_type_ids", "return_dict", "logits_to_keep", "head_mask",
    "seq_idx",
    "num_items_in_batch", "shift_labels",  # for the loss: Trainer gives them to the model, which hands everything on
}  # fmt: skip


def mask_of(
    module: nn.Module,
    query: Tensor,
    key: Any,
    attention_mask: Any,
    kwargs: dict[str, Any],
    running: Running | None,
) -> Mask:
    """What arrived as `attention_mask`, as a `Mask`; layers that get the same tensor share it.

    Raises:
        ModelMismatchError: it was made for another number of keys.
    """
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if isinstance(attention_mask, Tensor) and running is not None and not torch.compiler.is_compiling():
        key_shape = (query.shape[0], query.shape[2], key.shape[2], query.device, causal)
        known = running.scratch.setdefault(("given mask", id(attention_mask)), {"mask": attention_mask})
        if key_shape not in known:
            known[key_shape] = Mask.of(attention_mask, query, key, causal=causal)
        mask = known[key_shape]
    else:
        mask = Mask.of(attention_mask, query, key, causal=causal)
    if mask.packed and running is not None and not running.positions_given:
        mask = mask.without_packing()
    check_length(module, mask, key)
    seen = running.seen if running is not None and causal else None
    if mask.given is not None and seen is not None and seen + mask.q_len < mask.kv_len:
        mask.q_offset = (
            seen  # a static cache is longer than what was seen, and a given mask does not say where we are
        )
    return mask


def make_program(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    mask: Mask,
    kwargs: dict[str, Any],
    running: Running | None,
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
    query, key, value = one_dtype(query, key, value)
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
        need_weights=wants_weights(module, kwargs, running),
    )


def one_dtype(query: Tensor, key: Any, value: Any) -> tuple[Tensor, Any, Any]:
    """Queries, keys and values in one dtype: behind a rotary embedding, ``torch.autocast`` leaves float32 queries and
    keys beside half values, and the model's own attention would cast them."""
    if isinstance(key, RaggedKV):
        if all(group.key.dtype == group.value.dtype == query.dtype for group in key.groups):
            return query, key, value
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if isinstance(key, RaggedKV):
        return query.to(dtype), key.as_dtype(dtype), key.as_dtype(dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def wants_weights(module: nn.Module, kwargs: dict[str, Any], running: Running | None) -> bool:
    """True if this forward was asked for attention probabilities."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = None if running is None else running.output_attentions
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)
