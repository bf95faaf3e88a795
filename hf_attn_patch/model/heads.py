"""Heads of an attention module: how many, how wide, and which of them live here under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

QUERY = ("q_proj", "query", "q", "wq", "to_q", "query_proj", "q_lin", "q_a_proj")
KEY = ("k_proj", "key", "k", "wk", "to_k", "key_proj", "k_lin")
VALUE = ("v_proj", "value", "v", "wv", "to_v", "value_proj", "v_lin")
FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj", "kv_proj")
OUT = ("o_proj", "out_proj", "dense", "c_proj", "proj", "o", "wo", "out", "Wo", "out_lin", "projection")
_KINDS = (("query", QUERY), ("key", KEY), ("value", VALUE), ("fused", FUSED), ("out", OUT))


@dataclass(frozen=True)
class HeadSlice:
    """The heads of a site that one tensor-parallel rank computes: query heads start..stop, KV heads kv_start..kv_stop.

    An attention function is called with these heads only; everything a user writes counts all heads of the model.
    """

    start: int
    stop: int
    kv_start: int
    kv_stop: int

    def local(self, heads: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Those of the global query `heads` that live here, counted from this rank's first."""
        return None if heads is None else tuple(h - self.start for h in heads if self.start <= h < self.stop)


def first_int(source: Any, *names: str) -> Any:
    """First positive integer attribute of `source` among `names`."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except Exception:  # configs with per-layer values refuse to name one value for all layers
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def projection(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Name of the first child module among `names`."""
    return next((n for n in names if isinstance(getattr(module, n, None), nn.Module)), None)


def projections(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """(kind, child name) of the projections that the module has."""
    return tuple((kind, name) for kind, names in _KINDS if (name := projection(module, names)))


def projection_layer(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The linear layer behind a projection (LoRA wraps it), or None."""
    name = projection(module, names)
    layer = getattr(module, name) if name else None
    return getattr(layer, "base_layer", layer)


def _out_features(layer: Any) -> int | None:
    for attribute in ("out_features", "nf"):
        size = getattr(layer, attribute, None)
        if isinstance(size, int):
            return size
    return None


def count_heads(module: nn.Module, config: Any) -> tuple[int | None, int | None, int | None]:
    """(H, Hkv, D) of the whole model, from the module, its projections and its config."""
    width = first_int(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim")
    named = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
    heads = first_int(module, *named) or first_int(config, *named, "encoder_attention_heads")
    dim = first_int(module, "head_dim", "attention_head_size", "key_value_proj_dim", "qk_head_dim")
    dim = dim or first_int(config, "head_dim", "d_kv", "qk_head_dim")
    if dim is None and width and heads:
        dim = width // heads
    q_width = _out_features(projection_layer(module, QUERY))
    if dim and q_width and q_width % dim == 0 and not hasattr(module, "q_a_proj"):
        heads = q_width // dim
    groups = getattr(module, "num_key_value_groups", None)
    kv = first_int(module, "num_key_value_heads", "num_kv_heads") or first_int(config, "num_key_value_heads")
    if isinstance(groups, int) and groups > 0 and heads:
        kv = heads // groups
    k_width = _out_features(projection_layer(module, KEY))
    if dim and k_width and k_width % dim == 0 and not hasattr(module, "q_a_proj"):
        kv = k_width // dim
    return heads, kv or heads, dim
