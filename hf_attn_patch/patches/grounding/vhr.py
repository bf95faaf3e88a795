"""`vhr`: vision-aware head reinforcement, heads that the image changes most speak louder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...errors import CacheError, ModelMismatchError, PatchError
from ...forward.conversation import keep_rows, of_rows
from ...forward.needs import ImageKeys, Need, PromptLength, image_free
from ...forward.needs.images import image_token_ids
from ...registry import Patch, option, register_patch
from . import image_keys

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


def divergence(seen: Tensor, blind: Tensor, *, squared: bool = False) -> Tensor:
    """VHD [B, H] = ``|a_h - t_h|_2`` (squared if asked) for head outputs with and without the image, [B, H, Dv]."""
    distance = (seen - blind).pow(2).sum(-1)
    return distance if squared else distance.sqrt()


def outliers(vhd: Tensor, blind: Tensor, ddof: int = 0) -> Tensor:
    """bool [B, H]: heads that fire *because* the image is gone: ``vhd`` and ``|t_h|^2`` both above mean + std of the
    layer's heads (strictly; ddof: 0 population, 1 sample). vhd: [B, H]. blind: [B, H, Dv]."""
    high = lambda x: x > x.mean(1, keepdim=True) + x.std(1, correction=ddof, keepdim=True)
    return high(vhd) & high(blind.pow(2).sum(-1))


def choose_heads(
    seen: Tensor, blind: Tensor, *, squared: bool = False, drop_outliers: bool = True, ddof: int = 0
) -> Tensor:
    """bool [B, H]: heads whose divergence, 0 for outliers, is strictly above the median of their layer.

    seen, blind: output of the heads before W_O in the row that predicts the answer, with and without the image,
    [B, H, Dv]. The median of an even number of heads is the mean of the two in the middle.
    """
    if seen.dtype in (torch.float16, torch.bfloat16):
        seen = seen.float()
    blind = blind.to(seen.dtype)
    vhd = divergence(seen, blind, squared=squared)
    if drop_outliers and vhd.shape[1] > ddof:
        vhd = vhd.masked_fill(outliers(vhd, blind, ddof), 0.0)
    return vhd > vhd.quantile(0.5, 1, keepdim=True)


@register_patch("vhr")
@dataclass
class VisionAwareHeadReinforcement(Patch):
    """Scale up the heads whose output the image changes most, chosen once per prompt by a pass without it.

    Source: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, arXiv 2412.13949 (ACL 2025;
    equations 4 to 7 READ in a stored copy of the paper; the authors' code was not available, so nothing here was
    compared with it: UNVERIFIED beyond the formula).

    Formula: a_h, t_h [Dv] = output of query head h before W_O in the last row of the prompt, with the image and with
    its tokens deleted; ``VHD_h = |a_h - t_h|_2``, set to 0 where VHD_h and ``|t_h|^2`` both exceed mean + std over the
    heads of the layer; heads with ``VHD_h > median`` (strictly) are multiplied by `alpha` in every row of the
    prompt and of the answer. Layers one after the other: a layer sees what earlier layers were made into.

    Neutral value: alpha = 1.

    Defaults: alpha 2; the second layer and the last 14, the paper's choice for LLaVA-1.5-7B and LLaVA-NeXT-7B of 32
    layers (InstructBLIP-7B: ``last=18``); the paper warns that the second layer does not always help. The paper leaves
    open what the options `branch`, `squared` and `ddof` choose; `drop_outliers=False` is its ablation, and
    with `squared=True` what a port to Qwen2.5-VL does (which also runs both branches clean before it scales: not here).

    Differs from the paper: works on batches (a gate per row), left and right padding, several images and beams. The
    choice is made where the prompt ends, in its one forward; a prompt read in parts is refused. Prompt and answer in
    one forward: say where the prompt ends with ``hap.prompt(model, length=...)``. Tokens that wrap an image go with
    it where the config names them, others (InternVL, Idefics) through `wrappers`. A row without an image is left
    alone. Models whose forward demands pixel values (InstructBLIP) are refused.
    Costs one forward of the text alone per prompt (``branch="joint"``: one per layer), none per token.
    """

    paper = "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence"
    arxiv = "2412.13949"
    parts = ("text",)
    default_part = "text"

    alpha: float = option(2.0, help="factor on the chosen heads (1 = dense)")
    last: int = option(14, help="how many of the last layers are edited")
    also: tuple[int, ...] = option((1,), help="further layers that are edited, negative ones from the end")
    branch: Literal["reference", "joint"] = option(
        "reference",
        help="the pass without the image runs clean, or with the same heads scaled in earlier layers",
    )
    squared: bool = option(False, help="squared distances: same ranking, another outlier test")
    drop_outliers: bool = option(True, help="never choose heads that fire because the image is gone")
    ddof: Literal[0, 1] = option(0, help="standard deviation of the outlier test: 0 population, 1 sample")
    wrappers: tuple[int, ...] = option(
        (), help="token ids taken out with the image, besides those that the config names"
    )

    def validate(self) -> None:
        self.require(
            self.alpha >= 0 and math.isfinite(self.alpha), "alpha", "a finite number >= 0 (1 = dense)"
        )
        self.require(self.last >= 0, "last", ">= 0")
        self.require(
            self.last > 0 or len(self.also) > 0, "last", "> 0, or layers in also=: else nothing is edited"
        )
        self.require(all(i >= 0 for i in self.wrappers), "wrappers", "token ids >= 0")

    def layers_of(self, depth: int) -> set[int]:
        """Layers that are edited of a model of `depth` layers."""
        own = {i + depth if i < 0 else i for i in self.also}
        return {i for i in own if 0 <= i < depth} | set(range(max(depth - self.last, 0), depth))

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        notes = image_keys.check_model(self.name, model, sites)
        image_free.check_model(self.name, model)
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if depth is None:
            raise ModelMismatchError(
                f"{self.name}: the config of {type(model).__name__} does not say how many layers its text part has "
                "(num_hidden_layers), so its last ones are unknown"
            )
        edited = self.layers_of(depth)
        if not any(s.layer in edited for s in sites):
            notes.append(
                f"{self.name} edits layers {sorted(edited)}, and none of them is among those chosen: nothing will be "
                "edited. Set last= and also="
            )
        elif (self.last, self.also) == (14, (1,)) and depth <= 16:
            notes.append(
                f"layer 1 and the last 14 were published for models of 32 layers; of the {depth} here that "
                "is nearly every one. Set last= and also="
            )
        return notes

    @property
    def _pass(self) -> image_free.ImageFreePass:
        return image_free.ImageFreePass(self.branch, tuple(sorted(self.wrappers)))

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return ImageKeys(), PromptLength(elastic=True), self._pass

    def edit(self, program: Program, call: Call) -> None:
        context = call.context
        assert context is not None
        if call.layer not in self.layers_of(image_keys.depth_in(context)):
            return
        key = f"vhr {call.key} {call.heads} {call.path}"
        if (
            context.image_free_pass is not None
        ):  # a joint pass: gates of earlier layers are known, later ones unused
            gate = of_rows(context.image_free_pass.memory, key, program.batch)
        else:
            gate = of_rows(context.memory, key, program.batch)
        if gate is not None:
            program.gate(gate.to(program.query.dtype)[:, None])
        elif context.image_free_pass is None:
            image = image_keys.image_columns(self.name, program, call)
            if image_free.ROWS in context.memory and program.mask.q_offset == 0:
                program.gate_by_output(lambda _, output: self._gate(output, call, key)[:, None])
            else:
                self._refuse(program, call, image)

    def _gate(self, output: Tensor, call: Call, key: str) -> Tensor:
        """Choose the heads by `output` [B, H, L, Dv] of the prompt; the factors [B, H] are kept with the cache."""
        context = call.context
        assert context is not None
        rows = context.memory[image_free.ROWS]
        index = torch.arange(len(output), device=output.device)
        seen = output.detach()[index, :, rows["last"].to(output.device)]
        blind = context.image_free(call.path, self._pass).to(output.device)
        chosen = choose_heads(
            seen, blind, squared=self.squared, drop_outliers=self.drop_outliers, ddof=self.ddof
        )
        # without an image both branches are the same prompt, and what is left of their difference is rounding
        chosen &= rows["has"].to(output.device)[:, None]
        if call.heads is not None:
            asked = torch.zeros_like(chosen)
            asked[:, list(call.heads)] = True
            chosen &= asked
        gate = torch.where(chosen, self.alpha, 1.0).to(seen.dtype)
        keep_rows(context.memory, key, gate)
        return gate

    def _refuse(self, program: Program, call: Call, image: Tensor) -> None:
        """Say why no heads can be chosen; returns where there is no image to choose by, which the caller said."""
        context, offset = call.context, program.mask.q_offset
        assert context is not None
        if not bool(image.any()):
            return
        if offset:
            raise CacheError(
                f"vhr: the cache holds {offset} tokens that were read without vhr, so the heads for this prompt are "
                "not chosen. Start with a fresh cache"
            )
        length, end = context.prompt_length, offset + program.q_len
        if length is not None and length > end:
            raise PatchError(
                f"vhr chooses its heads where the prompt ends, at token {length}, and this forward ends at token "
                f"{end}; read the prompt in one forward, or say length= less with hap.prompt"
            )
        raise ModelMismatchError(
            "vhr: this forward had no input_ids with images (inputs_embeds alone, or every image token is padding), "
            "and the pass without the image is made from them. Pass input_ids; naming the image keys is not enough"
        )

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"alpha": 1.0} if image_token_ids(model.config) else None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        return [{}, {"alpha": 3.0, "branch": "joint", "squared": True, "drop_outliers": False}]
