"""`var`: visual attention redistribution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...call.program import MassEdit, MassTransfer
from ...errors import CacheError, ModelMismatchError
from ...forward.conversation import keep_rows, of_rows
from ...forward.needs import ImageKeys, LayerInput
from ...forward.needs.images import image_token_ids
from ...registry import Patch, option, register_patch
from . import image_keys
from .sink_dims import SINK_DIMS, dims_of, plain, sink_tokens

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

OTHER, IMAGE, IMAGE_SINK, TEXT_SINK = range(4)


@dataclass(frozen=True)
class Preset:
    """What a source does where sources differ. rho: largest sink share. move: fraction of the sinks' mass that moves.
    skip_last: the last layer is left alone."""

    rho: float
    move: float
    skip_last: bool


PRESETS = {
    "code": Preset(0.5, 0.4, False),
    "paper": Preset(0.5, 0.6, True),
    "paper_vqa": Preset(0.2, 0.6, True),
    "paper_vision": Preset(0.1, 0.6, True),
}


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

    Presets, where the released code and the paper differ (``rho``, ``move``, ``skip_last``, each of which may be set):

    | preset       | rho | move | last layer | |
    |--------------|-----|------|------------|---|
    | code         | 0.5 | 0.4  | edited     | released code: *keeps* p = 0.6; its last-layer switch has no effect |
    | paper        | 0.5 | 0.6  | left alone | p is *taken*; rho 0.5 is the paper's for hallucination |
    | paper_vqa    | 0.2 | 0.6  | left alone | the paper's 0.8 for general questions is 1 - rho |
    | paper_vision | 0.1 | 0.6  | left alone | the paper's 0.9 for vision-centric questions is 1 - rho |

    The paper's numbers come from a reading note and a survey (UNVERIFIED). Sink dimensions belong to the language
    model: a name of the table in ``sink_dims.py``, or what ``hf-attn-patch calibrate sink_dims`` writes.

    Differs from the original code: works on batches, left padding and several images. A row counts as "behind the
    image" when it is no image token itself and has an image key before it, which for one image is the
    original's rule and does not depend on later tokens. Sinks are found in the prompt, as ``generate`` knows it, or
    else in every forward of several tokens, and generated tokens never become sinks; when prompt and answer are scored
    in one forward, say where the prompt ends with ``hap.prompt(model, length=...)``. Third parties report
    better POPE, but *worse* CHAIR captions.
    """

    paper = "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
    arxiv = "2503.03321"
    parts = ("text",)
    default_part = "text"
    needs = (ImageKeys(), LayerInput())
    exclusive = frozenset({"key classes"})
    causal_only = True

    dims: tuple[int, ...] | dict | str = option(
        help="sink dimensions of the hidden state, a file of `calibrate sink_dims`, or one of "
        + ", ".join(SINK_DIMS),
        path=True,
        known=SINK_DIMS,
    )
    preset: Literal["code", "paper", "paper_vqa", "paper_vision"] = option(
        "code",
        help="values of rho, move and skip_last that are not set: of the released code, or of the paper",
    )
    tau: float = option(20.0, help="a token is a sink when phi exceeds this")
    rho: float | None = option(
        None, help="largest share of sinks in the image mass of an image-centric head (1 - the paper's rho)"
    )
    min_mass: float = option(0.2, help="smallest image mass of an image-centric head")
    move: float | None = option(
        None, help="fraction of the sinks' mass that moves; 1 - move is kept (0 = dense)"
    )
    first_layer: int = option(2, help="layers before this one are left alone")
    skip_last: bool | None = option(None, help="leave the last layer alone")

    def validate(self) -> None:
        self.dims = plain(self.dims, self.name)  # an adapter keeps the dimensions, not the path of a file
        self.require(
            len(self._dims) > 0 and all(d >= 0 for d in self._dims), "dims", "at least one index >= 0"
        )
        self.require(self.tau > 0, "tau", "> 0")
        self.require(self.rho is None or 0 <= self.rho <= 1, "rho", "0..1")
        self.require(0 <= self.min_mass <= 1, "min_mass", "0..1")
        self.require(self.move is None or 0 <= self.move <= 1, "move", "0..1")
        self.require(self.first_layer >= 0, "first_layer", ">= 0")

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        notes = image_keys.check_model(self.name, model, sites)
        width = getattr(model.config.get_text_config(), "hidden_size", None)
        if width is not None and max(self._dims) >= width:
            raise ModelMismatchError(
                f"var: sink dimension {max(self._dims)} does not exist, hidden states have {width}"
            )
        if isinstance(self.dims, dict):
            notes += self._fits(self.dims, model, width)
        if width is not None and self.tau >= math.sqrt(width):
            notes.append(
                f"tau={self.tau:g} is out of reach: with {width} channels no ratio exceeds {math.sqrt(width):.3g}, so "
                "nothing will be edited"
            )
        layers = image_keys.depth(model, sites)
        if not any(self.first_layer <= s.layer < layers - self.chosen.skip_last for s in sites):
            but = ", the last one left alone" if self.chosen.skip_last else ""
            notes.append(
                f"first_layer={self.first_layer}, but the model has {layers} layers{but}: nothing will be edited"
            )
        return notes

    def _fits(self, found: dict, model: Any, width: int | None) -> list[str]:
        """Notes on a calibration that was made for another model; refuses one for another width."""
        name = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/").split("/")[-1]
        made = str(found.get("model") or "").split("/")[-1]
        if width is not None and found.get("hidden_size", width) != width:
            raise ModelMismatchError(
                f"var: the sink dimensions were calibrated on hidden states of {found['hidden_size']}, this model "
                f"has {width}; calibrate them for this model (hf-attn-patch calibrate sink_dims)"
            )
        return (
            [f"the sink dimensions were calibrated for {made}, this model is {name}"] if made != name else []
        )

    @property
    def chosen(self) -> Preset:
        """rho, move and skip_last as they are used: what was set, else of the preset."""
        given = {name: getattr(self, name) for name in ("rho", "move", "skip_last")}
        return replace(PRESETS[self.preset], **{k: v for k, v in given.items() if v is not None})

    @property
    def _dims(self) -> tuple[int, ...]:
        return dims_of(self.dims)

    def _sinks(self, call: Call, columns: Tensor, seen: int) -> Tensor:
        """bool [B, columns seen]: sinks of this layer, found while tokens are read and remembered per cache."""
        context = call.context
        assert context is not None
        hidden = context.layer_input(call.path).detach()  # a decision, not a differentiable quantity
        told = (
            context.prompt_length
            if getattr(context.memory, "told", False)
            else context.override.get("length")
        )
        if columns.numel() > 1 or told is not None:
            found = sink_tokens(hidden, self._dims, self.tau)
            if told is not None:
                found = found & (columns < told)
        else:
            found = hidden.new_zeros(hidden.shape[:2], dtype=torch.bool)
        key = f"var sinks {call.path}"
        before = of_rows(context.memory, key, found.shape[0])
        if seen == 0:
            before = found.new_zeros(found.shape[0], 0)
        if before is None:
            raise CacheError(
                f"var: the cache holds {seen} tokens that were read while var was not on {call.path}, so its sink "
                "tokens are unknown. Start with a fresh cache"
            )
        sinks = torch.cat([before[:, :seen].expand(found.shape[0], -1), found], 1)
        keep_rows(context.memory, key, sinks)
        return sinks

    def edit(self, program: Program, call: Call) -> None:
        if call.layer < self.first_layer:
            return
        context, chosen = call.context, self.chosen
        assert context is not None
        if chosen.skip_last and call.layer == image_keys.depth_in(context) - 1:
            return
        columns = program.mask.query_columns
        sinks = self._sinks(call, columns, program.mask.q_offset)
        image = context.image_keys
        if image is None:
            raise ModelMismatchError(
                "var: this forward had no input_ids, so image tokens are unknown; pass them, or name the image "
                "keys with hap.prompt(model, image_keys=...)"
            )
        end = program.mask.q_offset + program.mask.q_len
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
        program.mass_edits.append(
            MassEdit(transfer(chosen.rho, self.min_mass, chosen.move), 4, rows, call.heads)
        )

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
