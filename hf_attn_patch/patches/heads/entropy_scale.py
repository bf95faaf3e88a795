"""`entropy_scale`: queries scaled by the log of how many keys they see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call.program import head_selector
from ...errors import ModelMismatchError
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.mask import Mask
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

PIECE = 1 << 22  # mask elements looked at at once


def visible_keys(mask: Mask) -> Tensor:
    """Number of real keys each query may see under `mask`, int64 [B|1, L] (keys a cache dropped included)."""
    columns = mask.query_columns
    if not mask.arithmetic:  # packed sequences, image tokens that see each other, a mask of the user's
        size = max(1, PIECE // (mask.batch * max(mask.kv_len, 1)))
        keys = mask.key_columns
        counts = [mask.block(rows, keys).sum(-1).amax(1) for rows in columns.split(size)]
        return torch.cat(counts, -1)
    end = mask.kv_offset + mask.kv_len
    last = columns + 1 if mask.causal else torch.full_like(columns, end)
    first = (columns - mask.window + 1).clamp(min=0) if mask.window is not None else torch.zeros_like(columns)
    if mask.padding is None:
        return (last - first)[None]
    before = torch.nn.functional.pad(mask.padding.long().cumsum(-1), (1, 0))  # real tokens before a column
    return before[:, last] - before[:, first]


def log_scale(count: Tensor, trained: int, gamma: float, clip: bool) -> Tensor:
    """``(ln max(n, 2) / ln max(T, 2)) ** gamma`` of counts n, not below 1 with `clip`; float64, shape of `count`."""
    factor = (count.clamp(min=2).double().log() / math.log(max(trained, 2))) ** gamma
    return factor.clamp(min=1.0) if clip else factor


def trained_length(config: Any, part: str) -> int | None:
    """Tokens a model was trained on, from its config; None where that does not say (grids of images)."""
    if part == "vision":
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, dict) else {}
    names = [
        "original_max_position_embeddings",
        "max_position_embeddings",
        "n_positions",
        "max_target_positions",
    ]
    if part == "audio":
        names = ["max_source_positions", *names]
    for name in names:
        found = rope.get(name, getattr(config, name, None))
        if isinstance(found, int) and found > 1:
            return found
    return None


def scales_already(config: Any) -> str | None:
    """The setting by which a model scales its own queries with the position, or None."""
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "attn_temperature_tuning", False):
        return "attn_temperature_tuning"
    return "llama_4_scaling_beta" if isinstance(rope, dict) and rope.get("llama_4_scaling_beta") else None


@register_patch("entropy_scale")
@dataclass
class EntropyScale(Patch):
    """Scale queries by the log of how many keys they see (log-n, sqrt(log N / log T)).

    Source: Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis, arXiv 2306.08645 (no
    official code; formula READ in a third-party diffusers processor that cites it), and log-n scaling as in Qwen-1
    (from memory, UNVERIFIED). Numbers of other people's runs (SD 224 px FID 74.6 -> 41.9) are UNVERIFIED.

    Formula: ``q_i <- f_i q_i`` with ``f_i = (ln max(n_i, 2) / ln max(T, 2)) ** gamma``, q [B, H, L, D], f
    [B, 1, L, 1]: n_i is the number of keys that query i may see (causal: its position, 1 for the first real token;
    bidirectional: the real tokens of its row), T that in training. ``clip`` keeps f_i >= 1. ``length`` sets n by
    length instead of by position: one number for all queries. With a sliding window W, n and T are at most W.

    Neutral value: gamma = 0 (also: n_i <= T with clip).

    Defaults: on causal layers log-n, gamma 1 and clip (Qwen-1: q_i * max(1, ln i / ln T)); on bidirectional ones the
    paper's sqrt(log N / log T), gamma 0.5, no clip. T is the config's (original) maximal position; an image tower has
    none, so say ``train_length`` there. The exponent is an option because theory disagrees (log^0.5, log, log^2).

    Differs from the original code: n is taken from the mask, so that left padding and chunks of a prompt change
    nothing and decoding goes by absolute position (what other patches choose not to *read* still counts). Models
    that scale their queries by position themselves (Llama 4, Ministral 3) are refused. Entropy is not kept
    constant by this, its drift is only damped.
    """

    counts = "edit"
    paper = "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis"
    arxiv = "2306.08645"
    head_state = ()
    parts = ("text", "vision", "audio", "encoder", "decoder")
    default_part = "text"

    train_length: int | None = option(
        None, help="T, keys seen in training; None = the config's maximal position"
    )
    gamma: float | None = option(None, help="exponent; None = 1 (log-n) on causal layers, 0.5 elsewhere")
    clip: bool | None = option(None, help="never scale below 1; None = on causal layers only")
    length: int | None = option(None, help="n for every query; None = the keys it may see")
    _sites: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # path -> (T, causal)

    def validate(self) -> None:
        self.require(self.train_length is None or self.train_length >= 2, "train_length", ">= 2 or None")
        # (ln 2^31 / ln 2) ^ 16 is 7e23: float32 still holds the square of a query times that
        self.require(self.gamma is None or abs(self.gamma) <= 16, "gamma", "in [-16, 16] or None")
        self.require(self.length is None or self.length >= 1, "length", ">= 1 or None")

    def check(self, site: Site) -> None:
        config = getattr(site.module, "config", None)
        trained = self.train_length or trained_length(config, site.part)
        if trained is None:
            raise ModelMismatchError(
                f"entropy_scale: the config of {site.path} does not say how many tokens it was trained on; give "
                "train_length (an image tower: number of patches at its training size)"
            )
        setting = scales_already(config)
        if setting is not None:
            raise ModelMismatchError(
                f"entropy_scale: {site.path} scales its queries by position already ({setting}); two scales would "
                f"multiply. Exclude it with layers=..., or load the model with {setting} off"
            )
        self._sites[site.path] = (trained, site.causal)  # what an attention call is not told

    def edit(self, program: Program, call: Call) -> None:
        trained, causal = self._sites[call.path]
        gamma = (1.0 if causal else 0.5) if self.gamma is None else self.gamma
        mask = program.mask
        if self.length is None:
            count = visible_keys(mask)  # a sliding window is in there already
        else:
            count = torch.full((1, 1), min(self.length, mask.window or self.length), device=mask.device)
        factor = log_scale(
            count, min(trained, mask.window or trained), gamma, causal if self.clip is None else self.clip
        )
        query = program.query
        factor = factor.to(query.device, torch.promote_types(query.dtype, torch.float32))
        factor = factor[:, None, :, None].expand(-1, -1, program.q_len, -1)
        chosen = head_selector(call.heads, program.num_heads, query.device)
        if chosen is not None:
            factor = torch.where(chosen, factor, 1.0)
        program.query_scale = factor if program.query_scale is None else program.query_scale * factor

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"gamma": 0.0, "train_length": 16}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [
            {"train_length": 4},
            {"train_length": 6, "gamma": 0.5, "clip": False},
            {"train_length": 4, "gamma": 2.0, "length": 64},
        ]
