"""`agla`: assembly of global and local attention, with a second look at only what the question is about."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigError, PatchError
from ..inspection.calls import last_row, watched
from ..inspection.image_grid import image_tokens
from ..registry import option
from . import matching, prompts, rules
from .base import Decoding, Given, register_decoding
from .stream import unnoticed

if TYPE_CHECKING:
    from torch import Tensor


@register_decoding("agla")
@dataclass
class GlobalLocalAssembly(Decoding):
    """Add the logits for the same picture with everything black that the question is not about.

    Source: AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
    Attention, arXiv 2406.12718 (Lackel/AGLA efa1263 eval/, lavis/, READ and RAN).

    Formula: ``l + alpha l'`` with tokens below ``log(beta) + max l`` ruled out, l' [R, V] the logits for the masked
    picture. Kept are the pixels where the Grad-CAM of a BLIP matching model (cross-attention of layer `block`) is
    highest, the fraction 1 - s / 2 of them with s the cosine of picture and question.

    Neutral value: alpha = 0, beta = 0.

    Defaults: alpha 2, beta 0.5, block 6 (released code). The sum is 3 times as peaked as l: compare with greedy
    decoding.

    Needs ``images=`` and ``processor=``, and for the published matching ``matcher=(model, processor)`` with
    ``texts=``, one question per picture. **Without a matcher the model's own attention chooses the pixels** (last row
    of the prompt, mean over heads and layers, fraction `keep`): not the published method, and said in a warning.

    Differs from the original code: two caches (the original's second stream reads the first one's cache from the second
    token on, which amounts to sampling at temperature 1 / 3); the mask is enlarged to the picture instead of shrinking
    the picture to 384 x 384, so it keeps its shape and its number of tokens. The port of BLIP in transformers reads
    [CLS] where the original puts its [ENC] token; the effect is UNVERIFIED, no checkpoint was at hand.
    """

    paper = (
        "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local "
        "Attention"
    )
    arxiv = "2406.12718"
    pixels = True
    neutral = {"alpha": 0.0, "beta": 0.0}

    beta: float = option(
        0.5, help="tokens less likely than beta times the likeliest are ruled out (0 = none)"
    )
    alpha: float = option(2.0, help="weight of the local stream (0 = none)")
    block: int = option(6, help="layer of the matcher's text encoder whose cross-attention is read")
    keep: float = option(0.6, help="fraction of the pixels that is kept where there is no matcher")

    def validate(self) -> None:
        super().validate()
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        self.require(self.block >= 0, "block", ">= 0")
        self.require(0 < self.keep <= 1, "keep", "> 0 and <= 1")

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        images = list(given.images) if given.images is not None else []
        maker = getattr(given.processor, "image_processor", given.processor)
        if not images or maker is None:
            raise ConfigError(
                "agla blacks out parts of the pictures and so needs them: two_stream(..., images=[one per image], "
                "processor=processor)"
            )
        if given.matcher is not None:
            texts = [] if given.texts is None else list(given.texts)
            if len(texts) != len(images):
                raise ConfigError(
                    f"agla: {len(images)} pictures and {len(texts)} texts; the matcher needs one question to each"
                )
            matcher, reader = given.matcher
            found = [matching.match(matcher, reader, i, t, self.block) for i, t in zip(images, texts)]
            parts = [(cam, matching.kept_fraction(score)) for cam, score in found]
        else:
            warnings.warn(
                "agla: no matcher= given (BLIP image-text matching), so the model's own attention chooses what "
                f"stays of the picture, {self.keep:.0%} of it. This is not the published method",
                stacklevel=3,
            )
            parts = [(cam, self.keep) for cam in own_attention(model, inputs)]
        if len(parts) != len(images):
            raise ConfigError(f"agla: {len(images)} pictures were given, the prompt holds {len(parts)}")
        masked = [
            matching.black_out(image, matching.kept_pixels(matching.relevance(cam), fraction))
            for image, (cam, fraction) in zip(images, parts)
        ]
        return [_with_pictures(inputs, masked, maker)]

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        return rules.cut(rules.assembled(main, others[0], self.alpha), main, self.beta)


def own_attention(model: Any, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Per picture, the attention [h, w] that the last token of the prompt pays to it (mean over heads and layers)."""
    total: list[Tensor] = []
    look = lambda program, call: total.append(last_row(program).mean(1))
    with unnoticed(model), watched(model, look), torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    mean = torch.stack(total).mean(0).double().cpu()
    return [tokens.on_grid(mean[tokens.row]).numpy() for tokens in image_tokens(model.config, inputs)]


def _with_pictures(inputs: dict[str, Any], images: list[np.ndarray], maker: Any) -> dict[str, Any]:
    """`inputs` with the pixels of other pictures of the same sizes.

    Raises:
        PatchError: the image processor makes other shapes of them than those in `inputs`.
    """
    made, names = dict(inputs), prompts.pixel_names(inputs)
    for nested in (
        images,
        [[image] for image in images],
    ):  # some processors want the pictures of each row in a list
        new = dict(maker(images=nested, return_tensors="pt"))
        if all(tuple(new[k].shape) == tuple(inputs[k].shape) for k in names if k in new) and set(names) & set(
            new
        ):
            made.update({k: new[k].to(inputs[k]) for k in names if k in new})
            return made
    found = ", ".join(f"{k} {list(new[k].shape)}" for k in names if k in new) or "no pixels"
    wanted = ", ".join(f"{k} {list(inputs[k].shape)}" for k in names)
    raise PatchError(
        f"agla: the processor makes {found} of the masked pictures, the inputs hold {wanted}. Give the pictures and "
        "the processor that the inputs were made with, or the second inputs themselves: second=inputs"
    )
