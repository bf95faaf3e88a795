"""The public calls: `patch`, `patched`, `unpatch`, `load`, `active`, `plan`, `prompt`.

Everything is checked before the first change; if something fails half-way, the model is put back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import cache as cache_layers
from . import dispatch, registry, selection
from .context import Context, copy_with_model, refuse_filled
from .dispatch import PatchStack, SitePatch
from .errors import CompositionError, ConfigError, ModelMismatchError, PatchError, SelectionError
from .kernels import check_impl, prepare, unavailable
from .reporting import PatchReport, build_report
from .selection import Selector
from .sites import PARTS, Site, attention_classes, base_model, find_sites, left_alone, why_not_dispatchable

STATE = "_attn_patch_state"
CACHE_POLICIES = ("auto", "keep")


@dataclass(eq=False)  # two equal calls are still two calls
class Entry:
    """One active `patch()` call on a model."""

    key: str
    config: registry.Patch
    part: str | None
    layers: Any
    heads: Any
    impl: str
    cache: str
    paths: list[str]
    model: Any = field(repr=False)
    enabled: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return copy_with_model(self, memo)


class State:
    """What `patch()` keeps on a transformers model: active entries, previous configs, context and its hooks."""

    def __init__(self, model: nn.Module):
        self.entries: list[Entry] = []
        self.snapshot: list[tuple[Any, str | None]] = []
        self.context = Context(model)
        self.cache_note = ""

    def reinstall_hooks(self, model: nn.Module) -> None:
        """Hooks for what the active entries need, and nothing when they need nothing."""
        needs: set[str] = set()
        paths: list[str] = []
        for entry in self.entries:
            wants = set(entry.config.needs)
            if entry.config.frees_cache and entry.cache == "auto":
                wants.add("cache")
            needs |= wants
            if wants:
                paths += [p for p in entry.paths if p not in paths]
        self.context.remove()
        if needs:
            self.context.install(model, needs, paths, _Spans(self, model))


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
            stack = dispatch.stacks_of(module)[0]
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
        inner, problem = cache_layers.convertible(cache, list(wanted))
        if problem is not None:
            self.state.cache_note = f"cache kept as it is: {problem}"
            return
        start: Tensor | None = None
        for layer, spans in wanted.items():
            current = inner.layers[layer]
            if isinstance(current, cache_layers.SpanLayer):
                if seen and current.spans != spans:
                    raise refuse_filled(cache, repr(current))
                if not seen:
                    inner.layers[layer] = current = cache_layers.SpanLayer(spans)
            elif type(current) is not cache_layers.DynamicLayer:
                self.state.cache_note = f"{type(current).__name__} layers kept as they are"
                continue
            elif seen:
                raise refuse_filled(cache, type(current).__name__)
            else:
                inner.layers[layer] = current = cache_layers.SpanLayer(spans)
            if current.waiting:
                start = cache_layers.first_real(attention_mask) if start is None else start
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


class PatchHandle:
    """One `patch()` call on a model: undo it, switch it off for a while, report, save.

    Attributes:
        config: the options. sites: the `Site`s it changed. model: the model it was called with.
    """

    def __init__(self, model: nn.Module, entry: Entry):
        self.model = model
        self._entry = entry

    @property
    def name(self) -> str:
        return self._entry.config.name

    @property
    def config(self) -> registry.Patch:
        return self._entry.config

    @property
    def sites(self) -> list[Site]:
        paths = set(self._entry.paths)
        return [s for s in find_sites(self.model) if s.path in paths]

    @property
    def is_active(self) -> bool:
        """False after `remove`."""
        state = get_state(self.model)
        return state is not None and self._entry in state.entries

    def remove(self) -> None:
        """Undo: afterwards the model computes, saves and prints as before. A second call does nothing.

        Raises:
            CompositionError: a later patch is still active on the model; undo goes in reverse order.
        """
        if self.is_active:
            _remove(self.model, self._entry)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this patch inside the ``with`` block (for dense-against-patched comparisons)."""
        self._require_active("disabled()")
        before = self._entry.enabled
        self._entry.enabled = False
        try:
            yield
        finally:
            self._entry.enabled = before

    def report(self) -> PatchReport:
        """What is patched where, which executor ran the last call and why, and how dense each site is."""
        self._require_active("report()")
        state = get_state(self.model)
        return build_report(self, state.cache_note if state else "")

    def save(self, directory: str | Path) -> Path:
        """Write ``attn_patch_config.json`` (and ``attn_patch.safetensors`` if there are tensors) to a folder."""
        from .persistence import save

        self._require_active("save()")
        return save(self, directory)

    def _require_active(self, what: str) -> None:
        if not self.is_active:
            raise PatchError(f"{what} on a removed {self.name} patch; call hap.patch again")

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        if not self.is_active:
            return f"<removed patch {self.name}>"
        layers = sorted({s.layer for s in self.sites})
        state = "" if self._entry.enabled else ", disabled"
        return (
            f"<patch {self.config} on {len(self._entry.paths)} sites of {type(base_model(self.model)).__name__}, "
            f"layers {_ranges(layers)}, impl={self._entry.impl}{state}>"
        )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


@dataclass
class Plan:
    """What `patch` would do: made before anything changes, printed by ``hf-attn-patch plan``.

    sites: the sites that would change, with the config each would get. warnings: things worth knowing. left_alone:
    attention modules that no patch can reach, and that stay as they are.
    """

    config: registry.Patch
    model: str
    part: str | None
    impl: str
    cache: str
    sites: list[Site]
    variants: list[list[tuple[tuple[int, ...] | None, registry.Patch]]]
    untouched: int
    warnings: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "method": self.config.name,
            "config": self.config.to_dict(),
            "model": self.model,
            "part": self.part,
            "impl": self.impl,
            "cache": self.cache,
            "sites": [
                {"path": s.path, "part": s.part, "layer": s.layer, "heads": s.num_heads, "kv_heads": s.num_kv_heads,
                 "variants": [{"heads": None if h is None else list(h), "config": c.to_dict()} for h, c in v]}
                for s, v in zip(self.sites, self.variants)
            ],
            "untouched_sites": self.untouched,
            "warnings": self.warnings,
            "left_alone": self.left_alone,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.config} on {self.model}: {len(self.sites)} sites change, {self.untouched} stay"]
        for site, variants in zip(self.sites, self.variants):
            note = (
                "" if len(variants) == 1 and variants[0][0] is None else f"  [{len(variants)} head variants]"
            )
            own = "" if variants[0][1] == self.config else f"  {variants[0][1]}"
            lines.append(f"  {site}{note}{own}")
        lines += [f"  warning: {w}" for w in self.warnings]
        lines += [f"  left alone: {w}, which has no dispatch" for w in self.left_alone]
        return "\n".join(lines)


def get_state(model: nn.Module) -> State | None:
    """The patch state of the transformers model inside `model`, or None."""
    return base_model(model).__dict__.get(STATE)


def _choose_sites(
    model: nn.Module, config: registry.Patch, part: str | None
) -> tuple[list[Site], list[Site]]:
    """(chosen, all) sites for a part.

    Raises:
        ModelMismatchError: the model has no site, or none of that part.
    """
    everything = find_sites(model)
    if not everything:
        classes = attention_classes(model)
        raise ModelMismatchError(
            f"{type(model).__name__} has no attention site: its attention ({', '.join(classes) or 'none found'}) does "
            "not use transformers' attention interface, so there is nothing a patch could hook into"
            + (f". {config.name}: {config.without_site}" if config.without_site else "")
        )
    if part is not None and part not in PARTS:
        raise SelectionError(f"part={part!r} is unknown; parts are {', '.join(PARTS)}")
    have = sorted({p for s in everything for p in s.parts})
    wanted = part if part is not None else config.default_part
    if wanted is not None and part is None and wanted not in have:
        wanted = None  # a bare ViT has no "text"; take what the method allows
    if wanted is not None and part is not None and wanted not in config.parts:
        raise ModelMismatchError(
            f"{config.name} is not defined for part={part!r}; parts: {', '.join(config.parts)}"
        )
    chosen = [
        s
        for s in everything
        if (wanted is None or wanted in s.parts) and s.parts & set(config.parts)
        and ("cross" in config.parts or s.part != "cross")
        and not (config.causal_only and not s.causal and part is None)
    ]  # fmt: skip
    if not chosen:
        raise ModelMismatchError(
            f"{type(model).__name__} has no site for {config.name} (part={part or config.default_part!r}); "
            f"parts of this model: {', '.join(have)}; {config.name} works on: {', '.join(config.parts)}"
        )
    return chosen, everything


def _variants(
    config: registry.Patch, site: Site, layers: Selector, heads: Selector, count: int
) -> list[tuple[tuple[int, ...] | None, registry.Patch]]:
    """The config(s) of one site, with layer and head overrides applied."""
    own = registry.build(config, selection.overrides(layers, site.layer, count, "layer"))
    if heads is None:
        return [(None, own)]
    if not config.head_selectable:
        raise SelectionError(
            f"{config.name} cannot be limited to heads: it chooses them itself (see its options)"
        )
    if not site.num_heads:
        raise SelectionError(
            f"the number of heads of {site.path} is unknown; see hap.sites.register_site_facts"
        )
    chosen = selection.indices(heads, site.num_heads, "query head")
    if not chosen:
        raise SelectionError(
            f"heads={heads!r} selects no query head of {site.path}; there are {site.num_heads}, numbered 0 to "
            f"{site.num_heads - 1}"
        )
    grouped: dict[str, tuple[list[int], registry.Patch]] = {}
    for head in chosen:
        special = registry.build(own, selection.overrides(heads, head, site.num_heads, "query head"))
        grouped.setdefault(repr(special.to_dict()), ([], special))[0].append(head)
    return [(tuple(members), special) for members, special in grouped.values()]


def _check_composition(state: State | None, config: registry.Patch, paths: list[str], impl: str) -> None:
    for entry in state.entries if state else []:
        shared = sorted(set(entry.paths) & set(paths))
        if not shared:
            continue
        clash = sorted(entry.config.exclusive & config.exclusive)
        if clash:
            raise CompositionError(
                f"{config.name} cannot be combined with {entry.config.name} on {shared[0]} (and {len(shared) - 1} more "
                f"sites): both set the {', '.join(clash)} of the attention call. Remove {entry.config.name} first, or "
                "give them different layers"
            )
        if "auto" not in (impl, entry.impl) and impl != entry.impl:
            raise CompositionError(
                f"{config.name} asks for impl={impl!r}, but {entry.config.name} on the same sites for {entry.impl!r}; "
                "one attention call runs on one executor"
            )


def plan(
    model: nn.Module,
    name_or_config: str | registry.Patch,
    *,
    part: str | None = None,
    layers: Selector = None,
    heads: Selector = None,
    impl: str = "auto",
    cache: str = "auto",
    **options: Any,
) -> Plan:
    """Check everything `patch` would check and say what it would do, without changing anything.

    Args and errors are those of `patch`.
    """
    config = registry.build(name_or_config, options)
    layers, heads = selection.settled(layers), selection.settled(heads)
    try:
        check_impl(impl)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cache not in CACHE_POLICIES:
        raise ConfigError(f"cache={cache!r} is unknown; choose one of {', '.join(CACHE_POLICIES)}")
    base = base_model(model)
    candidates, everything = _choose_sites(base, config, part)
    count = max(s.layer for s in candidates) + 1
    wanted = set(selection.indices(layers, count, f"{part or candidates[0].part} layer"))
    chosen = [s for s in candidates if s.layer in wanted]
    if not chosen:
        raise SelectionError(
            f"layers={layers!r} selects no layer; there are {count}, numbered 0 to {count - 1}"
        )
    variants = [_variants(config, site, layers, heads, count) for site in chosen]
    for site, kinds in zip(chosen, variants):
        if (reason := site.refused or why_not_dispatchable(site.module)) is not None:
            fit = [s.layer for s in candidates if not (s.refused or why_not_dispatchable(s.module))]
            raise ModelMismatchError(
                f"{config.name}: {site.path} cannot be patched: {reason}"
                + (f". Choose other layers: layers={fit}" if fit else "")
            )
        if config.causal_only and not site.causal:
            raise ModelMismatchError(f"{config.name} needs causal attention, {site.path} is bidirectional")
        for _, special in kinds:
            special.check(site)
    devices = {p.device for site in chosen for p in site.module.parameters()}
    for device in devices:
        prepare(device)
        if impl != "auto" and device.type != "meta" and (reason := unavailable(impl, device)) is not None:
            raise ModelMismatchError(
                f"{config.name}: impl={impl!r} cannot run on this model: {reason}. Use impl='auto', which says in "
                "handle.report() what it chose and why"
            )
    different = {repr(special.to_dict()): special for kinds in variants for _, special in kinds}
    notes = [note for special in different.values() for note in special.check_model(base, chosen)]
    watched = [s for s in config.watches(base) if s.path not in {c.path for c in chosen}]
    chosen, variants = chosen + watched, variants + [[(None, config)] for _ in watched]
    state = get_state(base)
    for site in everything:
        for stack in dispatch.stacks_of(site.module):
            if stack.context is not None and (state is None or stack.context is not state.context):
                raise CompositionError(
                    f"{site.path} is patched already, through another model object inside or around this "
                    f"{type(base).__name__}. Patch and undo through one object"
                )
    _check_composition(state, config, [s.path for s in chosen], impl)
    return Plan(
        config=config,
        model=type(base).__name__,
        part=part
        or (config.default_part if any(config.default_part in s.parts for s in everything) else None),
        impl=impl,
        cache=cache,
        sites=chosen,
        variants=variants,
        untouched=len(everything) - len(chosen),
        warnings=list(dict.fromkeys(notes)),
        left_alone=left_alone(base),
    )


def patch(
    model: nn.Module,
    name_or_config: str | registry.Patch,
    *,
    part: str | None = None,
    layers: Selector = None,
    heads: Selector = None,
    impl: str = "auto",
    cache: str = "auto",
    **options: Any,
) -> PatchHandle:
    """Change how a loaded model attends.

    Args:
        model: a transformers model, or a wrapper (PEFT) around one. It is changed in place.
        name_or_config: a method name (see `available`) or a config object.
        part: "text", "vision", "audio", "encoder", "decoder" or "cross"; None = where the method belongs.
        layers: layers within the part: ints, slices, "0-3,-2:" or a mapping from such a pattern to option overrides.
        heads: query heads, in the same notation.
        impl: executor: "auto", or "reference", "torch", "triton" (forced: raises instead of falling back).
        cache: "auto" frees the KV cache of what the method never reads again, "keep" leaves caches alone.
        options: fields of the method's config.

    Returns:
        A `PatchHandle`; also usable in a ``with`` statement.

    Raises:
        PatchError: one of its subclasses, before anything was changed (see `errors`).
    """
    layers, heads = selection.settled(layers), selection.settled(heads)
    made = plan(
        model, name_or_config, part=part, layers=layers, heads=heads, impl=impl, cache=cache, **options
    )
    for note in made.warnings:
        warnings.warn(f"{made.config.name}: {note}", stacklevel=2)
    return _apply(model, made, layers, heads)


def _apply(model: nn.Module, made: Plan, layers: Selector, heads: Selector) -> PatchHandle:
    base = base_model(model)
    known = get_state(base)
    fresh, state = known is None, known or State(base)
    names = {e.key for e in state.entries}
    key, number = made.config.name, 2
    while key in names or hasattr(nn.ModuleDict, key):  # a child called "clear" or "keys" would hide a method
        key, number = f"{made.config.name}_{number}", number + 1
    entry = Entry(
        key, made.config, made.part, selection.plain(layers), selection.plain(heads), made.impl, made.cache,
        [s.path for s in made.sites], base,
    )  # fmt: skip
    pieces = [SitePatch(site, entry, kinds) for site, kinds in zip(made.sites, made.variants)]
    try:
        base.__dict__[STATE] = state
        state.snapshot += dispatch.attach(base, made.sites, state.context)
        for site, piece in zip(made.sites, pieces):
            like = next(site.module.parameters(), None)
            if like is not None:
                piece.to(device=like.device)
            for number, stack in enumerate(dispatch.stacks_of(site.module)):
                stack.patches[key] = piece if number == 0 else copy.deepcopy(piece)
        state.entries.append(entry)
        state.reinstall_hooks(base)
    except BaseException:
        _drop(base, state, entry)
        if fresh:
            base.__dict__.pop(STATE, None)
        raise
    return PatchHandle(model, entry)


def _drop(base: nn.Module, state: State, entry: Entry) -> None:
    """Take one entry out; with the last one everything goes."""
    if entry in state.entries:
        state.entries.remove(entry)
    for module in base.modules():
        if isinstance(module, PatchStack) and entry.key in module.patches:
            del module.patches[entry.key]
    paths = {path for other in state.entries for path in other.paths}
    state.snapshot = dispatch.detach(base, state.snapshot, [s for s in find_sites(base) if s.path in paths])
    state.reinstall_hooks(base)
    if state.entries:
        return
    base.__dict__.pop(STATE, None)


def _remove(model: nn.Module, entry: Entry) -> None:
    base = base_model(model)
    state = get_state(base)
    assert state is not None
    if state.entries[-1] is not entry:
        later = [e.key for e in state.entries[state.entries.index(entry) + 1 :]]
        raise CompositionError(
            f"{entry.key} cannot be removed before {', '.join(reversed(later))}, patched on top of it. Remove in "
            "reverse order, or everything with hap.unpatch(model)"
        )
    _drop(base, state, entry)


def unpatch(model: nn.Module) -> int:
    """Remove every patch from `model`; returns how many there were (0 is fine)."""
    base = base_model(model)
    state = get_state(base)
    count = 0
    while state is not None and state.entries:
        _drop(base, state, state.entries[-1])
        count += 1
    return count


def active(model: nn.Module) -> list[PatchHandle]:
    """Handles of the patches on `model`, in order of `patch()` calls (works on copies of a patched model too)."""
    state = get_state(model)
    return [PatchHandle(model, entry) for entry in state.entries] if state else []


@contextmanager
def patched(model: nn.Module, name_or_config: str | registry.Patch, **options: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a ``with`` block, undone even if the block raises."""
    handle = patch(model, name_or_config, **options)
    try:
        yield handle
    finally:
        handle.remove()


def load(model: nn.Module, directory: str | Path, *, impl: str | None = None) -> PatchHandle:
    """Put a saved patch adapter on `model`.

    Args:
        directory: local folder, or a hub id. impl: overrides the saved executor choice.

    Raises:
        AdapterError: missing, corrupted, truncated or newer adapter. ModelMismatchError: made for another model.
    """
    from .persistence import load as load_adapter

    return load_adapter(model, directory, impl=impl)


@contextmanager
def prompt(
    model: nn.Module,
    *,
    length: int | None = None,
    image_keys: Tensor | None = None,
    marked: Any = None,
) -> Iterator[None]:
    """Tell the patches of `model` facts they cannot see in this forward.

    Args:
        length: tokens of the prompt, when prompt and answer are scored in one forward without a cache.
        image_keys: bool [B, S], True on image tokens, when the model is called with `inputs_embeds` only.
        marked: token ranges ``[[start, end], ...]`` for every row, or one such list per row (`pasta`), counted
            from the first real token of a row, end excluded.
    """
    state = get_state(model)
    if state is None:
        raise PatchError("hap.prompt needs a patched model; call hap.patch first")
    with state.context.prompt(length=length, image_keys=image_keys, marked=marked):
        yield
