"""`duo`: full attention for retrieval heads, sinks + recent tokens for the others; gates that learn which is which."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...call.program import Blend
from ...call.rules import SinkWindow
from ...errors import ConfigError, ModelMismatchError
from ...forward.needs import AuxiliaryLosses
from ...forward.needs.base import site_patches
from ...model import head_sets
from ...options import option, option_file
from ...registry import Patch, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...forward.running import Running
    from ...install.stack import Call
    from ...model.sites import Site

WHOLE = 1 << 24  # a window no sequence reaches
Table = list[list[float]]


def full_heads(
    alphas: Table, sparsity: float | None = None, threshold: float | None = None
) -> list[list[bool]]:
    """Which KV heads keep full attention, [layers][kv_heads], from gates `alphas` of that shape.

    Args:
        sparsity: share of streaming heads over all layers. As in the original, heads at or above the (linearly
            interpolated) quantile `sparsity` of all gates are full: of N heads, N - ceil(sparsity (N - 1)); 0 keeps
            all, 1 none. Gates that are equal are told apart by their place: earlier layers, then lower heads, stay
            full first (the original draws noise up to 1e-6).
        threshold: instead, full are the gates >= this.
    """
    if threshold is not None:
        return [[alpha >= threshold for alpha in row] for row in alphas]
    assert sparsity is not None
    ranked = sorted((-a, layer, head) for layer, row in enumerate(alphas) for head, a in enumerate(row))
    # rounded: 0.1 * 30 is 3.0000000000000004, which is the 4th of 31 gates, not a place between the 4th and the 5th
    count = 0 if sparsity >= 1 else len(ranked) - math.ceil(round(sparsity * (len(ranked) - 1), 9))
    chosen = {(layer, head) for _, layer, head in ranked[:count]}
    return [[(layer, head) in chosen for head in range(len(row))] for layer, row in enumerate(alphas)]


@register_patch("duo")
@dataclass
class Duo(Patch):
    """Retrieval heads keep full attention; streaming heads read sinks + recent tokens, and only those stay cached.

    Source: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819
    (mit-han-lab/duo-attention fe93c31, READ and RAN).

    Formula: KV head g has a gate alpha_g. ``mode="deploy"``: heads of the highest gates (see `full_heads`) read every
    key, the others key j iff ``j <= i and (j < sinks or i - j < window)``. ``mode="train"``: ``o = a full(q, k, v) +
    (1 - a) streaming(q, k, v)`` with ``a = clip(alpha, 0, 1)``, one parameter ``alpha`` [Hkv] per layer that starts at
    1 or at the table; nothing leaves the cache, and a loss the model computes grows by ``l1 * mean |alpha|``.

    Gates: the original's TSV or a JSON file (path), [layers][kv_heads] numbers, ``{"alphas": ...}`` (what ``calibrate
    duo`` writes), or a head set (`hf_attn_patch.head_sets`) whose heads are the full ones; a query head counts for its
    KV head.

    Neutral value: sparsity 0.

    Differs from the original code: the window counts the query's own token, as the original's training mask does; its
    deployed decoding sees one key more (``window=257`` gives those numbers). The prompt is masked too (there, the
    first chunk is full attention for every head). No weight is reordered. Equal gates are told apart by place, not by
    noise. In training the full term is the student's own attention (the original takes the teacher stream's, without
    gradient), so the mix is a function of one forward and can be kept in a model; `hf_attn_patch.calibration.duo` says
    what that changes for the search.
    """

    counts = "rule"
    steady = True
    paper = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
    arxiv = "2410.10819"
    head_state = ("_table", "_set", "_full")
    parts = ("text", "decoder")
    default_part = "text"
    needs = (AuxiliaryLosses(),)
    causal_only = True
    head_selectable = False
    frees_cache = True
    trainable = True

    alphas: list | dict | str | None = option(
        None,
        help="gates [layers][kv_heads], {'alphas': ...}, a head set, or a path to one (JSON, TSV)",
        path=True,
    )
    sparsity: float | None = option(
        None, help="share of streaming heads (None = 0.5 for gates, all but the listed heads for a head set)"
    )
    threshold: float | None = option(
        None, help="instead of sparsity: heads with a gate of at least this are full"
    )
    sinks: int = option(128, help="first tokens that streaming heads keep")
    window: int = option(256, help="most recent tokens that streaming heads keep, the query's own included")
    mode: Literal["deploy", "train"] = option(
        "deploy", help="full or streaming heads, or trainable gates between them"
    )
    l1: float = option(
        0.05, help="train: weight of the mean |alpha| that a model in training adds to its loss"
    )
    _table: Any = field(default=None, init=False, repr=False, compare=False)
    _set: Any = field(default=None, init=False, repr=False, compare=False)
    _full: Any = field(default=None, init=False, repr=False, compare=False)

    def validate(self) -> None:
        self.require(self.sinks >= 0, "sinks", ">= 0")
        self.require(self.window >= 1, "window", ">= 1 (a window counts the query's own key)")
        self.require(self.sparsity is None or 0 <= self.sparsity <= 1, "sparsity", "in [0, 1]")
        self.require(self.threshold is None or math.isfinite(self.threshold), "threshold", "a finite number")
        self.require(self.l1 >= 0, "l1", ">= 0")
        if self.sparsity is not None and self.threshold is not None:
            raise ConfigError("duo: sparsity and threshold both choose the full heads; give one")
        if self.mode == "train" and (self.sparsity is not None or self.threshold is not None):
            raise ConfigError(
                "duo: sparsity and threshold are for mode='deploy'; while gates train no head is chosen"
            )
        if self.alphas is None:
            if self.mode == "deploy":
                raise ConfigError(
                    "duo: deployment needs alphas (gates per layer and KV head, or a head set). Find them with "
                    "`hf-attn-patch calibrate duo`, or train them with mode='train'"
                )
            return
        self._read(_load(self.alphas) if isinstance(self.alphas, str) else self.alphas)

    def _read(self, data: Any) -> None:
        table = data.get("alphas") if isinstance(data, dict) and "alphas" in data else data
        if isinstance(table, list) and table and all(isinstance(row, (list, tuple)) for row in table):
            self._table = _checked(table)
            if self.mode == "deploy":
                sparsity = 0.5 if self.sparsity is None and self.threshold is None else self.sparsity
                self._full = full_heads(self._table, sparsity, self.threshold)
            return
        self._set = head_sets.read(head_sets.plain(data, "duo"), "duo")
        if self.mode == "train":
            raise ConfigError(
                "duo: training starts from a table of gates (or from none), not from a head set"
            )
        if self.sparsity is not None:
            raise ConfigError(
                "duo: sparsity ranks the gates of all heads, and a head set only names the full ones. Give a table "
                "of alphas, or leave sparsity out (threshold cuts a head set by score)"
            )
        if self.threshold is not None:
            if any(h.score is None for h in self._set.heads):
                raise ConfigError(
                    f"duo: threshold={self.threshold} needs a score for every head of the head set"
                )
            kept = tuple(h for h in self._set.heads if h.score >= self.threshold)
            self._set = head_sets.HeadSet(kept, self._set.models, self._set.objectives)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        if self._set is not None:
            return self._set.check_model(model, sites, "duo") if self._set.heads else []
        if self._table is None:
            return []
        layers = _layers(model, sites)
        if len(self._table) != layers:
            raise ModelMismatchError(
                f"duo: alphas have {len(self._table)} layers, the model has {layers} (text part). Gates belong to one "
                "model: find them with `hf-attn-patch calibrate duo`"
            )
        return []

    def check(self, site: Site) -> None:
        if site.num_heads is None or site.num_kv_heads is None:
            raise ModelMismatchError(
                f"duo: the number of heads of {site.path} is unknown (register_site_facts)"
            )
        if self._set is not None:
            self._set.check(site, "duo")
        if self._table is None or site.layer >= len(self._table):
            return  # check_model says it better
        if len(self._table[site.layer]) != site.num_kv_heads:
            raise ModelMismatchError(
                f"duo: alphas have {len(self._table[site.layer])} gates in layer {site.layer}, {site.path} has "
                f"{site.num_kv_heads} KV heads (and {site.num_heads} query heads)"
            )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        if self.mode == "deploy":
            return {}
        row = [1.0] * (site.num_kv_heads or 1) if self._table is None else self._table[site.layer]
        return {"alpha": nn.Parameter(torch.tensor(row, dtype=torch.float32))}

    def is_full(self, layer: int, num_heads: int, num_kv_heads: int) -> list[bool]:
        """True for each KV head of `layer` that reads everything (``mode="deploy"``)."""
        if self._full is not None:
            return self._full[layer]
        group = num_heads // num_kv_heads
        full = {h // group for h in self._set.of_layer(layer, num_heads, num_kv_heads)}
        return [g in full for g in range(num_kv_heads)]

    def edit(self, program: Program, call: Call) -> None:
        if self.mode == "train":
            alpha: Tensor = call.tensors.alpha  # type: ignore[assignment]
            share = alpha.clamp(0, 1).repeat_interleave(program.num_heads // program.num_kv_heads)
            streamed = (1 - share).to(program.query.dtype).reshape(1, -1, 1, 1)
            program.blends.append(Blend(SinkWindow(self.sinks, self.window), streamed))
            if self.l1:
                call.add_loss("duo.l1", alpha.abs().mean(), self.l1)
            return
        full = self.is_full(call.layer, program.num_heads, program.num_kv_heads)
        if not any(full):
            program.restrict(SinkWindow(self.sinks, self.window))
        elif not all(full):
            sinks = tuple(0 if f else self.sinks for f in full)
            program.restrict(SinkWindow(sinks, tuple(WHOLE if f else self.window for f in full)))

    def spans(self, facts: dict[str, Any], context: Running | None) -> list[tuple[int, int]] | None:
        if self.mode == "train":
            return None
        full = self.is_full(facts["layer"], facts["num_heads"], facts["num_kv_heads"])
        return None if all(full) else [(0, 0) if f else (self.sinks, self.window) for f in full]

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        shape = _shape(model)
        return None if shape is None else {"alphas": [[0.5] * heads for heads in shape], "sparsity": 0.0}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        shape = _shape(model)
        if shape is None:
            return []
        mixed = [
            [(3 * layer + 2 * head) % 5 / 4 for head in range(heads)] for layer, heads in enumerate(shape)
        ]
        one = {"heads": [{"layer": 0, "head": 0, "kind": "kv"}]}
        return [
            {"alphas": mixed, "sinks": 2, "window": 3},
            {"alphas": one, "sinks": 0, "window": 4},
            {"alphas": [[0.25] * heads for heads in shape], "sinks": 1, "window": 3, "mode": "train"},
        ]


def gates(model: Any) -> dict[int, Tensor]:
    """The trainable gates of a model under ``duo`` in training mode: layer -> parameter alpha [Hkv].

    Raises:
        ConfigError: no active ``duo`` patch with ``mode="train"``.
    """
    found: dict[int, Tensor] = {
        m.layer: m.alpha
        for m in site_patches(model)
        if isinstance(m.entry.config, Duo) and m.entry.config.mode == "train"
    }
    if not found:
        raise ConfigError("duo: this model has no trainable gates; patch it with mode='train'")
    return dict(sorted(found.items()))


def penalty(model: Any) -> Tensor:
    """Mean of |alpha| over all gates (before clipping), the L1 term of the original's loss; its weight was 0.05."""
    return torch.cat([alpha.reshape(-1) for alpha in gates(model).values()]).abs().mean()


def _load(path: str) -> Any:
    """Data of a gates file: JSON, or the original's TSV with a line of numbers per layer."""
    text = option_file("duo", "alphas", path, "alphas file", "does not exist (a JSON or TSV file)")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as broken:
        try:
            return [[float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
        except ValueError:
            raise ConfigError(f"duo: {path} is neither JSON ({broken}) nor lines of numbers (TSV)") from None


def _checked(table: list[Any]) -> Table:
    try:
        values = [[float(a) for a in row] for row in table]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"duo: alphas must be numbers, [layers][kv_heads] ({error})") from error
    for layer, row in enumerate(values):
        if not row or not all(math.isfinite(a) for a in row):
            raise ConfigError(
                f"duo: alphas of layer {layer} are {row}, expected finite numbers, one per KV head"
            )
    return values


def _layers(model: Any, sites: Sequence[Site]) -> int:
    layers = max(s.layer for s in sites) + 1
    return max(layers, getattr(model.config.get_text_config(), "num_hidden_layers", layers))


def _shape(model: Any) -> list[int] | None:
    """KV heads of each layer of the text part, or None if `model` has no causal text layer with known heads."""
    from ...model.sites import find_sites

    sites = [s for s in find_sites(model) if s.causal and s.parts & set(Duo.parts)]
    if not sites or any(s.num_kv_heads is None for s in sites):
        return None
    heads = {s.layer: s.num_kv_heads or 1 for s in sites}
    return [heads.get(layer, sites[0].num_kv_heads or 1) for layer in range(_layers(model, sites))]
