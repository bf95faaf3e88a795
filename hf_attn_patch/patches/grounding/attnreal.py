"""`attnreal`: attention that answers pay to themselves goes back to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call.program import MassEdit, MassTransfer
from ...forward.needs import ImageKeys, PromptLength
from ...forward.needs.images import image_token_ids
from ...registry import Patch, option, register_patch
from . import image_keys

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

OUTPUT = 2


@register_patch("attnreal")
@dataclass
class AttentionReallocation(Patch):
    """Move a share of the attention on tokens of the answer to the image tokens, in proportion.

    Source: Attention Reallocation: Towards Zero-cost and Controllable Hallucination Mitigation of MLLMs,
    arXiv 2503.08342. There is no code, and only abstract and summaries could be read: the rule is UNVERIFIED.

    Formula: with A [B, H, L, S] after softmax and O_i, V_i the mass of row i on the tokens of the answer and on image
    tokens, ``A_ij <- (1 - move) A_ij`` for answer keys j and ``A_ij <- A_ij (1 + move O_i / V_i)`` for image keys j.
    Rows keep sum 1, other keys are untouched, and so are rows whose V_i is 0.

    Neutral value: move = 0.

    Defaults: move 0.5 is what a paper that builds on the method uses (it keeps rho = 0.5; third party).

    Differs from the paper: it takes only from those tokens of the answer that act as sinks, by a rule that no
    readable source gives; here all tokens of the answer give the same share, the one that is being read included.
    The answer starts where the first forward that fills the cache ends; ``length`` (tokens of each row), or
    ``hap.prompt(model, length=...)`` (columns), says it for texts scored in one forward. The prompt itself is dense.
    """

    paper = "Attention Reallocation: Towards Zero-cost and Controllable Hallucination Mitigation of MLLMs"
    arxiv = "2503.08342"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(), PromptLength())
    exclusive = frozenset({"key classes"})

    move: float = option(0.5, help="share of the mass on answer tokens that goes to the image (0 = dense)")
    first_layer: int = option(0, help="layers before this one are left alone")
    last_layer: int | None = option(None, help="layers behind this one are left alone; None = the last")
    length: int | None = option(
        None, help="tokens of the prompt of each row; None = what filled the cache first"
    )

    def validate(self) -> None:
        self.require(0 <= self.move <= 1, "move", "0..1")
        image_keys.validate_range(self)
        self.require(self.length is None or self.length >= 1, "length", ">= 1 or None")

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return image_keys.check_model(self.name, model, sites, self.first_layer, self.last_layer, None)

    def edit(self, program: Program, call: Call) -> None:
        if not image_keys.in_range(self, call.layer):
            return
        context, mask = call.context, program.mask
        assert context is not None
        image = image_keys.image_columns(self.name, program, call)
        prompt = self.length if self.length is not None else context.prompt_length
        if prompt is None or mask.q_offset + mask.q_len <= prompt:  # padding only makes the answer later
            return
        key = ("attnreal classes", image.shape[1], self.length)
        image_keys.classify(
            program, image_keys.once(call, key, lambda: self._classes(image, program, prompt))
        )
        give = MassTransfer(take=(0.0, 0.0, self.move), give=image_keys.IMAGE)
        program.mass_edits.append(MassEdit(give, 3, None, call.heads))

    def _classes(self, image: Tensor, program: Program, prompt: int) -> Tensor:
        """int8 [B, columns]: IMAGE, OUTPUT behind the prompt, 0 elsewhere."""
        columns = torch.arange(image.shape[1], device=image.device)
        if self.length is not None:
            columns = columns - program.mask.start.to(image.device)[:, None]
        output = torch.where(columns >= prompt, OUTPUT, image_keys.OTHER)
        return torch.where(image, image_keys.IMAGE, output).to(torch.int8)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"move": 0.0, "length": 8} if image_token_ids(model.config) else None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        return [{"length": 8}, {"move": 1.0, "length": 12, "first_layer": 1}]
