"""Fixtures of the Triton kernel tests: interpreter on a CPU, the real thing where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the triton extra is not installed")

from tests.kernels.conftest import fresh_buffers_hold_nan  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes bf16 wrongly, so only a GPU is asked for it
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture
def device() -> str:
    """Where kernels run here."""
    return DEVICE


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Nothing here patches a model, and the garbage collection of the suite-wide check would take most of the time."""
    yield
