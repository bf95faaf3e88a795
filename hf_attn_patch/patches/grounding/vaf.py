"""`vaf`: visual amplification fusion, scores of the image up, of the system prompt down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call.mask import first_true
from ...call.program import ScoreEdit
from ...forward.needs import ImageKeys
from ...forward.needs.images import image_token_ids
from ...registry import Patch, option, register_patch
from . import image_keys

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

SYSTEM = 2
PUBLISHED = (9, 14)  # of 32 layers


@register_patch("vaf")
@dataclass
class VisualAmplificationFusion(Patch):
    """Multiply the scores of image keys by one factor and those of the keys before the image by another.

    Source: ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language
    Models, arXiv 2503.13107 (ustc-hyin/ClearSight 5466c94 visaug/inference/AttnAdapter.py, READ and RAN).

    Formula: ``s_ij <- enhance * s_ij`` for image keys j, ``s_ij <- suppress * s_ij`` for system keys j (those left of
    the first image), rows i behind an image, every head, s [B, H, L, S] before softmax.

    Neutral value: enhance = suppress = 1.

    Defaults: enhance 1.15, suppress 0.95, layers 9 to 14, both included, of a model of 32 (released code).

    A factor above 1 on a *negative* score takes attention away from the image: so published, and so here.

    Differs from the original code: image and system keys come from the prompt (the original has 35 and 576 written
    in), so batches, left padding and several images work; a row without an image is left alone. A row is behind the
    image when it is no image token itself and has one before it, and text between two images counts. Without text
    behind the image the original edits every row of the prompt; here no row is.
    """

    paper = (
        "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language "
        "Models"
    )
    arxiv = "2503.13107"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(),)
    exclusive = frozenset({"key classes"})

    enhance: float = option(1.15, help="factor on the scores of image keys (1 = dense)")
    suppress: float = option(0.95, help="factor on the scores of the keys before the first image (1 = dense)")
    first_layer: int = option(PUBLISHED[0], help="layers before this one are left alone")
    last_layer: int | None = option(
        PUBLISHED[1], help="layers behind this one are left alone; None = the last"
    )

    def validate(self) -> None:
        for name in ("enhance", "suppress"):
            value = getattr(self, name)
            self.require(value > 0 and math.isfinite(value), name, "a finite number > 0 (1 = dense)")
        image_keys.validate_range(self)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return image_keys.check_model(self.name, model, sites, self.first_layer, self.last_layer, PUBLISHED)

    def edit(self, program: Program, call: Call) -> None:
        if not image_keys.in_range(self, call.layer):
            return
        image = image_keys.image_columns(self.name, program, call)
        classes = image_keys.once(call, ("vaf classes", image.shape[1]), lambda: _classes(image))
        rows = image_keys.behind_image(image, program, call)
        image_keys.classify(program, classes)
        for factor, key_class in ((self.enhance, image_keys.IMAGE), (self.suppress, SYSTEM)):
            program.score_edits.append(ScoreEdit("multiply", factor, key_class, rows, call.heads))

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        if not image_token_ids(model.config):
            return None
        return {"enhance": 1.0, "suppress": 1.0, "first_layer": 0, "last_layer": None}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        return [{"first_layer": 0}, {"enhance": 3.0, "suppress": 0.2, "first_layer": 1, "last_layer": None}]


def _classes(image: Tensor) -> Tensor:
    """int8 [B, columns]: IMAGE, SYSTEM left of the first image, 0 elsewhere."""
    columns = torch.arange(image.shape[1], device=image.device)
    system = columns < first_true(image)[:, None]
    return torch.where(image, image_keys.IMAGE, torch.where(system, SYSTEM, image_keys.OTHER)).to(torch.int8)
