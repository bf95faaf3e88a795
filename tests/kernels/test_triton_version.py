"""A triton that is too old for the kernels is passed over with a reason, not imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from hf_attn_patch import kernels


@pytest.mark.parametrize(
    "installed, words",
    [
        ("3.2.0", ["3.2.0", "3.6"]),
        ("3.5.1", ["3.5.1"]),
        (None, ["not installed"]),
        ("3.6.0", None),
        ("3.10.0+x", None),
    ],
)
def test_old_triton_is_named(installed, words, monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "_missing", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    if words is None:
        assert kernels._without_triton() is None
        return
    reason = kernels.unavailable("triton", torch.device("cuda"))
    assert all(word in reason for word in words)
