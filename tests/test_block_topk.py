"""`block_topk` and `moba`: the blocks that are read, by every executor; numbers of the original MoBA."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import ChosenBlocks, SinkWindow
from hf_attn_patch.kernels import UnsupportedProgram, attention, why_not
from hf_attn_patch.kernels.chosen import _gathered
from hf_attn_patch.patches.sparse.block_topk import BlockTopK, MoBA
from tests.kernels.budget import assert_within_budget, cast, check_budget
from tests.kernels.cases import make
from tests.small import close, differ, inputs_of, model_of, output
from tests.test_golden import read


class Call:
    """What `edit` needs of a call."""

    heads, context = None, None


def chosen(program: Program, **options) -> Program:
    """The program after `block_topk` has chosen for it."""
    BlockTopK(**options).edit(program, Call())  # type: ignore[arg-type]
    return program


MASKS = {
    "causal": {},
    "left padding": dict(pads=[(0, 0), (37, 0)]),
    "right padding": dict(pads=[(0, 0), (0, 30)]),
    "chunk with cache": dict(L=75, S=200),
    "chunk with cache, padded": dict(L=75, S=200, pads=[(140, 0), (11, 0)]),
    "hole in padding": dict(padding=(torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.9)),
}
ROWS = [
    dict(block=16, topk=3),
    dict(block=32, topk=2, score="minmax", sinks=0),
    dict(block=16, topk=0, threshold=0.5),
]
BLOCKS = [
    dict(block=32, topk=3, score="antidiagonal"),
    dict(block=64, topk=0, threshold=0.6, score="antidiagonal", stride=16),
]


@pytest.mark.parametrize("options", [*ROWS, *BLOCKS], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_the_torch_executor_reads_what_was_chosen(mask, options):
    program = chosen(make(**{"L": 200, **MASKS[mask]}), **options)
    assert isinstance(program.rule, ChosenBlocks)
    assert_within_budget(program, gradients=mask in ("causal", "chunk with cache, padded"))


@pytest.mark.parametrize("mask", [m for m in MASKS if m != "hole in padding"])
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_the_kernels_run_blocks_of_queries(mask, options):
    pytest.importorskip("triton")
    assert_within_budget(chosen(make(**{"L": 200, **MASKS[mask]}), **options), "triton")


def test_the_kernels_refuse_a_choice_per_query_and_say_so():
    pytest.importorskip("triton")
    program = chosen(make(L=100), block=16, topk=2)
    for name in ("query", "key", "value"):
        setattr(program, name, getattr(program, name).float())
    assert "1 x 16" in why_not("triton", program)
    with pytest.raises(UnsupportedProgram, match="multiples of 32"):
        attention(program, "triton")


def test_the_gather_reads_few_keys_and_is_used():
    program = chosen(make(B=1, L=600, S=600), block=16, topk=4)
    run = torch.arange(500, 508)
    assert _gathered(program, program.rule, program.query[:, :, run], run) is not None
    assert program.share < 0.3


def test_it_composes_with_a_static_rule():
    program = make(L=200, pads=[(0, 0), (37, 0)])
    program.restrict(SinkWindow(2, 90))
    chosen(program, block=16, topk=3)
    assert_within_budget(program)


def test_forced_blocks_are_always_read():
    program = chosen(make(B=1, L=160), block=16, topk=1, sinks=1, recent=2)
    seen = program.rule.chosen[0]
    rows = torch.arange(160)
    for back in (0, 1):
        block = (rows // 16 - back).clamp(min=0)
        assert seen[:, rows, block].all()
    assert seen[..., 0].all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", ["topk1_block_diagonal", "varlen", "hf_gqa"])
def test_moba_is_the_original_moba(case, impl):
    tensors, config = read(f"moba__{case}")
    q, k, v, expected = (tensors[x] for x in ("in.q", "in.k", "in.v", "out.o"))
    if case == "hf_gqa":
        parts = [(q, k, v, expected.transpose(1, 2))]
    else:  # packed: [tokens, heads, D], one sequence after the other
        parts = list(zip(*(x.transpose(0, 1)[None].split(config["lens"], 2) for x in (q, k, v, expected))))
    for q, k, v, expected in parts:
        program = Program(
            q, k, v, Mask(q.shape[0], q.shape[2], q.shape[2], causal=True), scale=q.shape[3] ** -0.5
        )
        MoBA(block=config["block"], topk=config["topk"]).edit(program, Call())  # type: ignore[arg-type]
        double = cast(program, torch.float64)  # the choice is kept, what is computed with it is exact
        truth, plain = attention(double, "reference").output, attention(program, "reference").output
        check_budget(("output",), [truth], [plain], [attention(program, impl).output], torch.float32)
        check_budget(("official",), [truth], [plain], [expected], torch.float32)


def test_the_report_says_how_many_blocks_were_read():
    model = model_of("llama")
    inputs = inputs_of(model, length=33)
    with hap.patched(model, "block_topk", block=4, topk=2, sinks=0) as handle:
        sparse = output(model, inputs)
        report = handle.report()
    assert differ(sparse, output(model, inputs))
    share = report.sites[0].block_density
    assert 0.1 < share < 0.6 and "of blocks" in str(report)


@pytest.mark.parametrize("bad, words", [
    (dict(score="max"), "mean, minmax, antidiagonal"), (dict(recent=0), "own block"),
    (dict(score="antidiagonal", block=60, stride=8), "divisor of block=60"), (dict(threshold=0.0), "threshold"),
])  # fmt: skip
def test_bad_options_are_refused_with_the_way_out(bad, words):
    with pytest.raises(hap.PatchError, match=words):
        hap.plan(model_of("llama"), "block_topk", **bad)


def test_a_threshold_of_mass_counts_the_blocks_that_are_read_anyway(score="antidiagonal"):
    """At a threshold that the forced blocks alone reach, nothing else is read; at 1 everything is."""
    program = make(L=200, H=2, Hkv=2, B=1)
    options = dict(block=32, topk=0, score=score, sinks=1, recent=1)
    few = chosen(make(L=200, H=2, Hkv=2, B=1), threshold=1e-6, **options)
    everything = chosen(make(L=200, H=2, Hkv=2, B=1), threshold=1.0, **options)
    sinks = chosen(make(L=200, H=2, Hkv=2, B=1), block=32, topk=1, score=score, sinks=1, recent=1)
    assert torch.equal(few.rule.chosen, sinks.rule.chosen)
    torch.testing.assert_close(attention(everything, "torch").output, attention(program, "torch").output)


def test_quest_is_dense_in_the_prompt_and_chooses_pages_afterwards():
    model = model_of("llama")
    inputs = inputs_of(model, length=40)
    dense = output(model, inputs)
    with hap.patched(model, "quest", block=4, topk=2):
        assert torch.equal(output(model, inputs), dense), "a prompt"
        with hap.prompt(model, length=30):
            mixed = output(model, inputs)
        cache = model(input_ids=inputs["input_ids"][:, :30], use_cache=True).past_key_values
        steps = [
            model(input_ids=inputs["input_ids"][:, i : i + 1], past_key_values=cache).logits
            for i in range(30, 40)
        ]
    close(mixed[:, :30], dense[:, :30])
    close(torch.cat(steps, 1), mixed[:, 30:], "decoding token by token")
    assert differ(mixed[:, 31:], dense[:, 31:])


def test_xattention_reads_less_and_is_dense_when_it_decodes():
    model = model_of("llama")
    inputs = inputs_of(model, length=64)
    dense = output(model, inputs)
    with hap.patched(model, "xattention", block=8, stride=4, threshold=0.5):
        assert differ(output(model, inputs), dense)
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            step = model(input_ids=inputs["input_ids"][:, :1], past_key_values=copy.deepcopy(cache)).logits
    with torch.no_grad():  # the same cache, nothing patched
        close(step, model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache).logits)


@pytest.mark.parametrize("score", ["mean", "minmax", "antidiagonal"])
def test_a_block_far_beyond_the_text_is_one_block_of_it(score):
    """And costs no more memory than that: 2^31 - 8 tokens of padding would be 200 GB here."""
    import hf_attn_patch as hap

    from .small import close, inputs_of, model_of, output

    model = model_of("llama")
    inputs = inputs_of(model, length=16)
    outputs = {}
    for block in (2**31 - 8, 16):
        with hap.patched(model, "block_topk", block=block, topk=1, score=score):
            outputs[block] = output(model, inputs, use_cache=False)
    close(outputs[2**31 - 8], outputs[16])
    close(outputs[16], output(model, inputs, use_cache=False))
