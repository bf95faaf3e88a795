"""Swapping the layers of an empty KV cache for spans per KV head, as the active patches allow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..cache import SpanLayer, convertible, first_real
from ..forward.context import Context, refuse_filled
from .stack import SitePatch, stacks_of
from .state import State


class _Spans:
    """Swaps the layers of an empty KV cache for per-KV-head spans (a class so that deepcopy carries it along)."""

    def __init__(self, state: State, model: nn.Module):
        self.state, self.model = state, model

    def wanted(self, context: Context) -> dict[int, list[tuple[int, int]]]:
        """Cache layer -> (sinks, window) per KV head, from the enabled patches."""
        found: dict[int, list[tuple[int, int]]] = {}
        paths = [p for e in self.state.entries if e.enabled and e.cache == "auto" for p in e.paths]
        for path in dict.fromkeys(paths):
            module = self.model.get_submodule(path)
            layer = getattr(module, "layer_idx", None)
            stack = stacks_of(module)[0]
            if not isinstance(layer, int):
                continue
            for patch in stack.site_patches():
                if not (patch.entry.enabled and patch.entry.cache == "auto" and patch.facts["causal"]):
                    continue
                spans = spans_of(patch, context)
                if spans is None:
                    continue
                found[layer] = tighter(found.get(layer), spans)
        return {k: v for k, v in found.items() if any(window for _, window in v)}

    def __call__(self, cache: Any, context: Context, attention_mask: Any) -> None:
        wanted = self.wanted(context)
        if not wanted:
            return
        seen = int(cache.get_seq_length())
        inner, problem = convertible(cache, list(wanted))
        if problem is not None:
            self.state.cache_note = f"cache kept as it is: {problem}"
            return
        start: Tensor | None = None
        for layer, spans in wanted.items():
            current = inner.layers[layer]
            if isinstance(current, SpanLayer):
                if seen and current.spans != spans:
                    raise refuse_filled(cache, repr(current))
                if not seen:
                    inner.layers[layer] = current = SpanLayer(spans)
            elif type(current) is not DynamicLayer:
                self.state.cache_note = f"{type(current).__name__} layers kept as they are"
                continue
            elif seen:
                raise refuse_filled(cache, type(current).__name__)
            else:
                inner.layers[layer] = current = SpanLayer(spans)
            if current.waiting:
                start = first_real(attention_mask) if start is None else start
                if start is not None:  # an inner model may get no mask; the outer one has told already
                    current.set_start(start)


def spans_of(patch: SitePatch, context: Context | None) -> list[tuple[int, int]] | None:
    """(sinks, window) per KV head that all variants of a site patch need; window 0 keeps everything."""
    heads, kv = patch.facts["num_heads"], patch.facts["num_kv_heads"]
    if not heads or not kv:
        return None
    group = heads // kv
    need: list[list[tuple[int, int]]] = [[] for _ in range(kv)]
    covered = [0] * heads
    for chosen, config in patch.variants:
        spans = config.spans(patch.facts, context)
        for head in range(heads) if chosen is None else chosen:
            covered[head] += 1
            need[head // group].append((0, 0) if spans is None else spans[head // group])
    merged = []
    for index, spans in enumerate(need):
        whole = all(covered[index * group : (index + 1) * group]) and all(w for _, w in spans)
        merged.append((max(s for s, _ in spans), max(w for _, w in spans)) if whole else (0, 0))
    return merged


def tighter(a: list[tuple[int, int]] | None, b: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Two patches on one layer: both must see a key, so the smaller span per head is enough."""
    if a is None:
        return b
    size = lambda s: sum(s) if s[1] else float("inf")
    return [min(x, y, key=size) for x, y in zip(a, b)]


def reinstall_hooks(state: State, model: nn.Module) -> None:
    """Hooks for what the active entries need, and nothing when they need nothing."""
    needs: set[str] = set()
    paths: list[str] = []
    for entry in state.entries:
        wants = set(entry.config.needs)
        if entry.config.frees_cache and entry.cache == "auto":
            wants.add("cache")
        needs |= wants
        if wants:
            paths += [p for p in entry.paths if p not in paths]
    state.context.remove()
    if needs:
        state.context.install(model, needs, paths, _Spans(state, model))
