"""`pai`: pay more attention to the image while answering."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...call.program import ScoreEdit
from ...forward.needs import ImageKeys, PromptLength
from ...forward.needs.images import image_token_ids
from ...registry import Patch, option, register_patch
from . import image_keys

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@register_patch("pai")
@dataclass
class PayAttentionToImage(Patch):
    """Raise the scores of image keys in the rows that predict the answer, in proportion to their size.

    Source: Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs,
    arXiv 2407.21771 (LALBJ/PAI 9bbd8bd attention.py, READ and RAN).

    Formula: ``s_ij <- s_ij + alpha |s_ij|`` for image keys j, every head, rows i >= prompt length - 1, s [B, H, L, S]
    before softmax; the probability of an image key is multiplied by exp(alpha |s_ij|) and the row renormalised.

    Neutral value: alpha = 0.

    Defaults: alpha 0.2 and layers 2 to the last are the released code's for LLaVA-1.5-7B (the paper's 0.5 for
    greedy decoding is UNVERIFIED).

    Differs from the original code: the original edits the last row of every call; here that is columns >= prompt
    length - 1, so that a cache and a single forward agree (say where the prompt ends with
    ``hap.prompt(model, length=...)`` when prompt and answer are scored in one forward). Works on batches, left padding
    and several images; a row without an image is left alone. The contrast of logits with an image-free
    second stream (gamma) is decoding, not attention, and not part of this patch: compare with gamma = 1.
    """

    paper = "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs"
    arxiv = "2407.21771"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(), PromptLength(edits_end=True))
    exclusive = frozenset({"key classes"})

    alpha: float = option(
        0.2, help="how much of its own size is added to the score of an image key (0 = dense)"
    )
    first_layer: int = option(2, help="layers before this one are left alone")
    last_layer: int | None = option(None, help="layers behind this one are left alone; None = the last")

    def validate(self) -> None:
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        image_keys.validate_range(self)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return image_keys.check_model(self.name, model, sites, self.first_layer, self.last_layer, None)

    def edit(self, program: Program, call: Call) -> None:
        if not image_keys.in_range(self, call.layer):
            return
        classes = image_keys.image_class(self.name, program, call)
        some, rows = image_keys.answering_rows(program, call)
        if some:
            image_keys.classify(program, classes)
            program.score_edits.append(ScoreEdit("abs", self.alpha, image_keys.IMAGE, rows, call.heads))

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"alpha": 0.0, "first_layer": 0} if image_token_ids(model.config) else None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        return [{"alpha": 0.5, "first_layer": 0}, {"alpha": 2.0, "first_layer": 1}]
