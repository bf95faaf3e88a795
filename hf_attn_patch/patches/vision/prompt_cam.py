"""`prompt_cam`: a prompt per class in a frozen ViT, whose attention in the last layer shows traits of the class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...call.program import ScoreEdit
from ...errors import ModelMismatchError, PatchError
from ...forward.needs.added_tokens import CLASS_WEIGHT, answers, drawn, is_last, takes_pixels, width
from ...forward.needs.base import site_patches
from ...registry import option, register_patch
from ..adds_tokens import AddsTokens

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@register_patch("prompt_cam")
@dataclass
class PromptCam(AddsTokens):
    """Class prompts: K learned tokens in every layer, one per class; each class is scored by its own token.

    Source: Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis, arXiv 2501.09333;
    Imageomics/Prompt_CAM 7722fc2 (READ; golden vectors RAN).

    Formula: layer l reads [p^l_1 .. p^l_K; CLS; patches]; what becomes of the prompts is dropped after each layer but
    the last, where logit_c = w . LN(z_c) + b with the model's own last norm and one w [C] for all classes. The map of
    class c is its row of the last layer's attention over the patches, one per head (`class_maps`); heads are ranked by
    what blurring them, that is scores of 0 in row c, does to the probability of the class (`rank_heads`). The output of
    the model gets ``logits`` [B, K], and a ``loss`` if it is given labels; its own head sees no labels.

    Trained: prompts, w and b (K C per layer + C + 1). The model stays frozen.

    Neutral value: none; prompts take a part of the attention of all tokens.

    Differs from the original code: prompts are drawn uniformly in +-sqrt(6 / (3 patch^2 + C)) as there, but from a seed
    of their own; the released code puts prompts in every layer, `layers` may choose the last ones only. Published
    recipe: SGD, momentum 0.9, lr 0.001 (DINOv2) to 0.01, 100 epochs and more, batch 16.
    """

    paper = "Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis"
    arxiv = "2501.09333"

    classes: int = option(help="K, the number of classes = prompts per layer")
    dropout: float = option(0.0, help="dropout of the prompts in training (original: 0.1, 0 for DINOv2)")
    seed: int = option(0, help="of the first values of prompts and head")

    def validate(self) -> None:
        self.require(self.classes >= 1, "classes", ">= 1")
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        notes = super().check_model(model, sites)
        if not any(is_last(site) for site in sites):
            raise ModelMismatchError(
                f"prompt_cam: layers {sorted(s.layer for s in sites)} leave the last one out, where classes are read; "
                'choose layers="-4:" or alike'
            )
        return notes

    def tensors(self, site: Site) -> dict[str, Tensor]:
        channels = width(site) or 0
        patch = getattr(site.module.config, "patch_size", 16)
        area = patch * patch if isinstance(patch, int) else math.prod(patch)
        bound = math.sqrt(6 / (3 * area + channels))
        found: dict[str, Tensor] = {
            "prompts": nn.Parameter(bound * drawn(self.seed, site, 0, self.classes, channels))
        }
        if is_last(site):
            scale = channels**-0.5  # torch's own bound for a linear layer
            found[CLASS_WEIGHT] = nn.Parameter(scale * drawn(self.seed, site, 1, channels))
            found["class_bias"] = nn.Parameter(torch.zeros(()))
        return found

    def added_tokens(self, tensors: nn.Module, training: bool) -> Tensor:
        return F.dropout(tensors.get_parameter("prompts"), self.dropout, training)

    def class_tokens(self, hidden: Tensor, added: int) -> Tensor:
        return hidden[:, :added]

    def class_logits(self, tokens: Tensor, tensors: nn.Module) -> Tensor:
        weight = tensors.get_parameter(CLASS_WEIGHT).to(tokens.dtype)
        return tokens @ weight + tensors.get_parameter("class_bias").to(tokens.dtype)

    def edit(self, program: Program, call: Call) -> None:
        study: Study | None = getattr(call.tensors, "study", None)
        if study is None:
            return
        rows = torch.zeros(1, program.q_len, dtype=torch.bool, device=program.query.device)
        rows[:, study.target] = True
        if study.blurred:
            program.score_edits.append(ScoreEdit("multiply", 0.0, rows=rows, heads=tuple(study.blurred)))
        program.observe(study.look)

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [{"classes": 3}] if takes_pixels(model) else []


@dataclass
class Study:
    """What a forward is to blur and to record. target: class whose row is blurred in the heads `blurred`."""

    classes: int
    target: int = 0
    blurred: list[int] = field(default_factory=list)
    maps: Tensor | None = None  # [B, H, K, T], of the prompts' rows, before any blur

    def look(self, program: Program, output: Tensor) -> None:
        """Attention of the prompts' rows only: K x T numbers per head, never T x T."""
        key = program.key.repeat_interleave(program.num_heads // program.num_kv_heads, 1)  # type: ignore[union-attr]
        scores = program.query[:, :, : self.classes].float() @ key.float().transpose(-1, -2) * program.scale
        self.maps = scores.softmax(-1)


@dataclass
class ClassMaps:
    """logits [B, K]. maps [B, H, K, rows, columns]: share of attention that the prompt of a class gives each patch, in
    the last layer (prompts, CLS and registers take the rest)."""

    logits: Tensor
    maps: Tensor

    def of(self, target: Tensor | int, heads: list[int] | None = None) -> Tensor:
        """Mean map [B, rows, columns] over `heads` (None = all) of one class per image."""
        classes = torch.as_tensor(target, device=self.maps.device).expand(len(self.maps))
        chosen = self.maps[torch.arange(len(self.maps)), :, classes]
        return (chosen if heads is None else chosen[:, heads]).mean(1)


@dataclass
class Ranking:
    """Heads of the last layer, most important first, and the probability of the class left at each removal."""

    heads: list[int]
    probabilities: list[float]

    def __str__(self) -> str:
        return f"heads by importance: {self.heads}; p(class) as the others are blurred: " + ", ".join(
            f"{p:.3f}" for p in self.probabilities
        )


def answering(model: nn.Module) -> tuple[Any, PromptCam]:
    """The patch of the last layer.

    Raises:
        PatchError: `model` carries no enabled prompt_cam.
    """
    for patch in site_patches(model):
        if patch.entry.enabled and answers(patch) and isinstance(patch.variants[0][1], PromptCam):
            return patch, patch.variants[0][1]
    raise PatchError(
        "the model carries no prompt_cam; call hap.patch(model, 'prompt_cam', classes=...) or hap.load first"
    )


@contextmanager
def studied(model: nn.Module, study: Study) -> Iterator[Study]:
    """Inside, forwards of `model` do what `study` says."""
    patch, _ = answering(model)
    patch.study = study
    try:
        yield study
    finally:
        del patch.study


@torch.no_grad()
def class_maps(model: nn.Module, pixel_values: Tensor) -> ClassMaps:
    """Logits and maps of all classes for images [B, 3, height, width], in one forward."""
    from ...forward.needs.grid import grid_of

    with studied(model, Study(answering(model)[1].classes)) as study:
        logits = model(pixel_values=pixel_values).logits
    grid = grid_of(pixel_values, model.config)
    if study.maps is None or grid is None or len(grid) != 2:
        raise PatchError(
            f"{type(model).__name__} has no grid of patches for images {list(pixel_values.shape)}"
        )
    return ClassMaps(logits, study.maps[..., -math.prod(grid) :].unflatten(-1, grid))


@torch.no_grad()
def rank_heads(model: nn.Module, pixel_values: Tensor, target: int) -> Ranking:
    """Heads of the last layer by importance for class `target` in one image [1, 3, height, width].

    Greedy: the head whose blurring leaves the probability of the class highest goes first, for good; the last one left
    is the most important. H (H + 1) / 2 forwards.

    Raises:
        ValueError: more than one image, or no such class.
    """
    patch, config = answering(model)
    if len(pixel_values) != 1 or not 0 <= target < config.classes:
        raise ValueError(
            f"rank_heads takes one image and a class below {config.classes}, got {len(pixel_values)} and {target}"
        )
    left, order, probabilities = list(range(patch.facts["num_heads"])), [], []
    blurred: list[int] = []
    while left:
        found = []
        for head in left:
            with studied(model, Study(config.classes, target, [*blurred, head])):
                found.append(float(model(pixel_values=pixel_values).logits.float().softmax(-1)[0, target]))
        best = max(range(len(left)), key=found.__getitem__)  # of equal ones the first
        probabilities.append(found[best])
        blurred.append(left.pop(best))
        order.append(blurred[-1])
    return Ranking(order[::-1], probabilities)
