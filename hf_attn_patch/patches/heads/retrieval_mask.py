"""`retrieval_mask`: zero the outputs of chosen heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...model import head_sets
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@register_patch("retrieval_mask")
@dataclass
class RetrievalMask(Patch):
    """Zero the outputs of chosen heads (a head set), to see what they are for.

    Source: Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574
    (nightdessert/Retrieval_Head 3ac171a, READ). Published: without the top 30 retrieval heads of Llama-2-7B-80K the
    needle is lost, without 30 random ones it is not (READ in its README, not RAN).

    Formula: ``o_h <- 0`` for the heads of the set, o_h [B, L, Dv], before the output projection; everything else
    of the layer is untouched.

    Neutral value: an empty head set.

    Head set: ``{layer: [query heads]}``, or a file or dict of `head_sets` (entries with layer, head, kind q or kv,
    score), of which ``top=K`` takes the highest scores. The original's ``{"layer-head": [scores]}`` is read as it is. A
    KV head stands for all query heads of its group. Layers count within the chosen part.

    Differs from the original code: it sets the *logits* of a blocked head to zero behind the causal mask, after which
    that head averages all positions, future ones included (RAN: row 0 gives 1/L everywhere). Here the head
    contributes nothing, on any model and executor.
    """

    steady = True
    paper = "Retrieval Head Mechanistically Explains Long-Context Factuality"
    arxiv = "2404.15574"
    head_state = ("_set",)
    default_part = "text"

    head_set: dict | list | str = option(
        help="{layer: [heads]}, head-set data, or a path to a head-set JSON file", path=True
    )
    top: int | None = option(None, help="take the K heads of the highest score; None = all of the set")
    _set: Any = field(default=None, init=False, repr=False, compare=False)

    def validate(self) -> None:
        self.require(self.top is None or self.top >= 1, "top", ">= 1 or None")
        self.head_set = head_sets.plain(self.head_set, self.name)
        chosen = head_sets.read(self.head_set, self.name)
        self._set = chosen if self.top is None else chosen.top(self.top, self.name)

    def check(self, site: Site) -> None:
        self._set.check(site, self.name)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return self._set.check_model(model, sites, self.name)

    def edit(self, program: Program, call: Call) -> None:
        heads = self._set.of_layer(call.layer, program.num_heads, program.num_kv_heads)
        if call.heads is not None:
            heads = tuple(h for h in heads if h in call.heads)
        if heads:
            program.gate(program.query.new_zeros(len(heads)), heads)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"head_set": {}}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        scored = [{"layer": 0, "head": h, "score": s} for h, s in enumerate((0.1, 0.9, 0.4))]
        return [
            {"head_set": {0: [0, 1], 1: [2]}},
            {"head_set": {"objective": "retrieval", "heads": scored}, "top": 2},
            {"head_set": [{"layer": 0, "head": 0, "kind": "kv"}]},
        ]
