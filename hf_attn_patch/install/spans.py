"""Swapping the layers of an empty KV cache for spans per KV head, as the active patches allow."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..cache import SpanLayer, convertible, first_real, real_with_holes
from ..errors import CacheError
from ..forward.needs.base import Given, Need, needs_of
from ..forward.needs.prompt import SAY_IT
from ..forward.running import Running
from .stack import SitePatch, running_stack, stacks_of

if TYPE_CHECKING:
    from .state import State


@dataclass(frozen=True, eq=False)
class SpanCache(Need):
    """KV cache layers with a span per KV head, for the patches of `state` that free what they never read again."""

    says: ClassVar[str] = "KV cache layers with a span per KV head"
    order: ClassVar[int] = 8
    carried: ClassVar[bool] = False
    in_pieces: ClassVar[bool] = True

    state: State

    def prepares(self, running: Running, given: Given) -> None:
        """Make the cache that the model would make, so that its layers can be swapped before they are filled."""
        if not given.has_cache or given.get("past_key_values") is not None or not _makes_cache(given):
            return
        from transformers import DynamicCache

        given.replace("past_key_values", DynamicCache(config=given.module.config))

    def begins(self, running: Running, given: Given) -> None:
        cache = given.get("past_key_values")
        if not given.has_cache or cache is None:
            return
        key = (
            tuple(e.enabled for e in self.state.entries),
            running.first_prompt,
            id(running.override) if running.override else 0,
        )
        memory = running.memory
        if running.seen and "spans noted" not in memory:
            memory["spans noted"] = True
            self._note(cache)
        fresh = given.ids if isinstance(given.ids, Tensor) else given.get("inputs_embeds")
        token = (
            isinstance(fresh, Tensor) and fresh.shape[1] == 1
        )  # more may bring padding between the tokens of a row
        if running.seen and token and memory.get("spans") == key and not memory.get("spans waiting"):
            return  # nothing that spans depend on has changed since the last token
        wanted = self.wanted(running)
        if wanted:
            memory["spans waiting"] = self._convert(cache, wanted, running, given.get("attention_mask"))
        memory["spans"] = key

    def wanted(self, running: Running) -> dict[int, list[tuple[int, int]]]:
        """Cache layer -> (sinks, window) per KV head, from the enabled patches."""
        found: dict[int, list[tuple[int, int]]] = {}
        model = running.context.model
        paths = [p for e in self.state.entries if e.enabled and e.cache == "auto" for p in e.paths]
        for path in dict.fromkeys(paths):
            module = model.get_submodule(path)
            layer = getattr(module, "layer_idx", None)
            if not isinstance(layer, int):
                continue
            for patch in running_stack(module).site_patches():
                if not (patch.entry.enabled and patch.entry.cache == "auto" and patch.facts["causal"]):
                    continue
                spans = spans_of(patch, running)
                if spans is not None:
                    found[layer] = tighter(found.get(layer), spans)
        return {k: v for k, v in found.items() if any(window for _, window in v)}

    def _convert(
        self, cache: Any, wanted: dict[int, list[tuple[int, int]]], running: Running, attention_mask: Any
    ) -> bool:
        """Swap layers; returns whether a row has seen nothing but padding, so that its sinks may still move."""
        seen = int(cache.get_seq_length())
        inner, problem = convertible(cache, list(wanted))
        if problem is not None:
            self.state.cache_note = f"cache kept as it is: {problem}"
            return False
        start: Tensor | None = None
        real = real_with_holes(attention_mask)
        waiting = False
        for layer, spans in wanted.items():
            current = inner.layers[layer]
            if isinstance(current, SpanLayer):
                if seen and current.spans != spans:
                    raise _other_spans(cache, current, running)
                if not seen:
                    inner.layers[layer] = current = SpanLayer(spans, wait=True)
            elif type(current) is not DynamicLayer:
                self.state.cache_note = f"{type(current).__name__} layers kept as they are"
                continue
            elif seen:
                raise refuse_filled(cache, type(current).__name__)
            else:
                inner.layers[layer] = current = SpanLayer(spans, wait=True)
            if current.waiting:
                start = first_real(attention_mask) if start is None else start
                if start is not None:  # an inner model may get no mask; the outer one has told already
                    current.set_start(start)
                waiting = True
        if real is not None:
            for layer in wanted:
                if isinstance(current := inner.layers[layer], SpanLayer):
                    current.set_real(real)
        return waiting or real is not None

    def _note(self, cache: Any) -> None:
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
        whole = {layer.kept_whole for layer in layers if isinstance(layer, SpanLayer) and layer.kept_whole}
        if whole:
            self.state.cache_note = (
                f"nothing is freed in layers whose cache is their own: {'; '.join(sorted(whole))}"
            )


def _makes_cache(given: Given) -> bool:
    """Whether the forward of this very model makes a `DynamicCache` by itself (and no cache of a kind of its own)."""
    config = given.module.config
    code = getattr(inspect.unwrap(type(given.module).forward), "__code__", None)
    if code is None or "DynamicCache" not in code.co_names:
        return False
    use = given.get("use_cache")
    if use is None:
        use = getattr(config.get_text_config(), "use_cache", False)
    return bool(use) and not given.module.training and not getattr(config, "is_encoder_decoder", False)


def refuse_filled(cache: Any, kind: str) -> CacheError:
    """Error for a cache that holds tokens from before the patch."""
    return CacheError(
        f"the cache already holds {cache.get_seq_length()} tokens in {kind} layers that were filled without this "
        "patch. Start with a fresh cache; or patch with cache='keep', which reads only the patch's keys but frees "
        "no memory and accepts any cache"
    )


def _other_spans(cache: Any, layer: SpanLayer, running: Running) -> CacheError:
    if running.memory.parts > 1:
        return CacheError(
            f"the prompt came in parts ({cache.get_seq_length()} tokens before this one), the spans of this patch grow "
            f"with its length, and what earlier parts dropped cannot come back. {SAY_IT}"
        )
    return refuse_filled(cache, repr(layer))


def spans_of(patch: SitePatch, context: Running | None) -> list[tuple[int, int]] | None:
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
    """Hooks for what the active entries need."""
    needs: dict[Need, list[str]] = {}
    paths: list[str] = []
    freeing: list[str] = []
    for entry in state.entries:
        for path in entry.paths:
            configs = [c for _, c in _patch_of(model, path, entry.key).variants]
            for need in dict.fromkeys(need for config in configs for need in needs_of(config)):
                needs.setdefault(need, []).append(path)
            paths.append(path)
        if entry.config.frees_cache and entry.cache == "auto":
            freeing += entry.paths
    if freeing:
        needs[SpanCache(state)] = list(dict.fromkeys(freeing))
    state.context.remove()
    if paths:
        needs = {need: list(dict.fromkeys(where)) for need, where in needs.items()}
        state.context.install(needs, list(dict.fromkeys(paths)), PatchesAt(model))


def _patch_of(model: nn.Module, path: str, key: str) -> SitePatch:
    return next(s.patches[key] for s in stacks_of(model.get_submodule(path)) if key in s.patches)  # type: ignore[return-value]


class PatchesAt:
    """path -> patches of the stack that runs there (a class so that deepcopy carries its model along)."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, path: str) -> list[SitePatch]:
        module = self.model.get_submodule(path)
        return running_stack(module).site_patches() if stacks_of(module) else []
