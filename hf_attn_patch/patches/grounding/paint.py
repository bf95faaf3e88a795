"""`paint`: raise the scores of the image tokens that the vision tower's own CLS token looked at, first and last."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call.program import ScoreEdit
from ...errors import CacheError, ModelMismatchError, PatchError
from ...forward.conversation import keep_rows, of_rows
from ...forward.needs import ImageKeys, PromptLength, TokenGrid
from ...forward.needs.images import image_token_ids
from ...kernels.reference import probabilities
from ...registry import Patch, option, register_patch
from . import cls_rows, image_keys

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

OTHER, LOCAL, SUMMARY = 0, 1, 2  # key classes
ROWS = 128  # query rows whose probabilities exist at a time


def local_patches(first: Tensor, ratio: float) -> Tensor:
    """bool [B, N]: the ``int(N * ratio)`` patches with the largest `first` [B, N] (equal ones: the earlier patch)."""
    order = first.argsort(dim=-1, descending=True, stable=True)[:, : int(first.shape[-1] * ratio)]
    return torch.zeros_like(first, dtype=torch.bool).scatter(1, order, True)


def summary_patches(late: Tensor) -> Tensor:
    """bool [B, N]: upper outliers of `late` [B, N], those above ``Q3 + 1.5 (Q3 - Q1)`` of their image (Tukey's fence,
    linear quartiles, strictly). At least float32 inside."""
    late = late if late.dtype == torch.float64 else late.float()
    low, high = late.quantile(torch.tensor([0.25, 0.75], dtype=late.dtype, device=late.device), -1)
    return late > (high + 1.5 * (high - low))[:, None]


def streams(first: Tensor, late: Tensor, ratio: float) -> Tensor:
    """int8 [B, N] of LOCAL, SUMMARY, OTHER per patch; a patch in both streams is SUMMARY.

    first, late: CLS -> patch attention of an early and a late vision layer, summed over heads, [B, N].
    """
    local, summary = local_patches(first, ratio), summary_patches(late)
    return torch.where(summary, SUMMARY, torch.where(local, LOCAL, OTHER)).to(torch.int8)


@register_patch("paint")
@dataclass
class PayAttentionToInformedTokens(Patch):
    """Raise the scores of two streams of image tokens, chosen by the vision tower's CLS attention, while answering.

    Source: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model (v2: PAINT,
    PAying attention to INformed Tokens), arXiv 2501.12206 (hasanar1f/PAINT 2a9e8f8 modPAI, READ and RAN; the paper's
    text was not available, UNVERIFIED).

    Formula: a, b [N] = CLS -> patch attention of the vision layers `local_layer` and `summary_layer`, summed over
    heads; summary = patches with ``b > Q3 + 1.5 IQR``; local = the ``int(N * ratio)`` largest of a, without summary;
    ``s_ij <- s_ij + alpha |s_ij|`` for local keys j and ``+ beta |s_ij|`` for summary keys, s [B, H, L, S] before
    softmax, in rows i >= prompt length - 1.

    Neutral value: alpha = 0 and beta = 0 (the vision tower is then not looked at either).

    Defaults: ratio 0.15, alpha 0.7, beta 0.4, layers 2 to the last. The released ones are ratio 0.25 and beta 0.3; of
    the captions released with the code, those at ratio .25 and beta .4 repeat 29.5 % of their sentences, and their
    low CHAIR comes with 20 points less recall.

    Differs from the original code: it edits the last row of every call, here columns >= prompt length - 1, so a cache
    and one forward agree (``hap.prompt(model, length=...)`` where prompt and answer are scored in one forward);
    batches, left padding, several images; summary patches are all outliers, where the original counts them as
    ``int(N * (k / N))`` and loses one for some k. No eager attention: the two CLS rows are made from q and k. Its
    "spatial" stream (sums of softmax rows, always 1) and the logits contrast (gamma: decoding) are not here.
    `by_head` is the head-specific modulation that the abstract describes and the code lacks, in our reading
    (UNVERIFIED): alpha and beta of head h times its mass on the image over the mean of all heads, per row; heads that
    are all alike stay as they are. It makes the probabilities of the answering rows once more.
    Needs a vision tower with a CLS token, and one image token per patch: pixel-shuffled, merged, tiled or resampled
    image tokens are refused.
    """

    paper = "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model"
    arxiv = "2501.12206"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(), PromptLength(edits_end=True), TokenGrid())
    exclusive = frozenset({"key classes"})

    ratio: float = option(0.15, help="share of the patches in the local stream")
    alpha: float = option(0.7, help="how much of its own size is added to the score of a local key")
    beta: float = option(0.4, help="the same for a summary key (alpha = beta = 0 is dense)")
    first_layer: int = option(2, help="layers before this one are left alone")
    last_layer: int | None = option(None, help="layers behind this one are left alone; None = the last")
    local_layer: int = option(0, help="vision layer of the local stream (negative: from the end)")
    summary_layer: int = option(-2, help="vision layer of the summary stream (negative: from the end)")
    by_head: bool = option(
        False, help="scale alpha and beta by how much a head looks at the image (UNVERIFIED)"
    )

    def validate(self) -> None:
        self.require(0 <= self.ratio <= 1, "ratio", "a share, 0 to 1")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            self.require(value >= 0 and math.isfinite(value), name, "a finite number >= 0")
        image_keys.validate_range(self)

    @property
    def neutral_value(self) -> bool:
        return self.alpha == self.beta == 0

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        notes = image_keys.check_model(self.name, model, sites, self.first_layer, self.last_layer, None)
        cls_rows.chosen(self.name, model, (self.local_layer, self.summary_layer))
        return notes

    def watches(self, model: Any) -> list[Site]:
        if self.neutral_value:
            return []
        return cls_rows.chosen(self.name, model, (self.local_layer, self.summary_layer))

    def edit(self, program: Program, call: Call) -> None:
        if call.part == "vision":
            cls_rows.note(program, call)
            return
        if self.neutral_value or not image_keys.in_range(self, call.layer):
            return
        classes = self._learn(program, call)
        some, rows = image_keys.answering_rows(program, call)
        if not some:
            return
        image_keys.classify(program, classes)
        factor: float | Tensor = self._by_head(program, call, rows) if self.by_head else 1.0
        for amount, key_class in ((self.alpha, LOCAL), (self.beta, SUMMARY)):
            program.score_edits.append(ScoreEdit("abs", amount * factor, key_class, rows, call.heads))

    def _learn(self, program: Program, call: Call) -> Tensor:
        """Key classes int8 [B, columns]; those of the prompt's images are chosen once and kept with the cache."""
        image = image_keys.image_columns(self.name, program, call)
        key = ("paint classes", call.key, self.ratio, self.local_layer, self.summary_layer, image.shape[1])
        return image_keys.once(call, key, lambda: self._classes(program, call, image))

    def _classes(self, program: Program, call: Call, image: Tensor) -> Tensor:
        context, mask = call.context, program.mask
        assert context is not None
        key = f"paint {call.key} {self.ratio} {self.local_layer} {self.summary_layer}"
        begin, end = mask.q_offset, mask.q_offset + mask.q_len
        before: Tensor | None = of_rows(context.memory, key, program.batch)
        known = 0 if before is None else min(before.shape[1], begin)
        if begin > context.memory.get(f"{key} end", 0) and bool(image[:, known:begin].any()):
            raise CacheError(
                f"{self.name}: the cache holds images that were read without {self.name}, so their streams are "
                "unknown. Start with a fresh cache"
            )
        made = image.new_zeros(program.batch, end, dtype=torch.int8)
        if before is not None:
            made[:, :known] = before[:, :known]
        found = image[:, begin:end]
        rows = cls_rows.noted(call)
        if rows is not None and bool(found.any()):
            first, late = (
                cls_rows.row_of(self.name, rows, n) for n in (self.local_layer, self.summary_layer)
            )
            tokens = cls_rows.patches(self.name, rows, first, found)
            picked = streams(first[:, -tokens.patches :], late[:, -tokens.patches :], self.ratio)
            picked = torch.nn.functional.pad(picked, (tokens.kept, 0)).to(
                made.device
            )  # a CLS token there is OTHER
            own = torch.zeros_like(found[:: tokens.copies], dtype=torch.int8)
            own.masked_scatter_(found[:: tokens.copies], picked)
            made[:, begin:] = own.repeat_interleave(tokens.copies, 0)
        elif end - begin > 1 and bool(found.any()):
            raise PatchError(
                f"{self.name}: this forward has image tokens and no vision tower ran in it, so nothing is known "
                "about their patches; pass pixel_values together with input_ids"
            )
        context.memory[f"{key} end"] = end
        if end - begin > 1 or before is None:
            keep_rows(context.memory, key, made)
        return torch.nn.functional.pad(made, (0, image.shape[1] - end))

    def _by_head(self, program: Program, call: Call, rows: Tensor | None) -> Tensor:
        """Factor [B, H, L, 1]: mass of a head on the image over the mean of all heads; 1 where none looks there."""
        if program.ragged:
            raise PatchError(
                f"{self.name}: by_head=True needs the keys of all heads, and this cache keeps a different span per "
                "head; patch with cache='keep'"
            )
        image = image_keys.image_columns(self.name, program, call)[:, None, None, program.mask.kv_offset :]
        factor = program.query.new_ones(program.batch, program.num_heads, program.q_len, 1)
        wanted = torch.arange(program.q_len, device=factor.device)
        if rows is not None:
            wanted = wanted[rows.any(0)]
        for part in wanted.split(ROWS):
            mass = torch.where(image, probabilities(program, part), 0).sum(-1, keepdim=True)
            mean = mass.mean(1, keepdim=True)
            factor[:, :, part] = torch.where(mean > 0, mass / mean.clamp(min=1e-30), 1.0).to(factor.dtype)
        return factor

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"alpha": 0.0, "beta": 0.0, "first_layer": 0} if suitable(model) else None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not suitable(model):
            return []
        return [
            {"ratio": 0.5, "first_layer": 0},
            {
                "ratio": 0.25,
                "alpha": 2.0,
                "beta": 1.0,
                "first_layer": 0,
                "by_head": True,
                "summary_layer": -1,
            },
        ]


def suitable(model: Any) -> bool:
    """Whether `model` has image tokens, and a vision tower whose CLS token can be looked at."""
    try:
        return bool(image_token_ids(model.config)) and bool(cls_rows.tower("paint", model))
    except ModelMismatchError:
        return False
