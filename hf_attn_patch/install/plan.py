"""`plan`: everything `patch` checks, before anything changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .. import registry
from ..errors import CompositionError, ConfigError, ModelMismatchError, SelectionError
from ..kernels import check_impl, prepare, unavailable
from ..model import selection
from ..model.parts import PARTS
from ..model.selection import Selector
from ..model.sites import Site, why_not_dispatchable
from ..model.survey import Survey
from . import localize
from .found import state_on
from .stack import stacks_of
from .state import State

CACHE_POLICIES = ("auto", "keep")


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


def _choose_sites(survey: Survey, config: registry.Patch, part: str | None) -> list[Site]:
    """The sites for a part.

    Raises:
        ModelMismatchError: the model has no site, or none of that part.
    """
    model, everything = survey.base, survey.sites
    if not everything:
        classes = survey.attention_classes
        raise ModelMismatchError(
            f"{type(model).__name__} has no attention site: its attention ({', '.join(classes) or 'none found'}) does "
            "not use transformers' attention interface, so there is nothing a patch could hook into"
            + (f". {config.name}: {config.without_site}" if config.without_site else "")
        )
    if part is not None and part not in PARTS:
        raise SelectionError(f"part={part!r} is unknown; parts are {', '.join(PARTS)}")
    have = survey.parts
    wanted = part if part is not None else config.default_part
    if wanted is not None and part is None and wanted not in have:
        wanted = None  # a bare ViT has no "text"; take what the method allows
    allowed = set(config.parts)
    if part == "bridge" and allowed >= set(PARTS) - {"bridge"}:
        allowed.add("bridge")  # a method that makes sense everywhere does so there, but must be asked
    if wanted is not None and part is not None and wanted not in allowed:
        raise ModelMismatchError(
            f"{config.name} is not defined for part={part!r}; parts: {', '.join(config.parts)}"
        )
    chosen = [
        s
        for s in everything
        if (wanted is None or wanted in s.parts) and s.parts & allowed
        and ("cross" in config.parts or "cross" not in s.parts)
        and (s.part != "bridge" or part is not None)
        and not (config.causal_only and not s.causal and part is None)
    ]  # fmt: skip
    if not chosen:
        raise ModelMismatchError(
            f"{type(model).__name__} has no site for {config.name} (part={part or config.default_part!r}); "
            f"parts of this model: {', '.join(have)}; {config.name} works on: {', '.join(config.parts)}"
        )
    return chosen


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


def restricts(config: registry.Patch) -> bool:
    """True if the method narrows what is read by a rule (its code calls ``program.restrict``)."""
    for cls in type(config).__mro__[: type(config).__mro__.index(registry.Patch)]:
        for value in vars(cls).values():
            code = getattr(value, "__code__", None)
            if code is not None and "restrict" in code.co_names:
                return True
    return config.frees_cache


def _check_merged(config: registry.Patch, chosen: list[Site]) -> None:
    merged = [site for site in chosen if site.merged]
    if merged and restricts(config):
        fit = sorted({site.part for site in chosen if not site.merged})
        raise ModelMismatchError(
            f"{config.name}: {merged[0].path} attends to its own tokens and an encoder's in one call, and rules of "
            f"{config.name} count positions of one sequence"
            + (f". Choose another part: part={fit[0]!r}" if fit else "; it does not fit this model")
        )


def _check_trainable(survey: Survey, variants: list[Any], chosen: list[Site]) -> None:
    reason = survey.why_not_trainable
    if reason is None:
        return
    for site, kinds in zip(chosen, variants):
        for _, config in kinds:
            trained = [n for n, t in config.tensors(site).items() if t.requires_grad]
            if trained:
                raise ModelMismatchError(
                    f"{config.name}: its parameter {trained[0]!r} on {site.path} would be trained apart on every rank: "
                    f"{reason}. Patch first, then wrap: hap.patch(model, ...), then DistributedDataParallel(model) or "
                    "fully_shard(model)"
                )


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
    model: Any,
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
    survey = Survey.of(model)
    with survey.at_work():
        return plan_on(
            survey, name_or_config, part=part, layers=layers, heads=heads, impl=impl, cache=cache, **options
        )


def plan_on(
    survey: Survey,
    name_or_config: str | registry.Patch,
    *,
    part: str | None = None,
    layers: Selector = None,
    heads: Selector = None,
    impl: str = "auto",
    cache: str = "auto",
    **options: Any,
) -> Plan:
    """`plan` for a model that has been read already."""
    config = registry.build(name_or_config, options)
    layers, heads = selection.settled(layers), selection.settled(heads)
    try:
        check_impl(impl)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cache not in CACHE_POLICIES:
        raise ConfigError(f"cache={cache!r} is unknown; choose one of {', '.join(CACHE_POLICIES)}")
    base, everything = survey.base, survey.sites
    candidates = _choose_sites(survey, config, part)
    if survey.why_not_parallel is not None:
        raise ModelMismatchError(
            f"{config.name}: {type(base).__name__} cannot be patched: {survey.why_not_parallel}"
        )
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
            localize.check(special, site)
    _check_merged(config, chosen)
    _check_trainable(survey, variants, chosen)
    devices = {d for site in chosen if (d := survey.devices[site.path]) is not None}
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
    state = state_on(base)
    for site in everything:
        for stack in stacks_of(site.module):
            if stack.context is not None and (state is None or stack.context is not state.context):
                raise CompositionError(
                    f"{site.path} is patched already, through another model object inside or around this "
                    f"{type(base).__name__}. Patch through one object, or start anew with hap.unpatch(model)"
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
        left_alone=survey.left_alone,
    )
