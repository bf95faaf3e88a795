"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_buffers_hold_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is full of NaN, so that reading it before writing it shows."""

    def poisoned(original):
        def empty(*args, **kwargs):
            x = original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Nothing here patches a model, and the garbage collection of the suite-wide check would take most of the time."""
    yield
