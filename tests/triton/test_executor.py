"""The Triton executor computes what the reference says, or refuses with a reason."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import UnsupportedProgram, attention, why_not
from hf_attn_patch.kernels.triton.configs import Config, forced
from tests.kernels import budget
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import all_edits, all_masks, all_rules, classes, edit, make, ragged

from .conftest import DEVICE, HALVES

MASKS, EDITS, RULES = all_masks(), all_edits(), all_rules()
DTYPES = [torch.float32, *HALVES]
NO_KERNEL = ("opaque rule", "opaque rule, padded", "given bool", "given float", "hole in padding",
             "hole in padding, bidirectional")  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")


def cast(program, dtype):
    """The program in `dtype`, where kernels run."""
    return budget.cast(program, dtype, DEVICE)


def holds(program, dtype=torch.float32, gradients=False):
    """Within the budget, or refused with a reason (which the caller then expects)."""
    reason = why_not("triton", cast(program, dtype))
    assert reason is None, reason
    assert_within_budget(program, "triton", dtype, gradients)


@pytest.mark.parametrize("name", [n for n in MASKS if n not in NO_KERNEL])
def test_every_mask(name):
    holds(MASKS[name](), gradients=True)


@pytest.mark.parametrize("name", [n for n in MASKS if n not in NO_KERNEL])
def test_every_mask_with_a_rule(name):
    program = MASKS[name]()
    program.restrict(SinkWindow(3, 12))
    reason = why_not("triton", cast(program, torch.float32))
    if name == "left padding, bidirectional":
        assert reason is not None and "left padding" in reason
    else:  # over a sliding cache only decoding runs, which has no gradients
        holds(program, gradients=name != "sliding cache")


def test_a_rule_over_a_cache_that_dropped_its_first_keys_is_refused_beyond_decoding():
    program = cast(make(L=40, S=80, q_offset=75, kv_offset=35, window=36), torch.float32)
    program.restrict(SinkWindow(3, 12))
    assert "sliding cache" in why_not("triton", program)


@pytest.mark.parametrize("name", NO_KERNEL)
def test_masks_that_are_no_arithmetic_are_refused_and_auto_takes_torch(name):
    program = cast(MASKS[name](), torch.float32)
    with pytest.raises(UnsupportedProgram, match="not triton: (the model brought|the padding has holes)"):
        attention(program, "triton")
    assert attention(program, "auto").executor == "torch"


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name):
    rule, arguments = RULES[name]
    program = make(**{"B": 1, **arguments})
    program.restrict(rule)
    holds(program, gradients=name in ("sink window per query head", "sink window per KV head",
                                      "neighborhood 2d dilated", "neighborhood 2d prefix"))  # fmt: skip


@pytest.mark.parametrize("name", ["sink window per KV head", "sink window per query head"])
@pytest.mark.parametrize("mask", ["left", "right", "chunk", "window", "bidirectional"])
def test_rules_per_head_meet_every_padding(name, mask):
    rule, _ = RULES[name]
    options = {
        "left": dict(pads=[(0, 0), (30, 0)]),
        "right": dict(pads=[(0, 0), (0, 30)]),
        "chunk": dict(L=45, S=90, pads=[(50, 0), (0, 0)]),
        "window": dict(window=17),
        "bidirectional": dict(causal=False),
    }[mask]
    program = make(**{"L": 90, **options})
    program.restrict(rule)
    holds(program, gradients=mask == "chunk")


@pytest.mark.parametrize("L", [1, 2, 15, 63, 65, 111, 257])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
@pytest.mark.parametrize("rule", [None, SinkWindow((2, 4), (20, 50))], ids=["dense", "two"])
def test_odd_lengths_and_kv_heads(L, Hkv, rule):
    if rule is not None and Hkv == 1:
        rule = SinkWindow((2, 4, 1, 0), (20, 50, 7, 30))
    program = make(L=L, Hkv=Hkv, pads=[(0, 0), (L // 3, 0)])
    if rule is not None:
        program.restrict(rule)
    holds(program, gradients=L in (15, 65))


@pytest.mark.parametrize(
    "D, Dv", [(16, 16), (32, 32), (40, 40), (64, 80), (72, 72), (80, 16), (96, 64), (24, 40), (128, 128),
              (160, 160), (192, 128), (256, 256)]
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(D, Dv, dtype):
    program = make(B=1, H=2, Hkv=1, L=70, D=D, Dv=Dv)
    program.restrict(SinkWindow(4, 30))
    holds(program, dtype, gradients=True)


@pytest.mark.parametrize(
    "where", ["causal", "left padding", "right padding, bidirectional", "chunk with cache"]
)
@pytest.mark.parametrize("name", [n for n in EDITS if "mass" not in n and n != "mean_abs"])
def test_every_edit(name, where):
    program = MASKS[where]()
    program.classify(classes(program))
    program = EDITS[name](program)
    holds(program, gradients=where in ("causal", "chunk with cache"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name", ["two score edits", "softcap", "head gate", "blend mean value", "query scale"]
)
def test_edits_in_half_precision(name, dtype):
    program = make()
    program.classify(classes(program))
    holds(EDITS[name](program), dtype, gradients=True)


def test_edits_combine_with_rules_and_gates():
    program = make(L=130, pads=[(0, 0), (20, 0)])
    program.classify(classes(program))
    program.restrict(SinkWindow((4, 1), (30, 60)))
    for name in ("add tensor on heads", "softcap", "query scale", "head gate", "blend value"):
        program = EDITS[name](program)
    holds(program, gradients=True)


@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 1, 2, 3)])
def test_a_rule_on_some_heads(heads):
    program = make(L=130, pads=[(0, 0), (20, 0)])
    program.restrict(SinkWindow(4, 30), heads)
    holds(program)


def test_fully_masked_rows_are_zero_and_send_no_gradient():
    program = cast(make(pads=[(17, 0), (0, 0)]), torch.float32)
    for name in ("query", "key", "value"):
        getattr(program, name).requires_grad_(True)
    out = attention(program, "triton").output
    assert not out[0, :, :17].any()
    grads = torch.autograd.grad(out.sum(), (program.query, program.key, program.value))
    assert not grads[0][0, :, :17].any() and not grads[1][0, :, :17].any() and not grads[2][0, :, :17].any()
    assert all(torch.isfinite(g).all() for g in grads)


def test_transposed_inputs_as_transformers_gives_them():
    program = make(L=77)
    for name in ("query", "key", "value"):
        x = getattr(program, name)
        setattr(program, name, x.transpose(1, 2).contiguous().transpose(1, 2))
    holds(program, gradients=True)


def test_the_output_lies_in_memory_as_the_output_projection_reads_it():
    out = attention(cast(make(L=40), torch.float32), "triton").output
    assert out.transpose(1, 2).is_contiguous()


def test_a_trained_gate_gets_its_gradient():
    gate = torch.rand(4, dtype=torch.float32, device=DEVICE)
    grads = []
    for impl in ("triton", "reference"):
        g = gate.clone().requires_grad_(True)
        program = edit(cast(make(B=1), torch.float32), head_gate=g)
        grads.append(torch.autograd.grad(attention(program, impl).output.pow(2).sum(), g)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype, reason", [(torch.float64, "float64"), (torch.float32, None)], ids=str)
def test_dtypes_without_a_kernel_are_refused(dtype, reason):
    found = why_not("triton", cast(make(), dtype))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize(
    "mask", ["plain", "left padding", "hole", "window", "sliding cache", "bidirectional", "given"]
)
@pytest.mark.parametrize("rule", [None, SinkWindow((4, 0), (20, 50)), SinkWindow((4, 0, 1, 2), (20, 50, 9, 30))],
                         ids=["no rule", "per KV head", "per query head"])  # fmt: skip
def test_decoding(L, mask, rule):
    hole = torch.ones(2, 97, dtype=torch.bool)
    hole[0, 20:30] = hole[1, :9] = False
    options = {
        "plain": {},
        "left padding": dict(pads=[(30, 0), (0, 0)]),
        "hole": dict(padding=hole),
        "window": dict(window=33, pads=[(30, 0), (0, 0)]),
        "sliding cache": dict(q_offset=130 - L, kv_offset=33, window=60),
        "bidirectional": dict(causal=False, pads=[(0, 9), (0, 0)]),
        "given": dict(
            causal=False, given=torch.rand(2, 1, L, 97, generator=torch.Generator().manual_seed(3)) < 0.5
        ),
    }[mask]
    program = make(L=L, S=97, **options)
    if rule is not None:
        program.restrict(rule)
    holds(program)


@pytest.mark.parametrize("name", ["softcap", "sink logits", "head gate", "query scale"])
def test_decoding_with_edits_that_the_kernel_knows(name):
    program = EDITS[name](make(L=3, S=97, pads=[(30, 0), (0, 0)]))
    program.restrict(SinkWindow((4, 0), (20, 50)))
    holds(program)


@pytest.mark.parametrize("L", [1, 7, 40])
@pytest.mark.parametrize("pads", [None, [0, 40]], ids=["", "padded"])
@pytest.mark.parametrize("name", [None, "softcap", "sink logits", "head gate"])
def test_a_cache_with_a_span_per_kv_head(L, pads, name):
    program = ragged(L, [20, 50, 20], pads=pads)
    program.restrict(SinkWindow((4, 4, 4), (18, 44, 12)))
    holds(EDITS[name](program) if name else program)


def test_edits_over_a_cache_with_a_span_per_kv_head_are_refused():
    program = ragged(1, [20, 50, 20])
    program.classify(classes(make(B=2, S=70)))
    assert "span per KV head" in why_not("triton", cast(EDITS["mass"](program), torch.float32))


@pytest.mark.parametrize("where", ["causal", "left padding", "right padding, bidirectional", "chunk with cache, padded",
                                   "sliding window", "static cache"])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_closed_heads_are_not_computed(where, share):
    program = MASKS[where]()
    gate = torch.rand(
        program.batch, program.q_len, program.num_heads, generator=torch.Generator().manual_seed(4)
    )
    open_ = torch.rand(gate.shape, generator=torch.Generator().manual_seed(5)) < share
    program.gate((gate * open_).double(), sparse=True)
    holds(program, gradients=where in ("causal", "chunk with cache, padded"))


@pytest.mark.parametrize(
    "block_q, block_k, step", [(128, 64, 64), (128, 64, 32), (64, 64, 32), (32, 128, 32), (64, 32, 32)]
)
@pytest.mark.parametrize("case", ["rule per head, padded", "edits", "grid", "mass"])
def test_block_sizes_and_steps_of_a_gpu(block_q, block_k, step, case):
    """The interpreter's own configuration is 32 x 32: tiles of several words and several steps per entry need these."""
    if case == "grid":
        program = make(B=1, L=196, causal=False)
        program.restrict(RULES["neighborhood 2d"][0])
    else:
        program = make(
            B=2 if "padded" in case else 1, L=150, pads=[(0, 0), (37, 0)] if "padded" in case else None
        )
        program.restrict(SinkWindow((4, 1), (70, 110)))
    if case in ("edits", "mass"):
        program.classify(classes(program))
        program = EDITS["two score edits" if case == "edits" else "mass"](program)
    with forced("layout", Config(block_q, block_k)), forced("classes", Config(block_q, block_k)):
        with forced("layout_dq", Config(0, step)), forced("layout_dkv", Config(step, 0)):
            holds(program, gradients=case != "mass")


@pytest.mark.parametrize("gate", ["of heads", "of tokens"])
def test_blocks_behind_a_closed_gate_are_not_computed(gate):
    """What is not computed cannot turn into NaN: the keys of the closed head are."""
    program = cast(make(B=1, H=2, Hkv=2, L=96), torch.float32)
    expected = attention(program, "reference").output.clone()
    program.key[:, 1] = float("nan")
    closed = torch.ones(1, 96, 2)
    closed[:, :, 1] = 0
    program.head_gate = closed if gate == "of tokens" else closed[0, 0]
    out = attention(program, "triton").output
    assert not out[:, 1].any()
    torch.testing.assert_close(out[:, 0], expected[:, 0])


@pytest.mark.parametrize("where", ["causal", "chunk with cache", "right padding, bidirectional"])
def test_a_blend_with_the_own_value_in_the_epilogue(where):
    program = EDITS["head gate"](EDITS["blend value"](MASKS[where]()))
    holds(program)


def test_int8_scores_are_off_unless_allowed():
    program = cast(make(L=150, D=32), torch.float32)
    exact, plain = attention(program, "reference").output, attention(program, "triton").output
    program.allow_int8 = True
    quantised = attention(program, "triton").output
    error = (quantised - exact).abs().max()
    assert (plain - exact).abs().max() < 1e-5 < error < 0.05
    program.softcap = 5.0  # not plain: the permission is not used
    assert (attention(program, "triton").output - attention(program, "reference").output).abs().max() < 1e-5
