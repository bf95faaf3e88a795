"""`var`: visual attention redistribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...context import image_token_ids
from ...errors import CacheError, ConfigError, ModelMismatchError
from ...program import MassEdit, MassTransfer
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...dispatch import Call
    from ...program import Program
    from ...sites import Site

# Dimensions of the hidden state that are huge in sink tokens; a property of the language model.
SINK_DIMS: dict[str, tuple[int, ...]] = {
    "llama-2-7b": (1415, 2533),  # READ seilk/VisAttnSink src/logic/constants.py; LLaVA-1.5-7B, Vicuna-7B
    "llama-2-13b": (2100, 4743),  # READ, same file; LLaVA-1.5-13B
    "qwen2-vl-7b": (458, 2570),  # from a reading note of the paper, UNVERIFIED here
    "internvl2-8b": (3584,),  # same note, UNVERIFIED here
}

OTHER, IMAGE, IMAGE_SINK, TEXT_SINK = range(4)


def sink_tokens(hidden: Tensor, dims: tuple[int, ...], tau: float, eps: float = 1e-6) -> Tensor:
    """bool [B, L]: ``max_{d in dims} |x_d| / sqrt(mean_d x^2 + eps) > tau`` for hidden states [B, L, C]."""
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    rms = hidden.pow(2).mean(-1).add(eps).sqrt()
    return hidden[..., list(dims)].abs().amax(-1) / rms > tau


def transfer(rho: float, min_mass: float, move: float) -> MassTransfer:
    """Where the sink share ``m_is / (m_i + m_is + 1e-6 n) <= rho`` (n image keys, the 1e-6 is added per key in the
    original) and the image mass ``m_i + m_is >= min_mass``, sinks keep ``1 - move`` of their mass and the moved mass
    goes to the other image keys in proportion."""
    return MassTransfer(
        take=(0.0, 0.0, move, move), give=IMAGE, within=(IMAGE, IMAGE_SINK), limited=(IMAGE_SINK,),
        min_mass=min_mass, max_share=rho, count_eps=1e-6,
    )  # fmt: skip


@register_patch("var")
@dataclass
class VisualAttentionRedistribution(Patch):
    """Move attention from sink tokens to the image tokens in image-centric heads.

    Source: See What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv 2503.03321
    (seilk/VisAttnSink, READ and RAN; the paper's own tables were not readable, UNVERIFIED).

    Formula: token j is a sink of a layer if ``max_{d in dims} |x_jd| / RMS(x_j) > tau``, x the hidden state entering
    the layer. After softmax, in rows behind an image and heads with image mass >= min_mass and sink share of that
    mass <= rho, sinks (image and text) keep ``1 - move`` of their probability, and what they lose goes to the
    image keys that are no sinks, in proportion. Rows keep sum 1; other keys are untouched.

    Neutral value: move = 0.

    Conventions: ``move=0.4`` is the released code (it *keeps* p = 0.6), ``move=0.6`` the paper's wording. The released
    code also edits the last layer, the paper does not: exclude it with ``layers="2:-1"``.

    Differs from the original code: works on batches, left padding and several images. A row counts as "behind the
    image" when it is no image token itself and has an image key before it, which for one image is the
    original's rule and does not depend on later tokens. Sinks are found in every forward of several tokens, and
    generated tokens never become sinks; when prompt and answer are scored in one forward, say where the prompt
    ends with ``hap.prompt(model, length=...)``. Third parties report better POPE, but *worse* CHAIR captions.
    """

    paper = "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
    arxiv = "2503.03321"
    parts = ("text",)
    default_part = "text"
    needs = frozenset({"image_keys", "layer_input"})
    exclusive = frozenset({"key classes"})
    causal_only = True

    dims: tuple[int, ...] | str = option(
        help=f"sink dimensions of the hidden state, or one of {', '.join(SINK_DIMS)}"
    )
    tau: float = option(20.0, help="a token is a sink when phi exceeds this")
    rho: float = option(0.5, help="largest share of sinks in the image mass of an image-centric head")
    min_mass: float = option(0.2, help="smallest image mass of an image-centric head")
    move: float = option(0.4, help="fraction of the sinks' mass that moves (released code 0.4, paper 0.6)")
    first_layer: int = option(2, help="layers before this one are left alone")

    def validate(self) -> None:
        if isinstance(self.dims, str):
            if self.dims not in SINK_DIMS:
                raise ConfigError(
                    f"var: dims={self.dims!r} is not known; known models: {', '.join(SINK_DIMS)}"
                )
        self.require(
            len(self._dims) > 0 and all(d >= 0 for d in self._dims), "dims", "at least one index >= 0"
        )
        self.require(self.tau > 0, "tau", "> 0")
        self.require(0 <= self.rho <= 1, "rho", "0..1")
        self.require(0 <= self.min_mass <= 1, "min_mass", "0..1")
        self.require(0 <= self.move <= 1, "move", "0..1")
        self.require(self.first_layer >= 0, "first_layer", ">= 0")

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        if not image_token_ids(model.config):
            raise ModelMismatchError(
                f"var: the config of {type(model).__name__} names no image token (image_token_id); it is for "
                "vision-language models"
            )
        width = getattr(model.config.get_text_config(), "hidden_size", None)
        if width is not None and max(self._dims) >= width:
            raise ModelMismatchError(
                f"var: sink dimension {max(self._dims)} does not exist, hidden states have {width}"
            )
        layers = max(s.layer for s in sites) + 1
        if self.first_layer >= layers:
            return [
                f"first_layer={self.first_layer}, but the model has {layers} layers: nothing will be edited"
            ]
        return []

    @property
    def _dims(self) -> tuple[int, ...]:
        return SINK_DIMS[self.dims] if isinstance(self.dims, str) else self.dims

    def _sinks(self, call: Call, columns: Tensor) -> Tensor:
        """bool [B, columns seen]: sinks of this layer, found while tokens are read and remembered per cache."""
        context = call.context
        assert context is not None
        hidden = context.layer_input(call.path).detach()  # a decision, not a differentiable quantity
        if columns.numel() > 1:
            found = sink_tokens(hidden, self._dims, self.tau)
            if "length" in context.override:
                found = found & (columns < context.override["length"])
        else:
            found = hidden.new_zeros(hidden.shape[:2], dtype=torch.bool)
        key = f"var sinks {call.path}"
        before = context.memory.get(key)
        seen = int(columns[0])
        if seen == 0:
            before = found.new_zeros(found.shape[0], 0)
        if before is None:
            raise CacheError(
                f"var: the cache holds {seen} tokens that were read while var was not on {call.path}, so its sink "
                "tokens are unknown. Start with a fresh cache"
            )
        if before.shape[0] != found.shape[0]:  # rows of one item share their prompt
            before = before.repeat_interleave(found.shape[0] // before.shape[0], 0)
        sinks = torch.cat([before[:, :seen], found], 1)
        context.memory[key] = sinks
        return sinks

    def edit(self, program: Program, call: Call) -> None:
        if call.layer < self.first_layer:
            return
        context = call.context
        assert context is not None
        columns = program.mask.query_columns
        sinks = self._sinks(call, columns)
        image = context.image_keys
        if image is None:
            raise ModelMismatchError(
                "var: this forward had no input_ids, so image tokens are unknown; pass them, or name the image "
                "keys with hap.prompt(model, image_keys=...)"
            )
        end = int(columns[-1]) + 1
        image = image[:, :end].to(sinks.device)
        if image.shape[1] < end:  # hap.prompt spoke of the prompt; its answer holds no image tokens
            image = torch.nn.functional.pad(image, (0, end - image.shape[1]))
        visual_sink = image & sinks
        classes = torch.zeros(image.shape, dtype=torch.int8, device=image.device)
        classes[image] = IMAGE
        classes[visual_sink] = IMAGE_SINK
        classes[sinks & ~image] = TEXT_SINK
        # a layer without visual sinks is left alone (per sample), as in the original
        here = image[:, columns]
        behind = ~here & (image.cumsum(1)[:, columns] > 0)
        rows = behind & visual_sink.any(1, keepdim=True)
        if program.mask.kv_offset + program.mask.kv_len > end:  # static caches are longer than what was seen
            pad = program.mask.kv_offset + program.mask.kv_len - end
            classes = torch.nn.functional.pad(classes, (0, pad))
        program.classify(classes)
        program.mass_edits.append(MassEdit(transfer(self.rho, self.min_mass, self.move), 4, rows, call.heads))

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return (
            {"dims": [0], "tau": 0.5, "move": 0.0, "first_layer": 0}
            if image_token_ids(model.config)
            else None
        )

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not image_token_ids(model.config):
            return []
        common = {"dims": [0, 3], "tau": 1.2, "rho": 0.9, "min_mass": 0.01, "first_layer": 0}
        return [{**common, "move": 0.4}, {**common, "move": 1.0, "rho": 0.5}]
