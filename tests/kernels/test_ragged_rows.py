"""Sparse head gates on a CPU: closed (head, token) pairs are left out, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention, ragged_rows

from .budget import assert_within_budget
from .cases import all_masks, edit, make

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")
MASKS = all_masks()


@pytest.fixture(autouse=True)
def everything_counts_as_long(monkeypatch):
    monkeypatch.setattr(ragged_rows, "FEW_PAIRS", 0)
    monkeypatch.setattr(ragged_rows, "FEW_KEYS", 0)
    monkeypatch.setattr(ragged_rows, "ROWS", 24)  # several runs


@pytest.fixture
def runs(monkeypatch):
    """Runs that were made: the way is taken, and this is how much it attends."""
    seen, original = [], ragged_rows.runs_of
    monkeypatch.setattr(ragged_rows, "runs_of", lambda *a: (seen.extend(made := list(original(*a))), made)[1])
    return seen


def gated(program, share=0.5, shared=1, seed=5):
    """`program` with `shared` heads that are always open and the others open for a share of the tokens."""
    g = torch.Generator().manual_seed(seed)
    gate = torch.rand(program.batch, program.q_len, program.num_heads, generator=g, dtype=torch.float64)
    gate = gate * (torch.rand(gate.shape, generator=g) < share)
    gate[..., :shared] = 0.7
    program.gate(gate, sparse=True)
    return program


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, gradients):
    program = gated(MASKS[name]())
    assert_within_budget(program, gradients=gradients)


@pytest.mark.parametrize(
    "name",
    ["causal", "left", "right", "chunk", "window", "bidirectional", "one kv head", "every head routed", "Dv"],
)
def test_the_way_is_taken_and_attends_open_pairs_only(name, runs):
    program = {
        "causal": lambda: make(L=100),
        "left": lambda: make(L=100, pads=[(0, 0), (37, 0)]),
        "right": lambda: make(L=100, pads=[(0, 31), (0, 0)]),
        "chunk": lambda: make(L=60, S=133, pads=[(64, 0), (80, 0)]),
        "window": lambda: make(L=100, window=19),
        "bidirectional": lambda: make(L=100, causal=False),
        "one kv head": lambda: make(L=100, H=3, Hkv=1),
        "every head routed": lambda: make(L=100),
        "Dv": lambda: make(L=100, D=24, Dv=40),
    }[name]()
    gated(program, shared=0 if name == "every head routed" else 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_budget(program, dtype=dtype, gradients=dtype == torch.float32)
    runs.clear()
    attention(program, "torch")
    real = program.mask.padding
    opened = program.head_gate != 0
    if real is not None and name != "right":  # behind right padding queries still see the tokens before
        opened = opened & real[:, program.mask.query_columns, None]
    alone = 0 if name == "every head routed" else 1
    assert sum(r.rows.numel() for r in runs) == int(opened[..., alone:].sum())


def test_a_head_that_is_closed_everywhere_is_zero_and_unread(runs):
    program = make(L=64)
    gate = torch.ones(64, 4, dtype=torch.float64)
    gate[:, 2:] = 0.0  # both query heads of KV head 1
    program.gate(gate, sparse=True)
    program.key[:, 1] = float("nan")  # would spread
    out = attention(program, "torch").output
    assert not runs and bool((out[:, 2:] == 0).all())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("L", [1, 3])
def test_decoding_leaves_out_whole_kv_heads_per_item(L, runs):
    program = make(B=3, H=6, Hkv=3, L=L, S=90, pads=[(0, 0), (7, 0), (20, 0)])
    gate = torch.ones(3, L, 6, dtype=torch.float64)
    gate[0, :, 2:4] = gate[1, :, :2] = gate[2, :, 4:] = 0.0
    program.gate(gate, sparse=True)
    assert_within_budget(program, gradients=True)
    runs.clear()
    attention(program, "torch")
    assert {(r.item, r.kv) for r in runs} == {(0, 0), (0, 2), (1, 1), (1, 2), (2, 0), (2, 1)}
    gate[0, :, 2] = gate[1, :, 0] = gate[2, :, 4] = (
        1.0  # a single head wants the keys, so nothing can be saved
    )
    runs.clear()
    attention(edit(make(B=3, H=6, Hkv=3, L=L, S=90), head_gate=gate, gate_is_sparse=True), "torch")
    assert not runs


@pytest.mark.parametrize("what", ["dense gate", "rule", "open gate", "softcap", "short"])
def test_other_programs_take_the_usual_way(what, runs, monkeypatch):
    program = gated(make(L=70))
    if what == "dense gate":
        program.gate_is_sparse = False
    if what == "rule":
        program.restrict(SinkWindow(2, 9))
    if what == "open gate":
        program.head_gate = torch.ones_like(program.head_gate)
    if what == "softcap":
        program.softcap = 5.0
    if what == "short":
        monkeypatch.setattr(ragged_rows, "FEW_PAIRS", 1 << 20)
    assert_within_budget(program)
    assert not runs


def test_query_scale_and_blends_meet_a_sparse_gate():
    from hf_attn_patch.call.program import Blend

    program = gated(make(L=80))
    program.query_scale = torch.rand(1, 4, 80, 1, dtype=torch.float64) + 0.5
    program.blends = [Blend("value", 0.3), Blend("mean_value", 0.2, heads=(1, 2))]
    assert_within_budget(program, gradients=True)
