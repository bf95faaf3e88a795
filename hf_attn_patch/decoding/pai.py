"""`pai`: guidance away from the prompt without its image (the decoding half of PAI)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry import option
from . import prompts, rules
from .base import Decoding, Given, register_decoding

if TYPE_CHECKING:
    from torch import Tensor


@register_decoding("pai")
@dataclass
class ImageFreeGuidance(Decoding):
    """Push the answer away from what the text alone would say.

    Source: Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs,
    arXiv 2407.21771 (LALBJ/PAI 9bbd8bd CFG.py, READ and RAN). Its other half is the patch ``pai``.

    Formula: ``gamma (l - u) + u``, l and u [R, V] the log-softmax with the image and without it; tokens with
    ``l < log(beta) + max l`` are ruled out. gamma = 1 gives l, without ruling out, and runs no second stream.

    Neutral value: gamma = 1.

    Defaults: gamma 1.1, beta 0.1, and the image-free stream runs without the model's patches (released code).

    Differs from the original code: image placeholders and their marks are deleted from the prompt, whatever the
    template; the original builds the text prompt by hand.
    """

    paper = "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs"
    arxiv = "2407.21771"
    neutral = {"gamma": 1.0}

    patched: bool = option(False, help="the image-free stream runs with the model's patches on")
    gamma: float = option(1.1, help="guidance (1 = none)")

    def validate(self) -> None:
        super().validate()
        self.require(
            self.gamma >= 0 and math.isfinite(self.gamma), "gamma", "a finite number >= 0 (1 = none)"
        )

    @property
    def streams_needed(self) -> bool:
        return self.gamma != 1

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        return [prompts.without_image(model, inputs)]

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        if not self.streams_needed:
            return main.log_softmax(-1)
        return rules.cut(rules.guided(main, others[0], self.gamma), main, self.beta)
