"""`hgai`: head-guided attention intervention, one agreed boost of the image for all heads."""

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

PUBLISHED = (5, 18)  # of 32 layers


@register_patch("hgai")
@dataclass
class HeadGuidedAttentionIntervention(Patch):
    """Raise the scores of image keys in middle layers by what all heads of the layer make of them on average.

    Source: Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and Mitigating Object
    Hallucinations via Attention Lens, arXiv 2411.16724 (ZhangqiJiang07/middle_layers_indicating_hallucinations a0622a9
    modify_attention.py, READ and RAN).

    Formula: ``s_hij <- s_hij + alpha * mean_h' |s_h'ij|`` for image keys j, rows i >= prompt length - 1, s [B, H, L, S]
    before softmax; the mean runs over all query heads (not KV heads), so every head points where the heads agree.

    Neutral value: alpha = 0.

    Defaults: alpha 0.5; layers 5 to 18, both included, of a model of 32. The released script adds 1 to the upper
    bound it is given, and the published captions were made that way; its README, read literally, means 5 to 17.

    Differs from the original code: the original edits the last row of every call; here that is columns >= prompt
    length - 1, so that a cache and a single forward agree (say where the prompt ends with
    ``hap.prompt(model, length=...)`` when prompt and answer are scored in one forward). Works on batches, left padding
    and several images; a row without an image is left alone. ``heads=`` picks the heads that are raised, the mean is
    over all. Needs the scores of all heads at once, so a Triton kernel refuses it (``auto`` takes the torch executor).
    """

    paper = (
        "Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and Mitigating Object "
        "Hallucinations via Attention Lens"
    )
    arxiv = "2411.16724"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(), PromptLength(edits_end=True))
    exclusive = frozenset({"key classes"})

    alpha: float = option(
        0.5, help="how much of the mean size over heads is added to the score of an image key (0 = dense)"
    )
    first_layer: int = option(PUBLISHED[0], help="layers before this one are left alone")
    last_layer: int | None = option(
        PUBLISHED[1], help="layers behind this one are left alone; None = the last"
    )

    def validate(self) -> None:
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        image_keys.validate_range(self)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return image_keys.check_model(self.name, model, sites, self.first_layer, self.last_layer, PUBLISHED)

    def edit(self, program: Program, call: Call) -> None:
        if not image_keys.in_range(self, call.layer):
            return
        classes = image_keys.image_class(self.name, program, call)
        some, rows = image_keys.answering_rows(program, call)
        if some:
            image_keys.classify(program, classes)
            program.score_edits.append(ScoreEdit("mean_abs", self.alpha, image_keys.IMAGE, rows, call.heads))

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"alpha": 0.0, "first_layer": 0, "last_layer": None} if image_token_ids(model.config) else None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        return [{"alpha": 0.5, "first_layer": 0}, {"alpha": 2.0, "first_layer": 1, "last_layer": 1}]
