"""`sid`: self-introspective decoding, against a stream that sees only the image tokens nobody looks at."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelMismatchError
from ..inspection.calls import last_row
from ..registry import Patch, option
from . import prompts, rules
from .base import Decoding, Given, register_decoding

if TYPE_CHECKING:
    from torch import Tensor

    from ..call.program import Program
    from ..install.stack import Call
    from .stream import SecondStream


def visible_tokens(attention: Tensor, image: Tensor, rank: int) -> Tensor:
    """bool [B, S]: every key that is no image token, and the `rank` image tokens with the least attention.

    attention: probabilities [B, H, S] of one row; heads are averaged. image: bool [B, S]. Of equals the first stays.
    """
    weight = attention.mean(1).masked_fill(~image, float("inf"))
    order = weight.argsort(dim=-1, stable=True)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return ~image | (place < rank)


class Shared:
    """What the layers of one forward share. image: bool [B, prompt length]. seen: bool [B, S], the keys that stay.

    No dataclass: a plan compares options by their text, and this one must not cost the printing of a tensor.
    """

    def __init__(self, image: Tensor | None = None):
        self.image, self.seen = image, image


@dataclass
class LeastAttended(Patch):
    """In layers from `layer` on, hide all image keys but the `rank` with the least attention in the layer before.
    Made by `sid` for single forwards of its second stream, in no registry."""

    name = "sid_second_stream"
    parts = ("text",)
    default_part = "text"

    layer: int = 2
    rank: int = 100
    shared: Any = field(default_factory=Shared)

    def edit(self, program: Program, call: Call) -> None:
        mask = program.mask
        if call.layer == self.layer - 1:
            self.shared.seen = visible_tokens(last_row(program), self._columns(program), self.rank)
        elif call.layer >= self.layer:
            seen = self.shared.seen
            if seen.shape[1] != mask.kv_len:
                raise ModelMismatchError(
                    f"sid: layer {self.layer - 1} has {seen.shape[1]} keys, {call.path} has {mask.kv_len}; sliding "
                    "layers cannot hide the tokens that another layer chose. Give a layer behind one with the same keys"
                )
            seen = torch.nn.functional.pad(seen, (mask.kv_offset, 0), value=True)
            padding = seen if mask.padding is None else mask.padding[:, : seen.shape[1]].bool() & seen
            program.mask = replace(mask, padding=padding, arguments={}, _native={})

    def _columns(self, program: Program) -> Tensor:
        """bool [B, S]: which keys of `program` are image tokens (beams of one item share its prompt)."""
        image = self.shared.image.to(program.query.device)
        image = image.repeat_interleave(program.batch // image.shape[0], 0)
        end = program.mask.kv_offset + program.mask.kv_len
        return torch.nn.functional.pad(image, (0, max(end - image.shape[1], 0)))[
            :, program.mask.kv_offset : end
        ]


@register_decoding("sid")
@dataclass
class SelfIntrospectiveDecoding(Decoding):
    """Prefer what the whole image says over what its least attended tokens say.

    Source: Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models, arXiv 2408.02032
    (huofushuo/SID 127dd41 vcd_sample.py, modeling_llama.py, READ and RAN).

    Formula: ``(1 + alpha) l - alpha l'`` with tokens below ``log(beta) + max l`` ruled out. In the stream of l' [R, V],
    from layer `layer` on, only those `rank` image keys are visible that have the least attention in layer - 1 (mean
    over heads, last row), chosen anew for every token.

    Neutral value: alpha = 0, beta = 0.

    Defaults: alpha 0.5, beta 0.1, rank 100, layer 2 (pope_eval.py; the paper has 50 tokens for captions).

    Differs from the original code: every row of a batch chooses its own tokens (the original takes row 0's) and keeps
    its padding mask; greedy decoding respects the plausibility cut (the original takes the maximum before it). The
    hidden tokens are computed and then not read, so the stream costs as much as the first.
    """

    paper = "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models"
    arxiv = "2408.02032"
    neutral = {"alpha": 0.0, "beta": 0.0}

    alpha: float = option(0.5, help="weight of the difference to the second stream (0 = none)")
    rank: int = option(100, help="image tokens that stay visible in the second stream")
    layer: int = option(2, help="first layer that hides the others; the one before chooses")

    def validate(self) -> None:
        super().validate()
        self.require(self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0")
        self.require(self.rank >= 0, "rank", ">= 0")
        self.require(self.layer >= 1, "layer", ">= 1 (the layer before it chooses)")

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        from ..install.plan import plan

        layers = max(s.layer for s in plan(model, self._patch()).sites) + 1
        if self.layer >= layers:
            raise ModelMismatchError(
                f"sid: layer={self.layer}, but the model has {layers} layers, 0 to {layers - 1}: nothing would "
                "be hidden"
            )

    def _patch(self, image: Tensor | None = None) -> LeastAttended:
        return LeastAttended(layer=self.layer, rank=self.rank, shared=Shared(image))

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        return [dict(inputs)]

    def around(self, model: Any, stream: SecondStream) -> AbstractContextManager[Any]:
        from ..api import patched

        return patched(model, self._patch(prompts.image_columns(model.config, stream.inputs["input_ids"])))

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        return rules.cut(rules.contrast(main, others[0], self.alpha), main, self.beta)
