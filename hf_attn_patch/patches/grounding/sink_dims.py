"""Sink dimensions: channels of the hidden state that are huge in attention sinks, per language model (no method).

They belong to the language model, not to the vision-language model around it. For models that the table does
not know, ``hf-attn-patch calibrate sink_dims`` writes a file that is read here.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...options import option_file

READ = "READ seilk/VisAttnSink 98e62d6 src/logic/constants.py"
NOTE = "UNVERIFIED: a reading note of the paper (arXiv 2503.03321)"
TABLE = "UNVERIFIED: a table in third-party code"

# name -> (dimensions, where that is from)
SOURCES: dict[str, tuple[tuple[int, ...], str]] = {
    "llama-2-7b": ((1415, 2533), READ),  # LLaVA-1.5-7B, Vicuna-7B
    "llama-2-13b": ((2100, 4743), READ),  # LLaVA-1.5-13B, LLaVA-1.6-Vicuna-13B
    "qwen2-vl-7b": ((458, 2570), NOTE),
    "internvl2-8b": ((3584,), NOTE),
    "qwen2-vl-2b": ((1073, 534, 940), TABLE),
    "qwen2.5-vl-3b": ((318, 1874, 1819), TABLE),
    "qwen2.5-vl-7b": ((458, 2570), TABLE),
    "qwen2.5-vl-32b": ((4675, 3094), TABLE),
    "qwen3-vl-2b": ((1793, 1999, 1401), TABLE),
    "qwen3-vl-4b": ((0,), TABLE),
    "qwen3-vl-8b": ((1838,), TABLE),
}
SINK_DIMS: dict[str, tuple[int, ...]] = {name: dims for name, (dims, _) in SOURCES.items()}


def ratios(hidden: Tensor, eps: float = 1e-6) -> Tensor:
    """``|x_d| / sqrt(mean_d x^2 + eps)`` for hidden states [..., C] (RMS over all channels, without a norm's gain)."""
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    return hidden.abs() / hidden.pow(2).mean(-1, keepdim=True).add(eps).sqrt()


def sink_tokens(hidden: Tensor, dims: tuple[int, ...], tau: float, eps: float = 1e-6) -> Tensor:
    """bool [B, L]: ``max_{d in dims} |x_d| / sqrt(mean_d x^2 + eps) > tau`` for hidden states [B, L, C]."""
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    rms = hidden.pow(2).mean(-1).add(eps).sqrt()
    return hidden[..., list(dims)].abs().amax(-1) / rms > tau


def plain(source: Any, who: str) -> Any:
    """Dimensions as given (a tuple, or a name of the table), or the data of a calibration (a file or a dict).

    Raises:
        ConfigError: neither a name nor a file, or a calibration without dimensions.
    """
    if isinstance(source, str) and source not in SINK_DIMS:
        file = source
        missing = (
            f"is not known and no file; known models: {', '.join(SINK_DIMS)}. For another model: hf-attn-patch "
            "calibrate sink_dims"
        )
        try:
            source = json.loads(option_file(who, "dims", file, missing=missing))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{who}: {file} is not valid JSON: {error}") from error
        if not isinstance(source, dict):
            raise ConfigError(f"{who}: {file} holds {type(source).__name__}, expected {{'dims': [...], ...}}")
    if isinstance(source, dict):
        found = source.get("dims")
        if not isinstance(found, list) or not all(type(d) is int for d in found):
            raise ConfigError(f"{who}: dims={source!r} has no list of numbers under 'dims'")
        if not found:
            raise ConfigError(
                f"{who}: the calibration found no sink dimension, so sink tokens of this model cannot be told by "
                f"{who}'s rule; take another method"
            )
    return source


def dims_of(source: Any) -> tuple[int, ...]:
    """The dimensions of what `plain` returned."""
    if isinstance(source, str):
        return SINK_DIMS[source]
    return tuple(source["dims"] if isinstance(source, dict) else source)
