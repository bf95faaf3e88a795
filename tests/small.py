"""Tiny models for the tests of the core, and the check that a refusal left a model exactly as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_attn_patch as hap
from hf_attn_patch.install import dispatch
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

from .conformance.families import as_double, snapshot

EXACT = 1e-9  # float64: two exact ways to compute one thing agree far below this, and a bug is far above it


def model_of(family: str, **overrides: Any) -> Any:
    """A fresh tiny model in float64 without gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_model(family, **overrides).double().requires_grad_(False)


def inputs_of(
    model: Any, batch: int = 2, length: int = 17, left_pad: Any = 0, seed: int = 0
) -> dict[str, Any]:
    return as_double(tiny_inputs(model, batch=batch, length=length, left_pad=left_pad, seed=seed))


def output(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    """First output of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs, **more)[0]


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    error = float((a - b).abs().max()) if a.numel() else 0.0
    assert torch.isfinite(a).all(), f"{what}: not finite"
    assert error <= EXACT * max(float(b.abs().max()), 1.0), f"{what}: {error:.3g} off"


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 100 * EXACT


@contextmanager
def untouched(model: Any, inputs: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside, something is refused; afterwards the model prints, saves and computes as before, to the last bit."""
    inputs = inputs_of(model) if inputs is None else inputs
    before, active, dense = snapshot(model), [h.name for h in hap.active(model)], output(model, inputs)
    registered = dispatch.registered()
    yield
    after = snapshot(model)
    for key in before:
        assert after[key] == before[key], key
    assert [h.name for h in hap.active(model)] == active
    assert dispatch.registered() == registered
    assert torch.equal(output(model, inputs), dense)


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises `error`, and its message holds every one of `words`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
