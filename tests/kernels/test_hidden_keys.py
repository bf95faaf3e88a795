"""Keys that no query may read may hold anything, and rows whose keys were all taken out give 0: never NaN."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from hf_attn_patch.call.program import MassEdit, ScoreEdit
from hf_attn_patch.call.ragged import KVGroup, RaggedKV
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention, reference, why_not

from .budget import cast, check_budget, device_of, outputs, rounded
from .cases import all_edits, all_masks, all_rules, classes, edit, make, opaque, ragged, shift_mass

pytest.importorskip("triton", reason="the triton extra is not installed")
from hf_attn_patch.kernels.triton.decoding import decodes

MASKS, EDITS, RULES = all_masks(), all_edits(), all_rules()
IMPLS = ["reference", "torch", "triton"]
# inf - inf of scores that are masked afterwards, in Triton's interpreter
pytestmark = [
    pytest.mark.usefixtures("fresh_buffers_hold_nan"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def cases_of(*lists, triton):
    """All combinations with an executor; of those with Triton's slow interpreter only the ones `triton` accepts."""
    return [(*x, impl) for x in product(*lists) for impl in IMPLS if impl != "triton" or triton(*x)]


def readable(program, columns, kv_heads=None):
    """bool [B, Hkv, S]: keys that some query of the call may read, straight from the definition."""
    seen = reference.visible(program, program.mask.query_columns, columns).any(2)
    seen = seen.expand(-1, program.num_heads, -1).unflatten(1, (program.num_kv_heads, -1)).any(2)
    if any(b.target == "value" for b in program.blends):
        own = (columns >= program.mask.q_offset) & (columns < program.mask.q_offset + program.q_len)
        seen = seen | own
    return seen if kv_heads is None else seen[:, list(kv_heads)]


def poisoned(program, what=float("nan")):
    """The program with NaN in every key and value that no query may read, and how many these are."""
    if program.ragged:
        groups, count = [], 0
        for g in program.key.groups:
            hidden = ~readable(program, g.columns, g.heads)[..., None]
            groups.append(
                KVGroup(
                    g.heads, g.key.masked_fill(hidden, what), g.value.masked_fill(hidden, what), g.columns
                )
            )
            count += int(hidden.sum())
        kv = RaggedKV(groups, program.key.seen)
        return replace(program, key=kv, value=kv), count
    hidden = ~readable(program, program.mask.key_columns)[..., None]
    mixed = any(
        e.kind == "mean_abs" for e in program.score_edits
    )  # reads the keys of every head for every head
    hidden_keys = hidden.all(1, keepdim=True) if mixed else hidden
    new = replace(
        program, key=program.key.masked_fill(hidden_keys, what), value=program.value.masked_fill(hidden, what)
    )
    return new, int(hidden.sum())


def as_kernels_hide(program):
    """Layout kernels read whole tiles, so a *real* token next to a window's edge is loaded though no query reads it;
    it is no NaN unless the model made one. What holds no token (padding, room behind the text) they never load."""
    if program.ragged or decodes(cast(program, torch.float32)):
        return program
    return replace(program, rules=[], mask=replace(program.mask, window=None, _native={}))


def check(program, impl, gradients=False, what=float("nan"), dtype=torch.float32):
    """`impl` computes from the poisoned program what float64 says about the clean one."""
    if (reason := why_not(impl, cast(program, dtype, device_of(impl)))) is not None:
        pytest.skip(reason)
    bad, count = poisoned(as_kernels_hide(program) if impl == "triton" else program, what)
    bad = replace(bad, mask=program.mask, rules=program.rules)
    truth = outputs(rounded(program, dtype), "reference", gradients)
    baseline = outputs(cast(program, dtype), "reference", gradients)
    got = outputs(cast(bad, dtype, device_of(impl)), impl, gradients)
    check_budget(("output", "dq", "dk", "dv"), truth, baseline, got, dtype, f"{impl}, {count} hidden keys")


HIDING = {"none": None, "one": SinkWindow(3, 12), "two": SinkWindow((3, 0), (12, 40))}


@pytest.mark.parametrize(
    "name, rule, impl", cases_of(MASKS, HIDING, triton=lambda name, rule: rule == "none" or "chunk" in name)
)
def test_hidden_keys_under_every_mask(name, rule, impl):
    program = MASKS[name]()
    if HIDING[rule] is not None:
        program.restrict(HIDING[rule])
    check(program, impl, gradients=impl != "triton" or program.q_len > 16)


@pytest.mark.parametrize(
    "name, impl",
    cases_of(RULES, triton=lambda name: name in ("sink window per query head", "strided shards")),
)
def test_hidden_keys_under_every_rule(name, impl):
    rule, arguments = RULES[name]
    program = make(**{"B": 1, **arguments})
    program.restrict(rule)
    if program.mask.causal:
        L = program.q_len  # a static cache: room behind the text
        program = make(B=1, L=L, S=L + 77, q_offset=0)
        program.restrict(rule)
    check(program, impl, gradients=True)


WHERE = ["static cache, padded", "both paddings", "chunk with cache, padded", "right padding, bidirectional"]
WHERE += ["hole in padding"]


@pytest.mark.parametrize(
    "name, where, impl",
    cases_of(EDITS, WHERE, triton=lambda name, where: where == "static cache, padded" and "rows" not in name),
)
def test_hidden_keys_under_every_edit(name, where, impl):
    program = MASKS[where]()
    program.classify(classes(program))
    check(EDITS[name](program), impl, gradients="mass" not in name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize("what", [float("nan"), float("inf")], ids=str)
def test_hidden_keys_of_a_cache_with_spans(L, what, impl):
    program = ragged(L, [20, 50, 20], pads=[0, 40])
    program.restrict(SinkWindow((4, 4, 4), (18, 44, 12)))
    check(program, impl, what=what)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("L, q_offset", [(1, 30), (1, 0), (5, 60), (33, 0), (70, 3), (15, 111)])
def test_an_unfilled_static_cache(L, q_offset, dtype, impl):
    for options in (
        {},
        dict(window=20),
        dict(pads=[(q_offset // 2, 160 - q_offset - L), (0, 160 - q_offset - L)]),
    ):
        program = make(L=L, S=160, q_offset=q_offset, **options)
        check(program, impl, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [True, False])
def test_right_padding_that_all_rows_share(causal, impl):
    """It ends inside a tile of keys, and no row of the batch has real keys there."""
    check(make(B=1, L=111, causal=causal, pads=[(0, 40)]), impl, gradients=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_mean_over_heads_reads_keys_that_a_head_itself_does_not_attend_to(impl):
    program = make(L=60)
    program.classify(classes(program))
    program = EDITS["mean_abs"](program)
    before = attention(program, impl).output[:, 2:]
    program.restrict(SinkWindow((1, 60), (1, 60)))  # KV head 0 reads next to nothing
    torch.testing.assert_close(attention(program, impl).output[:, 2:], before)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_masks_that_are_no_arithmetic_over_an_unfilled_cache(impl):
    check(make(L=33, S=97, q_offset=0, rule=opaque), impl, gradients=True)
    given = torch.rand(2, 1, 33, 97, generator=torch.Generator().manual_seed(3)) < 0.5
    given[..., 60:] = False
    check(make(L=33, S=97, causal=False, q_offset=0, given=given), impl, gradients=True)


def test_probabilities_of_an_unfilled_static_cache_have_its_length():
    program = replace(poisoned(make(L=33, S=97, q_offset=0))[0], need_weights=True)
    weights = attention(program, "reference").weights
    assert weights.shape == (2, 4, 33, 97) and not weights[..., 33:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 33, dtype=torch.float64))


def test_real_nan_stays_nan():
    """A NaN that a query does read is not swept under the carpet."""
    program = make(L=65)
    program.value[0, 0, 30] = float("nan")
    out = attention(program, "torch").output
    assert out[0, :2, 30:].isnan().all() and out[1].isfinite().all()


def taken_out():
    """Ways to take keys out with -inf: name -> (edits, more) for a program with classes 0, 1, 2."""
    minus = float("-inf")
    some = lambda p: torch.where(
        torch.rand(p.batch, p.num_heads, p.q_len, 1, dtype=torch.float64) < 0.5, minus, 0.0
    )
    return {
        "a class": lambda p: edit(p, score_edits=[ScoreEdit("add", minus, 1)]),
        "everything": lambda p: edit(p, score_edits=[ScoreEdit("add", minus)]),
        "every class in turn": lambda p: edit(p, score_edits=[ScoreEdit("add", minus, c) for c in range(3)]),
        "on heads": lambda p: edit(p, score_edits=[ScoreEdit("add", minus, None, heads=(1, 3))]),
        "on rows": lambda p: edit(
            p, score_edits=[ScoreEdit("add", minus, None, torch.rand(p.batch, p.q_len) < 0.3)]
        ),
        "amounts": lambda p: edit(p, score_edits=[ScoreEdit("add", some(p), 1), ScoreEdit("add", some(p))]),
        "abs": lambda p: edit(p, score_edits=[ScoreEdit("abs", minus, 1)]),
        "stays out": lambda p: edit(p, score_edits=[ScoreEdit("add", some(p), 1), ScoreEdit("abs", 0.5),
                                                    ScoreEdit("multiply", -0.7), ScoreEdit("multiply", 0.0, 1)]),
        "mean over heads": lambda p: edit(
            p, score_edits=[ScoreEdit("add", minus, 1, heads=(1,)), ScoreEdit("mean_abs", 0.5)]
        ),
        "with masses": lambda p: edit(
            p, score_edits=[ScoreEdit("add", some(p))], mass_edits=[MassEdit(shift_mass, 3)]
        ),
        "with sink logits": lambda p: edit(
            p, score_edits=[ScoreEdit("add", some(p))], sink_logits=torch.randn(p.num_heads, dtype=torch.float64)
        ),
        "position bias": lambda p: edit(p, position_bias=some(p).expand(-1, -1, -1, p.mask.kv_len)),
    }  # fmt: skip


WHERE_OUT = ["causal", "bidirectional", "left padding", "decode", "static cache"]


@pytest.mark.parametrize(
    "name, where, impl",
    cases_of(taken_out(), WHERE_OUT, triton=lambda name, where: where in ("left padding", "decode")),
)
def test_keys_taken_out_by_minus_infinity(name, where, impl):
    program = MASKS[where]()
    program.classify(classes(program))
    program = taken_out()[name](program)
    clean = cast(program, torch.float32, device_of(impl))
    if (reason := why_not(impl, clean)) is not None:
        pytest.skip(reason)
    check(program, impl, gradients=name not in ("abs", "with masses"))
    truth = attention(rounded(program, torch.float32), "reference").output
    blind = (truth == 0).all(-1)
    assert not attention(clean, impl).output.cpu()[blind].any(), "rows that see nothing give 0"
    if name in ("everything", "every class in turn"):
        assert blind.all()
