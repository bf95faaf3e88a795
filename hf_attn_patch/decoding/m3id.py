"""`m3id`: the longer the answer, the more the image counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry import option
from . import prompts, rules
from .base import Decoding, Given, register_decoding

if TYPE_CHECKING:
    from torch import Tensor


@register_decoding("m3id")
@dataclass
class MultiModalMutualInformation(Decoding):
    """Weigh what the image adds to the text, more and more as the answer grows.

    Source: Multi-Modal Hallucination Control by Visual Information Grounding, arXiv 2403.14003, by way of its branch in
    LijunZhang01/Octopus f9d6103 avisc_utils/avisc_sample.py (READ and RAN; the authors' own code was not seen).

    Formula: ``l + (1 - g) / g (l - u)``, g = exp(-lamda t), t = 1, 2, … the number of the token, l and u [R, V] the
    log-softmax with the image and without it; tokens below ``log(beta) + max l`` (raw logits) are ruled out.

    Neutral value: lamda = 0, beta = 0.

    Defaults: lamda 0.02, beta 0.1 (that code). The weight has no upper end (6.4 at token 100); `max_weight` is ours.

    Differs from that code: image placeholders and their marks are deleted from the prompt, positions count anew.
    """

    paper = "Multi-Modal Hallucination Control by Visual Information Grounding"
    arxiv = "2403.14003"
    neutral = {"lamda": 0.0, "beta": 0.0}

    patched: bool = option(False, help="the image-free stream runs with the model's patches on")
    lamda: float = option(0.02, help="how fast the weight of the image grows (0 = not at all)")
    max_weight: float | None = option(None, help="upper end of (1 - g) / g; None = no end, as published")

    def validate(self) -> None:
        super().validate()
        self.require(self.lamda >= 0 and math.isfinite(self.lamda), "lamda", "a finite number >= 0")
        self.require(self.max_weight is None or self.max_weight >= 0, "max_weight", ">= 0")

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        return [prompts.without_image(model, inputs)]

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        at: float = step
        if self.max_weight is not None and self.lamda:  # g / (1 - g) >= 1 / w  <=>  t <= log(1 + w) / lamda
            at = min(at, math.log1p(self.max_weight) / self.lamda)
        return rules.cut(rules.image_prior(main, others[0], self.lamda, at), main, self.beta)
