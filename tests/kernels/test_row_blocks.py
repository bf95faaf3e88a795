"""Runs of query rows: few, whatever the batch, as long as memory allows; and nothing depends on how many."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.kernels import attention, row_blocks

from .budget import assert_within_budget
from .cases import edit, make, opaque, ragged

GIB = 1 << 30


def of_size(B, H, Hkv, L, S, device="meta"):
    new = lambda *shape: torch.empty(*shape, device=device)
    return Program(
        new(B, H, L, 64), new(B, Hkv, S, 64), new(B, Hkv, S, 64), Mask(B, L, S, causal=True), 0.125
    )


def runs(B, H, Hkv, L, S, edited):
    return row_blocks.runs_of_rows(of_size(B, H, Hkv, L, S, "meta"), torch.arange(L), edited)


@pytest.fixture
def cpu(monkeypatch):
    """Meta tensors stand for tensors on a CPU with 16 GiB to spare."""
    real = row_blocks.rows_of_run
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: 16 * GIB)
    monkeypatch.setattr(row_blocks, "rows_of_run", lambda d, *rest: real(torch.device("cpu"), *rest))


@pytest.mark.parametrize("edited, most", [(False, 4096 // 64), (True, 4096 // 8)], ids=["plain", "edited"])
def test_a_large_batch_is_no_loop_over_tokens(cpu, edited, most):
    found = runs(16, 32, 8, 4096, 4096, edited)
    assert len(found) <= most and torch.equal(torch.cat(found), torch.arange(4096))


def test_accelerators_get_longer_runs(monkeypatch):
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: 64 * GIB)
    assert len(runs(16, 32, 8, 4096, 4096, True)) == 4096 // 64


def test_small_calls_are_cut_as_their_caches_like_it_and_ask_for_no_memory(cpu, monkeypatch):
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: pytest.fail("asked"))
    assert len(runs(1, 9, 3, 1024, 1024, True)) == 5
    assert len(runs(1, 9, 3, 1024, 1024, False)) == 4
    assert len(runs(64, 32, 8, 1, 1 << 20, True)) == 1


def test_short_memory_cuts_runs_down_to_a_row(cpu, monkeypatch):
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: GIB)
    per_row = 16 * 32 * 4096 * 4 * row_blocks.COPIES
    longest = max(len(r) for r in runs(16, 32, 8, 512, 4096, True))
    assert longest == row_blocks.SHARE * GIB // per_row == 5
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: 0)
    assert len(runs(16, 32, 8, 512, 4096, True)) == 512


def test_a_cpu_tells_how_much_memory_is_free():
    assert (1 << 20) < row_blocks.free_bytes(torch.device("cpu")) < (1 << 46)


@pytest.mark.parametrize("free", [0, 1 << 16, 1 << 40])
def test_results_do_not_depend_on_the_memory_that_is_free(monkeypatch, free):
    monkeypatch.setattr(row_blocks, "free_bytes", lambda device: free)
    monkeypatch.setattr(row_blocks, "ELEMENTS_CPU", 1 << 10)
    assert_within_budget(make(rule=opaque, pads=[(9, 0), (0, 3)]), gradients=True)
    assert_within_budget(edit(make(L=100, pads=[(9, 0), (0, 3)]), softcap=2.0), gradients=True)
    assert_within_budget(ragged(7, [20, 50, 20]))
    assert attention(make(L=33), "torch").output.shape == (2, 4, 33, 16)
