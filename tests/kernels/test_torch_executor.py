"""The torch executor computes what the reference says, for everything a `Program` can hold."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention

from .budget import assert_within_budget
from .cases import all_edits, all_masks, all_rules, classes, edit, make, ragged

MASKS, EDITS, RULES = all_masks(), all_edits(), all_rules()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype):
    assert_within_budget(MASKS[name](), dtype=dtype)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_a_rule(name):
    program = MASKS[name]()
    program.restrict(SinkWindow(3, 12))
    assert_within_budget(program, gradients=True)


@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_every_mask(name):
    assert_within_budget(MASKS[name](), gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, dtype):
    rule, arguments = RULES[name]
    program = make(**arguments)
    program.restrict(rule)
    assert_within_budget(program, dtype=dtype, gradients=dtype == torch.float32)


@pytest.mark.parametrize("name", [n for n in RULES if "neighborhood" not in n])
@pytest.mark.parametrize("mask", ["left", "right", "chunk", "window", "bidirectional", "left bidirectional"])
def test_every_language_rule_meets_every_padding(name, mask):
    rule, arguments = RULES[name]
    L = arguments.get("L", 65)
    options = {
        "left": dict(pads=[(0, 0), (L // 3, 0)]),
        "right": dict(pads=[(0, 0), (0, L // 3)]),
        "chunk": dict(L=L // 2, S=L, pads=[(L // 2 + 5, 0), (0, 0)]),
        "window": dict(window=17),
        "bidirectional": dict(causal=False),
        "left bidirectional": dict(causal=False, pads=[(0, 0), (9, 0)]),
    }[mask]
    program = make(**{**arguments, **options})
    program.restrict(rule)
    assert_within_budget(program)


@pytest.mark.parametrize("L", [1, 2, 15, 63, 65, 111, 257])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
@pytest.mark.parametrize(
    "rule", [None, SinkWindow(4, 30), SinkWindow((2, 4), (20, 50))], ids=["dense", "one", "two"]
)
def test_odd_lengths_and_kv_heads(L, Hkv, rule):
    program = make(L=L, Hkv=Hkv, pads=[(0, 0), (L // 3, 0)])
    if rule is not None:
        program.restrict(rule)
    assert_within_budget(program)


@pytest.mark.parametrize("D, Dv", [(16, 16), (40, 40), (64, 80), (80, 16), (24, 40)])
@pytest.mark.parametrize("rule", [None, SinkWindow(4, 30)], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(D, Dv, rule, dtype):
    program = make(L=100, D=D, Dv=Dv)
    if rule is not None:
        program.restrict(rule)
    assert_within_budget(program, dtype=dtype, gradients=dtype == torch.float32)


@pytest.mark.parametrize(
    "where", ["causal", "left padding", "right padding, bidirectional", "chunk with cache"]
)
@pytest.mark.parametrize("name", EDITS)
def test_every_edit(name, where):
    program = MASKS[where]()
    program.classify(classes(program))
    program = EDITS[name](program)
    assert_within_budget(program, gradients=where == "causal")
    program.restrict(SinkWindow(3, 20))
    assert_within_budget(program)


@pytest.mark.parametrize("name", ["mass", "two score edits", "softcap", "head gate", "blend mean value"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_edits_in_other_dtypes(name, dtype):
    program = make()
    program.classify(classes(program))
    assert_within_budget(EDITS[name](program), dtype=dtype)


@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 1, 2, 3), (3,)])
@pytest.mark.parametrize("rule", [SinkWindow(4, 30), SinkWindow((2, 4), (20, 50))], ids=["one", "two"])
def test_a_rule_on_some_heads(heads, rule):
    program = make(L=130, pads=[(0, 0), (20, 0)])
    program.restrict(rule, heads)
    assert_within_budget(program, gradients=True)


def test_two_rules_intersect():
    program = make(L=200)
    program.restrict(SinkWindow(4, 90))
    program.restrict(SinkWindow((8, 0), (50, 120)))
    program.restrict(SinkWindow(40, 60), heads=(1, 2))
    assert_within_budget(program)


@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize("pads", [None, [0, 40]], ids=["", "padded"])
@pytest.mark.parametrize("name", [None, "mass", "softcap", "sink logits", "head gate", "add tensor on heads"])
def test_ragged_cache(L, pads, name):
    program = ragged(L, [20, 50, 20], pads=pads)
    program.restrict(SinkWindow((4, 4, 4), (18, 44, 12)))
    if name:
        program.classify(classes(make(B=2, S=70)))
        program = EDITS[name](program)
    assert_within_budget(program)


def test_fully_masked_rows_are_zero_and_send_no_gradient():
    program = make(pads=[(17, 0), (0, 0)])
    program.query.requires_grad_(True)
    out = attention(program, "torch").output
    assert not out[0, :, :17].any()
    (grad,) = torch.autograd.grad(out.sum(), program.query)
    assert not grad[0, :, :17].any() and torch.isfinite(grad).all()


@pytest.mark.parametrize("rule", [None, SinkWindow(4, 30)], ids=["dense", "sparse"])
def test_dropout_keeps_the_mean_and_is_off_without_it(rule):
    program = make(B=1, L=80)
    if rule is not None:
        program.restrict(rule)
    exact = attention(program, "torch").output
    program.dropout = 0.3
    torch.manual_seed(0)
    draws = torch.stack([attention(program, "torch").output for _ in range(200)])
    assert draws.std(0).max() > 0
    assert ((draws.mean(0) - exact).abs() <= 6 * draws.std(0) / 200**0.5 + 1e-12).all()


def test_batch_neighbours_do_not_matter():
    program = make(B=2, L=130, pads=[(0, 0), (33, 0)])
    program.restrict(SinkWindow(4, 30))
    both = attention(program, "torch").output
    alone = make(B=2, L=130, pads=[(0, 0), (33, 0)])
    alone.restrict(SinkWindow(4, 30))
    row = edit(
        alone,
        query=alone.query[1:],
        key=alone.key[1:],
        value=alone.value[1:],
        mask=make(B=1, L=130, pads=[(33, 0)]).mask,
    )
    torch.testing.assert_close(attention(row, "torch").output, both[1:])
