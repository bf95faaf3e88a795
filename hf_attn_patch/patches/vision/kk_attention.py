"""`kk_attention`: k-k, v-v and q-q self-attention, for heat maps of CLIP-like towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...call.program import head_selector
from ...errors import ModelMismatchError
from ...model.sites import find_sites
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@register_patch("kk_attention")
@dataclass
class KKAttention(Patch):
    """Tokens attend to tokens with similar keys (or values, or queries), for heat maps of CLIP-like towers.

    Source: GenSAM, arXiv 2312.07374 (jyLin8100/GenSAM@eb51c7e `clip/clip_surgery_model.py`, READ), which extends CLIP
    Surgery, arXiv 2304.05653.

    Formula: ``o = softmax(scale k k^T) v`` with k, v [B, H, L, D]; ``of="value"``: softmax(scale v v^T) v;
    ``of="query"``: softmax(scale q q^T) v. Everything else of the call (scale, mask, rules, gates) stays.

    Neutral value: none; a projection whose queries equal its keys would not notice it.

    Differs from the original: there the last 6 blocks carry two paths, the unchanged one and one that adds up the new
    attention (CLS comes from the unchanged one); this is the attention alone, in place, so the CLS token and later
    layers see changed features. ``layers="-6:"`` are the blocks it changes. Keys are taken as the attention gets
    them: after rotary embeddings where a tower has those (values never are rotated). q-q is ours.
    """

    paper = "Relax Image-Specific Prompt Requirement in SAM: A Single Generic Prompt for Segmenting Camouflaged Objects"
    arxiv = "2312.07374"
    parts = ("vision",)
    default_part = "vision"
    exclusive = frozenset({"query and key source"})

    of: Literal["key", "value", "query"] = option(
        "key", help="what is compared with itself: key, value or query"
    )

    def check(self, site: Site) -> None:
        if site.causal:
            raise ModelMismatchError(
                f"kk_attention: {site.path} is causal; comparing keys with keys is for bidirectional layers"
            )
        if site.num_heads != site.num_kv_heads:
            raise ModelMismatchError(
                f"kk_attention: {site.path} has {site.num_heads} query heads and {site.num_kv_heads} KV heads; with "
                "shared keys a query head has no key of its own. Exclude this layer with layers=..."
            )

    def edit(self, program: Program, call: Call) -> None:
        query, key, value = program.query, program.key, program.value
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)) or key.shape != query.shape:
            raise ModelMismatchError(
                f"kk_attention: {call.path} has queries {list(query.shape)} and keys {list(key.shape)}; only "
                "self-attention over the whole image can compare keys with keys"
            )
        if self.of == "value" and value.shape != key.shape:
            raise ModelMismatchError(
                f"kk_attention: {call.path} has values of width {value.shape[3]} and keys of width {key.shape[3]}; use "
                "of='key'"
            )
        source = {"key": key, "value": value, "query": query}[self.of]
        chosen = head_selector(call.heads, program.num_heads, query.device)
        program.query = source if chosen is None else torch.where(chosen, source, query)
        program.key = source if chosen is None else torch.where(chosen, source, key)

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        towers = any("vision" in site.parts and not site.causal for site in find_sites(model))
        return [{}, {"of": "value"}, {"of": "query"}] if towers else []
