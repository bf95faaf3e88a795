"""`Neighborhood` opens the windows that NATTEN opens (golden lists from its own masks)."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import Neighborhood

GOLDEN = {  # (length, window, stride, dilation, causal): first-last key of every query
    (8, 3, 1, 1, False): "0-2 0-2 1-3 2-4 3-5 4-6 5-7 5-7",
    (8, 4, 1, 1, False): "0-3 0-3 0-3 1-4 2-5 3-6 4-7 4-7",
    (8, 4, 2, 1, False): "0-3 0-3 1-4 1-4 3-6 3-6 4-7 4-7",
    (8, 4, 4, 1, False): "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7",
    (10, 4, 3, 1, False): "0-3 0-3 0-3 2-5 2-5 2-5 5-8 5-8 5-8 6-9",
    (10, 4, 4, 1, False): "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9",
    (8, 3, 1, 1, True): "0-0 0-1 0-2 1-3 2-4 3-5 4-6 5-7",
    (8, 4, 2, 1, True): "0-0 0-1 0-2 0-3 2-4 2-5 4-6 4-7",
    (8, 4, 4, 1, True): "0-0 0-1 0-2 0-3 4-4 4-5 4-6 4-7",
}
DILATED = {
    (8, 3, 1, 2, False): ["024", "135", "024", "135", "246", "357", "246", "357"],
    (9, 3, 1, 2, False): ["024", "135", "024", "135", "246", "357", "468", "357", "468"],
}


def windows(length, window, stride, dilation, causal):
    rule = Neighborhood((length,), (window,), (stride,), (dilation,), (causal,))
    at = torch.arange(length)
    seen = rule.visible(torch.tensor(0), at[:, None], at[None])
    return [row.nonzero()[:, 0].tolist() for row in seen]


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_windows(case):
    expected = [range(int(a), int(b) + 1) for a, b in (w.split("-") for w in GOLDEN[case].split())]
    assert windows(*case) == [list(r) for r in expected]


@pytest.mark.parametrize("case", DILATED, ids=str)
def test_golden_windows_with_dilation(case):
    assert windows(*case) == [[int(c) for c in w] for w in DILATED[case]]


def test_a_window_as_large_as_the_grid_is_dense():
    rule = Neighborhood((5, 7), (5, 7), (2, 3), (1, 1), (False, False))
    at = torch.arange(35)
    assert rule.visible(torch.tensor(0), at[:, None], at[None]).all()


def test_a_token_order_lists_every_token_once():
    rule = Neighborhood((6, 7, 9), (3, 3, 3), (1, 1, 1), (2, 1, 2), (False,) * 3, prefix=2)
    for block in (32, 64, 256):
        order = torch.tensor(rule.token_order(block))
        assert order.numel() % block == 0
        assert order[order >= 0].sort().values.equal(torch.arange(rule.required_len()))
