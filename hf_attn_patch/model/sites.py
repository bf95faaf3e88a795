"""`Site`: one attention module of a model, found by inspection and never by the model's name.

A module is a site when its own ``forward`` looks up ``ALL_ATTENTION_FUNCTIONS``, the dispatch point of transformers.
Everything else (`parts`, `heads`, `mesh`) is read from the module and its config; what inspection gets wrong
for an unusual class can be corrected with an entry in ``data/site_facts.json`` or `register_site_facts`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from torch import nn

from ..errors import ModelMismatchError
from .heads import HeadSlice, count_heads, projections
from .mesh import head_slice, is_fully_sharded
from .parts import PARTS, Parts, is_merged
from .wrappers import base_model

__all__ = ["PARTS", "Site", "base_model", "find_sites", "register_site_facts"]


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
        merged: keys are the layer's own tokens followed by an encoder's, so a key has no position in one sequence.
        slice: the heads that this rank computes under tensor parallelism (None = all). Counts above are the model's.
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
    merged: bool = False
    slice: HeadSlice | None = None
    projections: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def group_size(self) -> int | None:
        """G = H / Hkv query heads per KV head."""
        if self.num_heads is None or self.num_kv_heads is None:
            return None
        return self.num_heads // self.num_kv_heads

    def local(self) -> Site:
        """The site as its attention function sees it: with the heads of this rank only."""
        if self.slice is None:
            return self
        heads, kv_heads = self.slice.stop - self.slice.start, self.slice.kv_stop - self.slice.kv_start
        return replace(self, num_heads=heads, num_kv_heads=kv_heads, slice=None)

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    def __str__(self) -> str:
        heads = f"{self.num_heads or '?'} heads" + (
            f" / {self.num_kv_heads} KV" if self.num_kv_heads not in (None, self.num_heads) else ""
        )
        heads += f", {self.slice.start}-{self.slice.stop - 1} here" if self.slice else ""
        kind = "causal" if self.causal else "merged with an encoder's" if self.merged else "bidirectional"
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


def _iterate(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if is_site(module):
            yield path, module


_surveyed: ContextVar[tuple[nn.Module, list[Site]] | None] = ContextVar("hf_attn_patch_sites", default=None)


@contextmanager
def handed_down(base: nn.Module, sites: list[Site]) -> Iterator[None]:
    """Inside, `find_sites` of `base` gives `sites`: one public call walks a model once."""
    token = _surveyed.set((base, sites))
    try:
        yield
    finally:
        _surveyed.reset(token)


def find_sites(model: Any) -> list[Site]:
    """All attention sites of `model`, in module order.

    Args:
        model: a transformers model, or a wrapper (PEFT, DDP, a pipeline) that contains one.

    Raises:
        ModelMismatchError: no transformers model, or several that are independent of each other. A model whose
            attention does not use the attention interface gives an empty list here; `hap.patch` says which classes were
            found instead.
    """
    base = base_model(model)
    known = _surveyed.get()
    return list(known[1]) if known is not None and known[0] is base else read_sites(base)


def read_sites(model: Any) -> list[Site]:
    """`find_sites` of a transformers model, read anew."""
    found = list(_iterate(model))
    if not found:
        return []
    parts = Parts(model)
    sharded = any(is_fully_sharded(m) for m in model.modules())
    return _renumber([_read_site(model, path, module, parts, sharded) for path, module in found])


def _read_site(model: Any, path: str, module: nn.Module, parts: Parts, sharded: bool) -> Site:
    facts = {k: _follow(module, v) for k, v in _site_facts().get(type(module).__name__, {}).items()}
    part, names = parts.of(path, module)
    if "part" in facts:
        part, names = facts["part"], frozenset({facts["part"]})
    heads, kv, dim = count_heads(module, getattr(module, "config", None) or model.config)
    heads, kv = facts.get("num_heads", heads), facts.get("num_kv_heads", kv)
    dim = facts.get("head_dim", dim)
    here, unknown = head_slice(model, path, module, heads, kv, dim, sharded)
    causal = getattr(module, "is_causal", None)
    if causal is None:
        causal = bool(getattr(module, "is_decoder", False))
    window = getattr(module, "sliding_window", None)
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", "." + path)]
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        layer = numbers[-1] if numbers else 0
    return Site(
        path=path,
        module=module,
        layer=layer,
        part=part,
        parts=names,
        causal=bool(facts.get("causal", causal)) and "cross" not in names,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=dim,
        window=facts.get("window", window if isinstance(window, int) else None),
        refused=facts.get("refuse") or unknown,
        merged=is_merged(module),
        slice=here,
        projections=projections(module),
    )


def _renumber(sites: list[Site]) -> list[Site]:
    """Stages and blocks (Swin) repeat their numbers: count layers of a part instead when numbers collide."""
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
