"""Shared test settings: no network, deterministic, two threads at most."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton kernels run in the interpreter, on CPU tensors, unless there is a GPU (read when triton is imported)
if not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that leaves our attention function registered has left a patched model behind."""
    import gc

    from hf_attn_patch.install import dispatch

    yield
    if dispatch.registered():
        gc.collect()  # copies of patched models that only the garbage collector still knows
        dispatch.unregister_if_unused()
