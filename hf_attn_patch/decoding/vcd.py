"""`vcd`: visual contrastive decoding, against a noisy picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..registry import option
from . import prompts, rules
from .base import Decoding, Given, register_decoding

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 1000


def schedule() -> tuple[Tensor, Tensor]:
    """(sqrt(abar_t), sqrt(1 - abar_t)), float32 [1000] each: b = sigmoid(linspace(-6, 6)) (5e-3 - 1e-5) + 1e-5."""
    b = torch.linspace(-6, 6, STEPS).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - b).cumprod(0)
    return kept.sqrt(), (1 - kept).sqrt()


def diffused(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """``sqrt(abar_t) x + sqrt(1 - abar_t) n`` for pixels and noise of one shape, t = `step` in 0 … 999."""
    kept, lost = schedule()
    return pixels * float(kept[step]) + noise * float(lost[step])


def noisy(inputs: dict[str, Any], step: int, seed: int) -> dict[str, Any]:
    """Inputs with diffusion noise on their pixels. Every image gets the noise of a generator that starts at `seed`,
    so an image is changed alike whatever the batch around it."""
    made = dict(inputs)
    for key in prompts.pixel_names(inputs):
        pixels, parts = inputs[key], []
        for image in pixels.split(prompts.image_sizes(inputs, key)):
            random = torch.Generator().manual_seed(seed)
            noise = torch.randn(image.shape, generator=random, dtype=torch.float32)
            parts.append(diffused(image, noise.to(image), step))
        made[key] = torch.cat(parts)
    return made


@register_decoding("vcd")
@dataclass
class VisualContrastiveDecoding(Decoding):
    """Prefer what the clear picture says over what a noisy one says.

    Source: Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding,
    arXiv 2311.16922 (DAMO-NLP-SG/VCD d6568ff vcd_utils/, READ and RAN).

    Formula: ``(1 + alpha) l - alpha l'``, l' the logits [R, V] with ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) n`` on
    the normalised pixels; tokens with ``l < log(beta) + max l`` are ruled out.

    Neutral value: alpha = 0, beta = 0.

    Defaults: alpha 1, beta 0.1 (the POPE script has 0.2), noise step 500 of 1000 (released code).

    Differs from the original code: noise is seeded, per image (the original draws anew every time); two caches (the
    code before c637c85 let the second stream read the first one's cache from the second token on).
    """

    paper = (
        "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding"
    )
    arxiv = "2311.16922"
    pixels = True
    neutral = {"alpha": 0.0, "beta": 0.0}

    alpha: float = option(1.0, help="weight of the difference to the noisy stream (0 = none)")
    noise_step: int = option(500, help="diffusion step of the noise, 0 to 999")
    seed: int = option(0, help="of the noise")

    def validate(self) -> None:
        super().validate()
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        self.require(0 <= self.noise_step < STEPS, "noise_step", f"0..{STEPS - 1}")

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        return [noisy(inputs, self.noise_step, self.seed)]

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        return rules.cut(rules.contrast(main, others[0], self.alpha), main, self.beta)
