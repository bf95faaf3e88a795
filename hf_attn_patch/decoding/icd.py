"""`icd`: instruction contrastive decoding, against an instruction that confuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..registry import option
from . import prompts, rules
from .base import Decoding, Given, register_decoding
from .vcd import STEPS, noisy

if TYPE_CHECKING:
    from torch import Tensor


@register_decoding("icd")
@dataclass
class InstructionContrastiveDecoding(Decoding):
    """Prefer what the plain instruction gives over what a disturbing one gives, with the same picture.

    Source: Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding,
    arXiv 2403.18715 (p1k0pan/ICD 2fa44c5 icd_utils/, READ and RAN).

    Formula: ``(1 + alpha) l - alpha l'`` with tokens below ``log(beta) + max l`` ruled out, l' [R, V] the logits with
    `sentence` in the prompt. With `image_stream` the same difference to a noisy picture is added:
    ``2 (1 + alpha) l - alpha l' - alpha l''``.

    Neutral value: alpha = 0, beta = 0, image_stream = false.

    Defaults: alpha 1, beta 0.1 (released code); the sentence is the one that SID's LLaVA port uses.

    Differs from the original code: it gives the sentence to the Q-Former of InstructBLIP; here it stands in the
    prompt, behind the image, as in the LLaVA port. Needs a tokenizer (``processor=``), or its tokens in `tokens`.
    """

    paper = "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding"
    arxiv = "2403.18715"
    neutral = {"alpha": 0.0, "beta": 0.0}

    alpha: float = option(1.0, help="weight of the difference to the disturbed stream (0 = none)")
    sentence: str = option("You are a confused object detector.", help="put behind the image")
    tokens: tuple[int, ...] = option((), help="token ids of the sentence (instead of `sentence`)")
    image_stream: bool = option(False, help="a third stream with a noisy picture; its difference is added")
    noise_step: int = option(500, help="diffusion step of that noise, 0 to 999")
    seed: int = option(0, help="of that noise")

    def validate(self) -> None:
        super().validate()
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        self.require(0 <= self.noise_step < STEPS, "noise_step", f"0..{STEPS - 1}")
        self.require(bool(self.sentence or self.tokens), "sentence", "a sentence, or tokens=")

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        made = [prompts.with_sentence(model.config, inputs, self._ids(given), self.name)]
        return [*made, noisy(inputs, self.noise_step, self.seed)] if self.image_stream else made

    def _ids(self, given: Given) -> list[int]:
        if self.tokens:
            return list(self.tokens)
        tokenizer = getattr(given.processor, "tokenizer", given.processor)
        if tokenizer is None:
            raise ConfigError(
                f"icd: the sentence {self.sentence!r} needs a tokenizer: two_stream(..., processor=processor), or give "
                "its token ids with tokens=[...]"
            )
        return list(tokenizer(self.sentence, add_special_tokens=False)["input_ids"])

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        total = rules.contrast(main, others[0], self.alpha)
        for other in others[1:]:
            total = total + rules.contrast(main, other, self.alpha)
        return rules.cut(total, main, self.beta)
