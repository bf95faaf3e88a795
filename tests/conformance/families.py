"""Tiny models of the families every patch is tested on, and the (family, patch, options) cases that apply.

Nothing here names a patch: cases come from the registry, and from what `hap.plan` accepts.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

FAMILIES = (
    "llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "bert", "whisper", "vit", "dinov2", "clip", "siglip",
    "videomae",
    "llava", "qwen2_5_vl", "gemma3", "gpt_oss",
)  # fmt: skip
# forward(input_ids, attention_mask) -> one output per token; decoders also take a cache
PER_TOKEN = (
    "llama",
    "qwen3",
    "gemma3_text",
    "gpt2",
    "mixtral",
    "bert",
    "llava",
    "qwen2_5_vl",
    "gemma3",
    "gpt_oss",
)
DECODERS = tuple(f for f in PER_TOKEN if f != "bert")
LENGTH = 17
# "head_gate-0-*,moa-?-llama": the cases to make, by name (scripts/versions.py); none said: all of them
CHOSEN = [pattern for pattern in os.environ.get("HAP_CONFORMANCE", "").split(",") if pattern]


@functools.cache
def _model(family: str, overrides: tuple = ()) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(family, **dict(overrides)).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matmul of experts has no float64
    model.requires_grad_(False)
    return model


def model_of(family: str, **overrides: Any) -> Any:
    """A float64 tiny model (shared between tests, which must leave it as they found it: `assert_pristine`)."""
    model = _model(family, tuple(sorted(overrides.items())))
    assert not hap.active(model), "an earlier test left a patch on this model"
    return model


def as_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }


def inputs_of(
    family: str, batch: int = 2, length: int = LENGTH, left_pad: Any = 0, seed: int = 0
) -> dict[str, Any]:
    """Inputs of the family in float64; text is left-padded where asked, with positions that skip the padding."""
    model = _model(family)
    inputs = as_double(tiny_inputs(model, batch=batch, length=length, left_pad=left_pad, seed=seed))
    accepts = inspect.signature(type(model).forward).parameters
    mask = inputs.get("attention_mask")
    # Qwen-VL computes its own 3-D positions from ids and mask
    if (
        mask is not None
        and "position_ids" in accepts
        and "image_grid_thw" not in inputs
        and family in PER_TOKEN
    ):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if (
        "image_grid_thw" in inputs
    ):  # 3-D positions [3, B, L]; alone, the model only finds them in its first forward
        known = inspect.signature(model.model.get_rope_index).parameters
        inputs["position_ids"] = model.model.get_rope_index(
            **{k: v for k, v in inputs.items() if k in known}
        )[0]
    return inputs


def forward(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    """First output of a forward without gradients."""
    with torch.no_grad():
        output = model(**inputs, **more)
    return output[0]


def row_of(inputs: dict[str, Any], row: int, batch: int, skip: int = 0) -> dict[str, Any]:
    """One row of a batch, without its first `skip` (padding) tokens."""
    length = inputs["input_ids"].shape[1]
    alone = {}
    for name, value in inputs.items():
        if name == "position_ids" and value.ndim == 3:
            alone[name] = value[:, row : row + 1, skip:]
            continue
        share = value.shape[0] // batch
        value = value[row * share : (row + 1) * share]
        if value.ndim == 2 and value.shape[1] == length and name != "pixel_values":
            value = value[:, skip:]
        alone[name] = value
    return alone


def joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two single rows as one batch."""
    return {k: torch.cat([a[k], b[k]], 1 if k == "position_ids" and a[k].ndim == 3 else 0) for k in a}


def columns_of(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Tokens begin..end of every row; the mask covers everything seen so far, pixels come with the first part."""
    length = inputs["input_ids"].shape[1]
    part = {}
    for name, value in inputs.items():
        if name == "position_ids" and value.ndim == 3:
            value = value[..., begin:end]
        elif value.ndim == 2 and value.shape[1] == length and name != "pixel_values":
            value = value[:, :end] if name == "attention_mask" else value[:, begin:end]
        elif begin > 0:
            continue  # pixel values and grids belong to the first forward
        part[name] = value
    return part


def media_end(inputs: dict[str, Any], model: Any) -> int:
    """First column behind every image token (prefills must not cut an image)."""
    from hf_attn_patch.forward.needs.images import image_token_ids

    ids = inputs["input_ids"]
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in image_token_ids(model.config):
        found |= ids == token
    return int(found.nonzero()[:, 1].max()) + 1 if bool(found.any()) else 0


@dataclass(frozen=True)
class Case:
    """One patch with one set of options on one family."""

    family: str
    patch: str
    number: int

    @property
    def options(self) -> dict[str, Any]:
        return registry.get(self.patch).examples(_model(self.family))[self.number]

    def __str__(self) -> str:
        return f"{self.patch}-{self.number}-{self.family}"


def _chosen(case: Case) -> bool:
    return not CHOSEN or any(fnmatch.fnmatchcase(str(case), pattern) for pattern in CHOSEN)


@functools.cache
def _applies(family: str, patch: str, number: int) -> bool:
    options = registry.get(patch).examples(_model(family))[number]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hap.plan(_model(family), patch, **options)
            # a plan cannot know everything: a merging vision backbone shows only when it runs
            with hap.patched(_model(family), patch, **options):
                forward(_model(family), inputs_of(family))
            return True
        except ModelMismatchError:
            return False


@functools.cache
def cases(families: tuple[str, ...] = FAMILIES) -> tuple[Case, ...]:
    """Every (family, patch, example) the registry offers and the model accepts."""
    found = []
    for patch in hap.available():
        cls = registry.get(patch)
        for family in families:
            for number in range(len(cls.examples(_model(family)))):
                if _chosen(Case(family, patch, number)) and _applies(family, patch, number):
                    found.append(Case(family, patch, number))
    return tuple(found)


@contextmanager
def or_dense_too(run: Callable[[], Any]) -> Iterator[None]:
    """What fails inside is a skip if `run`, the same without a patch, fails as well: some versions of transformers
    cannot do what others can."""
    try:
        yield
    except Exception:
        try:
            run()
        except Exception as dense:
            said = str(dense).strip().splitlines() or [type(dense).__name__]
            pytest.skip(f"transformers {transformers.__version__} fails without a patch too: {said[0][:120]}")
        raise


def snapshot(model: Any) -> dict[str, Any]:
    """Everything an undo must bring back (weights aside)."""

    def configs(config: Any) -> list[Any]:
        found = [config]
        for key in getattr(config, "sub_configs", {}) or {}:
            child = getattr(config, key, None)
            if child is not None:
                found += configs(child)
        return found

    return {
        "state_dict": list(model.state_dict()),
        "modules": [(name, type(m)) for name, m in model.named_modules()],
        "configs": [c.to_dict() | {"attn": c._attn_implementation} for c in configs(model.config)],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        ],
        "attributes": sorted(model.__dict__),
        "print": repr(model),
        "classes": sorted({type(m).forward.__qualname__ for m in model.modules()}),
    }
