"""`moa`: mixture of attention spans from a plan."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...call.rules import BlockSinkWindow, SinkWindow
from ...errors import ConfigError, ModelMismatchError
from ...forward.needs import Need, PromptLength
from ...options import option, option_file
from ...registry import Patch, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...forward.running import Running
    from ...install.stack import Call
    from ...model.sites import Site


NOTED = (4096, 16384)  # lengths at which `plan` says what is kept


def span_size(alpha: float, beta: float, length: int, block: int = 64, smallest: int = 128) -> int:
    """Total span in tokens of a rule (alpha, beta) at `length`, rounded as the original runtime does:
    ``ceil(max(min(int(alpha + length * beta), length), smallest) / block) * block`` (may exceed `length`)."""
    size = min(int(alpha + length * beta), length)
    return math.ceil(max(size, smallest) / block) * block


def tightened(sizes: list[int], kv_heads: int, block: int, smallest: int) -> list[int]:
    """Spans of KV heads that keep in sum what the spans `sizes` of the query heads say on average per group.

    Every KV head gives up the same share of the widest span of its group, in whole blocks and down to `smallest`; the
    blocks that rounding leaves go to the heads that lost most by it. None gets more than its widest span.
    """
    group, least = len(sizes) // kv_heads, math.ceil(smallest / block) * block
    widest = [max(sizes[g * group : (g + 1) * group]) for g in range(kv_heads)]
    target, free = sum(sizes) / group, set(range(kv_heads))
    exact = [float(least)] * kv_heads
    while free:
        share = (target - least * (kv_heads - len(free))) / sum(widest[g] for g in free)
        if not (low := {g for g in free if widest[g] * share < least}):
            exact = [widest[g] * share if g in free else exact[g] for g in range(kv_heads)]
            break
        free -= low
    found = [int(e // block) * block for e in exact]
    for g in sorted(range(kv_heads), key=lambda g: found[g] - exact[g]):
        if sum(found) + block <= target and found[g] + block <= widest[g]:
            found[g] += block
    return found


@register_patch("moa")
@dataclass
class MoA(Patch):
    """Mixture of attention spans: every head its own sink + window, elastic in the length.

    Source: MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv 2406.14909
    (thu-nics/MoA e224fe3, READ and RAN).

    Formula: ``span_h(N) = alpha_h + beta_h N`` rounded up to blocks of 64 (see `span_size`), of which
    ``static = min(span, sinks)`` are sinks and the rest is the window: query i reads key j iff
    ``j <= i and (j < static or i - j < span - static)``. N = prompt length + max_new_tokens, one number per
    batch (its longest row), that of the first turn for a whole conversation; ``length`` fixes it.

    Neutral value: alpha 0, beta 1 (every span is the whole length).

    Plan: the official JSON, ``{"alphas": [[float] * heads] * layers, "betas": ...}``, as a path or a dict. For
    GQA a plan may give one rule per KV head; a rule per query head is turned into the largest span of its group,
    because a KV head can only be evicted once for its whole group. That keeps more than the plan says (`plan` names the
    number; the published plans keep 18 to 36 % more); ``fit="density"`` keeps what it says instead, layer by layer (see
    `tightened`). ``"shortest": tokens`` in the plan (written by
    our calibration, absent in official plans) is the shortest length the rules were found on: texts below it get
    the spans of that length, because a rule with a negative alpha would extrapolate to spans nobody looked at.

    Differs from the original code: prefill uses the token formula above, so that prompt and decode agree;
    ``prefill="block"`` gives the original kernel's block-granular layout. GQA and left padding work (the original
    expands KV heads, and its ring cache reads holes for prompts shorter than the sink). Head order is never
    permuted. A span of a whole sequence keeps everything.
    """

    counts = "rule"
    steady = True
    paper = "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression"
    arxiv = "2406.14909"
    head_state = ("_table",)
    parts = ("text", "decoder")
    default_part = "text"
    causal_only = True
    head_selectable = False
    frees_cache = True

    plan: dict | str = option(help='official plan JSON {"alphas", "betas"}, or a path to it', path=True)
    sinks: int = option(64, help="sink tokens inside each span (one block in the original)")
    block: int = option(64, help="spans are rounded up to multiples of this many tokens")
    smallest: int = option(128, help="smallest span, in tokens")
    max_new_tokens: int = option(1024, help="tokens that may follow the prompt; part of the elastic length N")
    length: int | None = option(
        None, help="elastic length N itself (overrides prompt length + max_new_tokens)"
    )
    prefill: Literal["token", "block"] = option(
        "token", help="layout of the prompt: token formula or 64-blocks"
    )
    fit: Literal["widest", "density"] = option(
        "widest",
        help="where a KV head has several rules: keep the widest of them, or as much in sum as the plan says",
    )
    _table: Any = field(default=None, init=False, repr=False, compare=False)
    _shortest: int = field(default=0, init=False, repr=False, compare=False)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (PromptLength(elastic=self.length is None),)

    def validate(self) -> None:
        self.require(self.sinks >= 0, "sinks", ">= 0")
        self.require(self.block >= 1, "block", ">= 1")
        self.require(self.smallest >= 1, "smallest", ">= 1")
        self.require(self.max_new_tokens >= 0, "max_new_tokens", ">= 0")
        self.require(self.length is None or self.length >= 1, "length", ">= 1 or None")
        if isinstance(self.plan, str):
            file = self.plan
            try:
                self.plan = json.loads(option_file("moa", "plan", file, "plan file"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"moa: plan file {file} is not valid JSON: {error}") from error
        self._table = self._read_plan(self.plan)
        shortest = self.plan.get("shortest", 0) if isinstance(self.plan, dict) else 0
        if not isinstance(shortest, int) or shortest < 0:
            raise ConfigError(f"moa: shortest of a plan is a length in tokens, found {shortest!r}")
        self._shortest = shortest

    def _read_plan(self, plan: Any) -> list[list[tuple[float, float]]]:
        if not isinstance(plan, dict) or not {"alphas", "betas"} <= set(plan):
            raise ConfigError(
                'moa: a plan is {"alphas": [[...] per layer], "betas": ...}; this is '
                + ("an object without one of them" if isinstance(plan, dict) else f"a {type(plan).__name__}")
            )
        alphas, betas = plan["alphas"], plan["betas"]
        shape = lambda table: [len(row) for row in table]
        try:
            same = shape(alphas) == shape(betas)
            table = [[(float(a), float(b)) for a, b in zip(ra, rb)] for ra, rb in zip(alphas, betas)]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"moa: alphas and betas must be lists of lists of numbers ({error})") from error
        if not same or not table or not all(table):
            raise ConfigError(
                f"moa: alphas ({shape(alphas)} rules per layer) and betas ({shape(betas)}) must have one shape, "
                "not empty"
            )
        for layer, row in enumerate(table):
            for head, (a, b) in enumerate(row):
                if not (math.isfinite(a) and math.isfinite(b)):
                    raise ConfigError(
                        f"moa: rule of layer {layer} head {head} is ({a}, {b}), expected finite numbers"
                    )
        return table

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        layers = max(s.layer for s in sites) + 1
        layers = max(layers, getattr(model.config.get_text_config(), "num_hidden_layers", layers))
        if len(self._table) != layers:
            raise ModelMismatchError(
                f"moa: plan has {len(self._table)} layers, the model has {layers} (text part). "
                "Calibrate a plan for this model, or pass the one that belongs to it"
            )
        notes = [note] if (note := self._wider(sites)) else []
        made_for = self.plan.get("model") if isinstance(self.plan, dict) else None
        name = getattr(model.config, "_name_or_path", "") or ""
        tail = lambda path: str(path).rstrip("/").split("/")[-1]
        if made_for and name and tail(made_for) != tail(name):
            notes.append(f"the plan was made for {made_for}, this model is {name}")
        return notes

    def _wider(self, sites: list[Site]) -> str:
        """How much more is kept than the rules of the query heads say, in words; "" if nothing."""
        said = []
        for length in (self.length,) if self.length is not None else NOTED:
            kept = asked = 0.0
            for site in sites:
                heads = site.num_kv_heads or 1
                sizes = self._sizes(site.layer, length)
                kept += sum(min(s, length) for s in self.kv_rules(site.layer, heads, length))
                asked += sum(min(s, length) for s in sizes) * heads / len(sizes)
            if round(100 * (kept / asked - 1)) >= 1:
                said.append(f"{kept / asked - 1:.0%} more at {length:,} tokens")
        return (
            "the plan has a rule per query head, and a KV head keeps the widest span of its group: that keeps "
            f"{', '.join(said)}. fit='density' keeps what the plan says, by tightening"
            if said
            else ""
        )

    def check(self, site: Site) -> None:
        if site.layer >= len(self._table):
            return  # check_model says it better
        rules = len(self._table[site.layer])
        if site.num_heads is None or site.num_kv_heads is None:
            raise ModelMismatchError(
                f"moa: the number of heads of {site.path} is unknown (register_site_facts)"
            )
        if rules not in (site.num_heads, site.num_kv_heads):
            raise ModelMismatchError(
                f"moa: plan has {rules} rules in layer {site.layer}, the model has {site.num_heads} query heads "
                f"and {site.num_kv_heads} KV heads there"
            )

    def _sizes(self, layer: int, length: int) -> list[int]:
        """Span in tokens of each rule of `layer` at elastic length `length`."""
        length = max(length, self._shortest)
        return [span_size(a, b, length, self.block, self.smallest) for a, b in self._table[layer]]

    def kv_rules(self, layer: int, num_kv_heads: int, length: int) -> list[int]:
        """Span in tokens of each KV head at elastic length `length`: the largest of its group, or as `fit` says."""
        sizes = self._sizes(layer, length)
        if self.fit == "density" and len(sizes) > num_kv_heads:
            return tightened(sizes, num_kv_heads, self.block, self.smallest)
        group = len(sizes) // num_kv_heads
        return [max(sizes[g * group : (g + 1) * group]) for g in range(num_kv_heads)]

    def elastic_length(self, context: Running | None, at_least: int) -> int:
        """N: fixed by `length`, else prompt length + max_new_tokens."""
        if self.length is not None:
            return self.length
        prompt = getattr(context, "first_prompt", getattr(context, "prompt_length", None))
        return (prompt if prompt is not None else at_least) + self.max_new_tokens

    def _spans(self, layer: int, num_kv_heads: int, length: int) -> list[tuple[int, int]]:
        sizes = self.kv_rules(layer, num_kv_heads, length)
        return [(min(size, self.sinks), size - min(size, self.sinks)) for size in sizes]

    def edit(self, program: Program, call: Call) -> None:
        length = self.elastic_length(call.context, program.mask.kv_len)
        spans = self._spans(call.layer, program.num_kv_heads, length)
        if self.prefill == "block" and program.q_len > 1:
            sinks, local = (tuple(n // self.block for n in sizes) for sizes in zip(*spans))
            program.restrict(BlockSinkWindow(sinks, local, self.block))
            return
        # a window of 0 would read sinks only; a head whose span is all sinks keeps its own key
        sinks, window = zip(*spans)
        program.restrict(SinkWindow(sinks, tuple(max(w, 1) for w in window)))

    def spans(self, facts: dict[str, Any], context: Running | None) -> list[tuple[int, int]] | None:
        length = self.elastic_length(context, 0)
        spans = self._spans(facts["layer"], facts["num_kv_heads"], length)
        return [(s, max(w, 1)) if s + w < length else (0, 0) for s, w in spans]

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        shape = _plan_shape(model)
        return None if shape is None else {"plan": _uniform(shape, 0.0, 1.0)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        shape = _plan_shape(model)
        if shape is None:
            return []
        layers, heads = shape
        plan = {
            "alphas": [[float(3 + (l + 2 * h) % 9) for h in range(heads)] for l in range(layers)],
            "betas": [[0.0] * heads for _ in range(layers)],
        }
        small = {"sinks": 2, "block": 1, "smallest": 3, "length": 64}
        return [{"plan": plan, **small}, {"plan": _uniform(shape, 1.0, 0.1), **small}]


def _plan_shape(model: Any) -> tuple[int, int] | None:
    """(layers, query heads) a plan for `model` needs, or None if it has no causal text layer."""
    from ...model.sites import find_sites

    sites = [s for s in find_sites(model) if s.causal and s.parts & set(MoA.parts)]
    if not sites or sites[0].num_heads is None:
        return None
    layers = max(s.layer for s in sites) + 1
    return max(layers, getattr(model.config.get_text_config(), "num_hidden_layers", layers)), sites[
        0
    ].num_heads


def _uniform(shape: tuple[int, int], alpha: float, beta: float) -> dict[str, Any]:
    layers, heads = shape
    return {"alphas": [[alpha] * heads] * layers, "betas": [[beta] * heads] * layers}
