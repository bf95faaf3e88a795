"""`Site`: one attention module of a model, found by inspection and never by the model's name.

A module is a site when its own ``forward`` looks up ``ALL_ATTENTION_FUNCTIONS``, the dispatch point of transformers.
Everything else (part, heads, projections) is read from the module and its config; what inspection gets wrong
for an unusual class can be corrected with an entry in ``data/site_facts.json`` or `register_site_facts`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from torch import nn

from ..errors import ModelMismatchError

PARTS = ("text", "vision", "audio", "encoder", "decoder", "cross")

_QUERY = ("q_proj", "query", "q", "wq", "to_q", "query_proj", "q_lin", "q_a_proj")
_KEY = ("k_proj", "key", "k", "wk", "to_k", "key_proj", "k_lin")
_VALUE = ("v_proj", "value", "v", "wv", "to_v", "value_proj", "v_lin")
_FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj", "kv_proj")
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "proj", "o", "wo", "out", "Wo", "out_lin", "projection")


@dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        path: dotted path below the transformers model. module: the attention module.
        layer: index of its layer within its part. part: what it attends over (see `parts`).
        parts: every part name that selects it, e.g. {"encoder", "audio"} for Whisper's encoder.
        causal: True if queries never see later keys. num_heads, num_kv_heads: H, Hkv (None = not inspectable).
        head_dim: D of queries and keys. window: sliding window of the model itself, in keys.
        refused: why no method fits what this module computes, or None.
        projections: name of the query, key, value, output projection (or "fused") below the module.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    layer: int
    part: str
    parts: frozenset[str] = field(repr=False)
    causal: bool
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    window: int | None = None
    refused: str | None = None
    projections: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def group_size(self) -> int | None:
        """G = H / Hkv query heads per KV head."""
        if self.num_heads is None or self.num_kv_heads is None:
            return None
        return self.num_heads // self.num_kv_heads

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    def __str__(self) -> str:
        heads = f"{self.num_heads or '?'} heads" + (
            f" / {self.num_kv_heads} KV" if self.num_kv_heads not in (None, self.num_heads) else ""
        )
        kind = "causal" if self.causal else "bidirectional"
        window = f", window {self.window}" if self.window else ""
        return (
            f"{self.path} ({self.part} layer {self.layer}, {kind}, {heads} x {self.head_dim or '?'}{window})"
        )


def is_site(module: nn.Module) -> bool:
    """True if the module's own forward dispatches through ``ALL_ATTENTION_FUNCTIONS``."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def why_not_dispatchable(module: nn.Module) -> str | None:
    """Reason a site must not be routed through another attention implementation, or None.

    Some forwards compare the implementation's *name* with "sdpa" and compute something else under any other name
    (sparse indices that only a certain kernel reads, for example).
    """
    code = inspect.unwrap(type(module).forward).__code__
    constants = {
        c for const in code.co_consts for c in (const if isinstance(const, tuple) else (const,)) if c
    }
    if "_attn_implementation" in code.co_names and "sdpa" in constants:
        return (
            f"{type(module).__name__} computes something else when its attention implementation is not called "
            "'sdpa' or 'eager'"
        )
    return None


def base_model(model: nn.Module) -> Any:
    """The transformers model inside `model` (PEFT and other wrappers are looked through).

    Raises:
        ModelMismatchError: `model` is not, and does not contain, a transformers model.
    """
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise ModelMismatchError(
        f"expected a transformers model (or a wrapper around one), got {type(model).__name__}; "
        "load one with AutoModel.from_pretrained and pass the object"
    )


@functools.lru_cache(maxsize=1)
def _site_facts() -> dict[str, dict[str, Any]]:
    text = resources.files("hf_attn_patch.model").joinpath("data/site_facts.json").read_text()
    return json.loads(text)


def register_site_facts(class_name: str, **facts: Any) -> None:
    """Correct inspection for attention modules of class `class_name`.

    Args:
        facts: any of part, causal, num_heads, num_kv_heads, head_dim, window; a string that starts with ``.``
            is an attribute path from the module, e.g. ``num_heads=".config.n_head"``. refuse: sentence that says why
            no method fits this module.
    """
    allowed = {"part", "causal", "num_heads", "num_kv_heads", "head_dim", "window", "refuse"}
    if unknown := set(facts) - allowed:
        raise ModelMismatchError(f"site facts {sorted(unknown)} are unknown; known: {sorted(allowed)}")
    _site_facts().setdefault(class_name, {}).update(facts)


def _follow(module: nn.Module, value: Any) -> Any:
    if isinstance(value, str) and value.startswith("."):
        found: Any = module
        for name in value[1:].split("."):
            found = getattr(found, name)
        return found
    return value


def _first(source: Any, *names: str) -> Any:
    """First integer attribute of `source` among `names`."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except Exception:  # configs with per-layer values refuse to name one value for all layers
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _projection(module: nn.Module, names: tuple[str, ...]) -> str | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return name
    return None


def _out_features(module: nn.Module, name: str | None) -> int | None:
    layer = getattr(module, name) if name else None
    layer = getattr(layer, "base_layer", layer)  # LoRA wraps the projection
    for attribute in ("out_features", "nf"):
        size = getattr(layer, attribute, None)
        if isinstance(size, int):
            return size
    return None


def _heads(module: nn.Module, config: Any) -> tuple[int | None, int | None, int | None]:
    """(H, Hkv, D) from the module, its projections and its config."""
    width = _first(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim")
    named = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
    heads = _first(module, *named) or _first(config, *named, "encoder_attention_heads")
    dim = _first(module, "head_dim", "attention_head_size", "key_value_proj_dim", "qk_head_dim")
    dim = dim or _first(config, "head_dim", "d_kv", "qk_head_dim")
    if dim is None and width and heads:
        dim = width // heads
    q_width = _out_features(module, _projection(module, _QUERY))
    if dim and q_width and q_width % dim == 0 and not hasattr(module, "q_a_proj"):
        heads = q_width // dim
    groups = getattr(module, "num_key_value_groups", None)
    kv = _first(module, "num_key_value_heads", "num_kv_heads") or _first(config, "num_key_value_heads")
    if isinstance(groups, int) and groups > 0 and heads:
        kv = heads // groups
    k_width = _out_features(module, _projection(module, _KEY))
    if dim and k_width and k_width % dim == 0 and not hasattr(module, "q_a_proj"):
        kv = k_width // dim
    return heads, kv or heads, dim


def _config_parts(config: Any) -> dict[int, str]:
    """Which part each (nested) sub-config describes, by identity of the config object."""
    found: dict[int, str] = {}

    def visit(config: Any, inherited: str | None) -> None:
        for key in getattr(config, "sub_configs", {}) or {}:
            child = getattr(config, key, None)
            if child is None or isinstance(child, dict):
                continue
            part = next((p for p in ("vision", "audio", "text") if p in key), None)
            part = part or ("audio" if "speech" in key else None) or inherited
            if part:
                found.setdefault(id(child), part)
            visit(child, part)

    visit(config, None)
    return found


def _modality(model: nn.Module) -> str:
    name = getattr(model, "main_input_name", "input_ids")
    name = name if isinstance(name, str) else (name or ["input_ids"])[0]
    if name.startswith("pixel"):
        return "vision"
    return "audio" if name in ("input_features", "input_values", "audio_values") else "text"


def _parts_of(
    path: str, module: nn.Module, model: nn.Module, by_config: dict[int, str]
) -> tuple[str, frozenset]:
    config = getattr(module, "config", None)
    names = path.lower().split(".")
    modality = by_config.get(id(config))
    if modality is None:
        hints = (
            ("vision", ("vision", "visual", "image")),
            ("audio", ("audio", "speech")),
            ("text", ("text", "language")),
        )
        modality = next((p for p, words in hints if any(w in n for n in names for w in words)), None)
        modality = modality or _modality(model)
    parts = {modality}
    primary = modality
    is_cross = bool(getattr(module, "is_cross_attention", False)) or any(
        "cross" in n or n in ("encoder_attn", "encdecattention") for n in names
    )
    if getattr(model.config, "is_encoder_decoder", False) and by_config.get(id(config)) is None:
        side = "decoder" if "decoder" in names else "encoder" if "encoder" in names else None
        if side:
            primary = side
            parts = {side, "text" if side == "decoder" else modality}
    if is_cross:
        primary = "cross"
        parts = {"cross"}
    return primary, frozenset(parts)


def _iterate(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if is_site(module):
            yield path, module


def find_sites(model: nn.Module) -> list[Site]:
    """All attention sites of `model`, in module order.

    Args:
        model: a transformers model, or a wrapper (PEFT) that contains one.

    Raises:
        ModelMismatchError: not a transformers model. A model whose attention does not use the attention
            interface gives an empty list here; `hap.patch` says which classes were found instead.
    """
    model = base_model(model)
    by_config = _config_parts(model.config)
    sites: list[Site] = []
    for path, module in _iterate(model):
        facts = {k: _follow(module, v) for k, v in _site_facts().get(type(module).__name__, {}).items()}
        config = getattr(module, "config", None) or model.config
        part, parts = _parts_of(path, module, model, by_config)
        if "part" in facts:
            part, parts = facts["part"], frozenset({facts["part"]})
        heads, kv, dim = _heads(module, config)
        causal = getattr(module, "is_causal", None)
        if causal is None:
            causal = bool(getattr(module, "is_decoder", False))
        window = getattr(module, "sliding_window", None)
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", "." + path)]
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            layer = numbers[-1] if numbers else 0
        kinds = (("query", _QUERY), ("key", _KEY), ("value", _VALUE), ("fused", _FUSED), ("out", _OUT))
        projections = tuple((kind, name) for kind, names in kinds if (name := _projection(module, names)))
        sites.append(
            Site(
                path=path,
                module=module,
                layer=layer,
                part=part,
                parts=parts,
                causal=bool(facts.get("causal", causal)) and part != "cross",
                num_heads=facts.get("num_heads", heads),
                num_kv_heads=facts.get("num_kv_heads", kv),
                head_dim=facts.get("head_dim", dim),
                window=facts.get("window", window if isinstance(window, int) else None),
                refused=facts.get("refuse"),
                projections=projections,
            )
        )
    return _renumber(sites)


def _renumber(sites: list[Site]) -> list[Site]:
    """Stages and blocks (Swin) repeat their numbers: count layers of a part instead when numbers collide."""
    from dataclasses import replace

    out: dict[str, list[Site]] = {}
    for site in sites:
        out.setdefault(site.part, []).append(site)
    renumbered = {}
    for part in out.values():
        clash = len({s.layer for s in part}) < len(part)
        for count, site in enumerate(part):
            renumbered[site.path] = replace(site, layer=count) if clash else site
    return [renumbered[site.path] for site in sites]


def attention_classes(model: nn.Module) -> list[str]:
    """Class names of modules that look like attention but have no dispatch (for error messages)."""
    names = {
        type(m).__name__
        for m in base_model(model).modules()
        if "attention" in type(m).__name__.lower() and not is_site(m)
    }
    return sorted(names)


def left_alone(model: nn.Module) -> list[str]:
    """Attention that stays as it is, as ``path (class)``: modules with weights that are called attention, have no
    dispatch, and neither contain a site nor sit in one (the pooling head of SigLIP)."""
    base = base_model(model)
    inside = tuple(f"{path}." for path, _ in _iterate(base))
    found: list[str] = []
    for path, module in base.named_modules():
        if "attention" not in type(module).__name__.lower() or next(module.parameters(), None) is None:
            continue
        if f"{path}.".startswith((*inside, *(f"{one.split(' ')[0]}." for one in found))):
            continue
        if not any(is_site(m) for m in module.modules()):
            found.append(f"{path} ({type(module).__name__})")
    return found


def layer_module(model: nn.Module, path: str) -> nn.Module:
    """The layer a site belongs to: its nearest ancestor that sits in an ``nn.ModuleList``, else its parent."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        if names[end - 1].isdigit():
            return model.get_submodule(".".join(names[:end]))
    return model.get_submodule(".".join(names[:-1]))
