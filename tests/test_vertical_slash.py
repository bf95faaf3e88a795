"""`vertical_slash`: which lines are chosen, that executors read exactly those, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import ColumnsDiagonals, SinkWindow
from hf_attn_patch.kernels import UnsupportedProgram, attention, columns_diagonals, reference
from hf_attn_patch.kernels.columns_diagonals import Lines
from hf_attn_patch.patches.sparse.vertical_slash import KIND, chosen, line_scores
from tests.kernels.budget import assert_within_budget
from tests.kernels.cases import make
from tests.small import close, differ, inputs_of, model_of, output, untouched
from tests.test_golden import read

SMALL = {"vertical": 6, "slash": 9, "sinks": 2, "recent": 4, "last": 16}


def edited(
    program: Program, prompt: int | None = None, heads: tuple[int, ...] | None = None, **options
) -> Program:
    """The program after `vertical_slash` has chosen for it. prompt: its length in columns, None = everything."""
    context = None if prompt is None else SimpleNamespace(prompt_length=prompt)
    call = SimpleNamespace(layer=0, heads=heads, context=context)
    registry.build("vertical_slash", {**SMALL, **options}).edit(program, call)
    return program


MASKS = {
    "causal": {},
    "left padding": dict(pads=[(0, 0), (37, 0)]),
    "right padding": dict(pads=[(0, 0), (0, 30)]),
    "a row of padding only": dict(pads=[(0, 0), (200, 0)]),
    "chunk with cache": dict(L=75, S=200),
    "chunk with cache, padded": dict(L=75, S=200, pads=[(140, 0), (11, 0)]),
    "hole in padding": dict(padding=(torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.9)),
    "one KV head": dict(H=4, Hkv=1),
    "as many KV heads": dict(H=4, Hkv=4, Dv=24),
}


@pytest.mark.parametrize("prompt", [None, 150], ids=["all prompt", "prompt of 150"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_torch_executor_reads_what_was_chosen(mask, prompt):
    program = edited(make(**{"L": 200, **MASKS[mask]}), prompt)
    assert isinstance(program.rule, ColumnsDiagonals)
    assert_within_budget(program, gradients=mask in ("causal", "chunk with cache, padded", "one KV head"))


def test_the_gather_reads_few_keys_and_is_used():
    program = edited(make(B=1, L=3000, S=3000, H=2, Hkv=1, D=8))
    position, there = Lines.of(program.rule, 0, 3000, torch.float64).needed(2900, 2964)
    assert there.sum(-1).max() < 700 and float(program.share) < 0.05
    for head in range(2):
        seen = reference.visible(program, torch.arange(2900, 2964), torch.arange(3000))[
            0, head, :, :2900
        ].any(0)
        assert set(position[head, there[head]].tolist()) == set(seen.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("most", [0.0, 1.0], ids=["all keys of a run", "gathered keys"])
@pytest.mark.parametrize(
    "mask", ["left padding", "chunk with cache, padded", "hole in padding", "one KV head"]
)
def test_both_ways_to_read_a_run_are_right(mask, most, monkeypatch):
    monkeypatch.setattr(columns_diagonals, "MOST", most)
    assert_within_budget(edited(make(**{"L": 200, **MASKS[mask]}), 170), gradients=True)


def test_it_composes_with_a_static_rule():
    program = make(L=200, pads=[(0, 0), (37, 0)])
    program.restrict(SinkWindow(2, 90))
    assert_within_budget(edited(program))


def test_the_kernels_refuse_it_and_say_why():
    pytest.importorskip("triton")
    program = edited(make(L=100))
    for name in ("query", "key", "value"):
        setattr(program, name, getattr(program, name).float())
    with pytest.raises(UnsupportedProgram, match="columns and diagonals"):
        attention(program, "triton")


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [[(0, 0), (0, 0)], [(5, 0), (0, 7)]], ids=str)
def test_scores_are_sums_over_columns_and_diagonals_of_the_last_rows(pads):
    program = make(L=60, S=60, pads=pads)
    _, weights = reference.run(program)
    for b, (left, right) in enumerate(pads):
        end = 60 - right
        columns, diagonals, length = line_scores(program, b, 60, 8)
        last = weights[b, :, end - 8 : end, left:end]
        assert length == end - left
        torch.testing.assert_close(columns[:, :length], last.sum(1))
        whole = torch.zeros(4, length, length, dtype=last.dtype)
        whole[:, -8:] = last
        expected = torch.stack([whole.diagonal(-d, 1, 2).sum(-1) for d in range(length)], -1)
        torch.testing.assert_close(diagonals[:, :length], expected)
        assert not columns[:, length:].any() and not diagonals[:, length:].any()


def test_the_choice_is_that_of_minference():
    tensors, c = read("vertical_slash__choice")
    q, k = tensors["in.q"], tensors["in.k"]
    program = Program(q, k, k, Mask(1, q.shape[2], q.shape[2], causal=True), scale=q.shape[3] ** -0.5)
    options = {"vertical": c["vertical"], "slash": c["slash"], "sinks": c["sinks"], "recent": c["recent"]}
    rule = edited(program, last=c["last_q"], **options).rule
    assert torch.equal(rule.columns[0], tensors["out.columns"])
    assert torch.equal(rule.diagonals[0], tensors["out.diagonals"])


def test_lines_that_are_always_read_count_and_ties_go_to_the_lower_number():
    scores = torch.tensor([[[0.0, 0.1, 0.5, 0.5, 0.5, 0.9]]])
    pick = lambda size, always: chosen(scores, [size], always)[0, 0].nonzero()[:, 0].tolist()
    assert pick(3, 1) == [0, 2, 5]
    assert pick(0, 2) == [0, 1]
    assert pick(2, 0) == [2, 5]
    assert pick(99, 0) == list(range(6))
    both = chosen(scores.expand(1, 2, 6), [1, 4], 0)[0]
    assert both.sum(-1).tolist() == [1, 4]


def test_a_column_and_a_diagonal_that_the_last_queries_love_are_read_by_all():
    codes = torch.nn.functional.normalize(
        torch.randn(240, 63, generator=torch.Generator().manual_seed(3)), dim=-1
    ).double()
    program = make(B=1, L=200, S=200, H=1, Hkv=1, D=64)
    program.query[0, 0] = 100 * torch.nn.functional.pad(codes[:200], (1, 0), value=0.01)
    program.key[0, 0] = torch.nn.functional.pad(
        codes[33:233], (1, 0)
    )  # key k answers to the query 33 tokens later
    program.key[0, 0, 77] = 0.0
    program.key[0, 0, 77, 0] = 100.0  # and this one to everybody
    rule = edited(program, sinks=1, recent=1, vertical=2, slash=2).rule
    assert rule.columns[0, 0].nonzero()[:, 0].tolist() == [0, 77]
    assert rule.diagonals[0, 0].nonzero()[:, 0].tolist() == [0, 33]
    seen = rule.visible(torch.tensor(0), torch.tensor(150), torch.arange(151)).flatten()
    assert seen.nonzero()[:, 0].tolist() == [0, 77, 117, 150]


@pytest.mark.parametrize("prompt", [None, 90])
def test_the_reported_share_is_the_share_of_pairs(prompt):
    program = edited(make(L=130, S=130, pads=[(0, 0), (21, 0)]), prompt)
    rows = program.mask.query_columns
    seen = reference.visible(program, rows, rows).double()
    plain = program.mask.block(rows, rows).expand(2, 4, -1, -1)
    real = torch.ones(2, 130, dtype=torch.bool)
    real[1, :21] = False
    plain, seen = plain & real[:, None, :, None], seen * real[:, None, :, None]
    assert float(program.share) == pytest.approx(float(seen.sum() / plain.sum()), abs=1e-12)


def test_other_heads_stay_dense_and_keep_the_fast_path():
    program = edited(make(L=120, S=120), heads=(1, 2))
    assert isinstance(program.rule, ColumnsDiagonals)
    seen = reference.visible(program, torch.arange(120), torch.arange(120))
    causal = torch.ones(120, 120, dtype=torch.bool).tril()
    assert all(torch.equal(seen[b, h], causal) for b in (0, 1) for h in (0, 3))
    assert all(not torch.equal(seen[b, h], causal) for b in (0, 1) for h in (1, 2))
    assert_within_budget(program)


# -- models -----------------------------------------------------------------------------------------------------------


def test_sizes_of_heads_come_from_the_original_json(tmp_path):
    model = model_of("llama")
    inputs = inputs_of(model, length=40)
    common = {"sinks": 1, "recent": 2, "last": 8}
    rows = [{str(h): [KIND, 3, 5, 0.9] for h in range(4)} for _ in range(2)]
    file = tmp_path / "best_pattern.json"
    file.write_text(json.dumps(rows))
    found = []
    for options in ({"vertical": 3, "slash": 5}, {"patterns": rows}, {"patterns": str(file)},
                    {"patterns": [{"0": [KIND, 3, 5]}, {}], "vertical": 3, "slash": 5}):  # fmt: skip
        with hap.patched(model, "vertical_slash", **options, **common):
            found.append(output(model, inputs))
    assert all(torch.equal(found[0], other) for other in found[1:])
    rows[1]["2"] = [KIND, 3, 40, 0.9]
    with hap.patched(model, "vertical_slash", patterns=rows, **common):
        assert differ(output(model, inputs), found[0])


def test_what_follows_the_prompt_is_dense():
    model = model_of("llama")
    inputs = inputs_of(model, batch=1, length=30)
    ids = inputs["input_ids"]
    options = {"vertical": 2, "slash": 3, "sinks": 1, "recent": 2, "last": 8}
    with (
        hap.patched(model, "vertical_slash", **options) as handle,
        hap.prompt(model, length=20),
        torch.no_grad(),
    ):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        sparse = [s.block_density for s in handle.report().sites]
        with handle.disabled():
            twin = DynamicCache(config=model.config)
            for i, layer in enumerate(cache.layers):
                twin.update(layer.keys, layer.values, i)
            expected = model(ids[:, 20:], past_key_values=twin)[0]
        close(model(ids[:, 20:], past_key_values=cache)[0], expected)
    assert all(0 < s < 0.6 for s in sparse)


def test_a_prompt_in_pieces_is_sparse_in_every_piece_if_its_length_is_said():
    model = model_of("llama")
    ids = inputs_of(model, batch=1, length=40)["input_ids"]
    options = {"vertical": 2, "slash": 3, "sinks": 1, "recent": 2, "last": 8}
    shares = []
    with hap.patched(model, "vertical_slash", **options) as handle, torch.no_grad():
        with hap.prompt(model, length=40):
            cache = DynamicCache(config=model.config)
            for part in ids.split(20, 1):
                model(part, past_key_values=cache)
                shares.append(handle.report().sites[0].block_density)
    assert all(0 < s < 0.6 for s in shares) and shares[1] < shares[0]


@pytest.mark.parametrize("options, words", [
    ({"recent": 0}, "its own key"),
    ({"last": 0}, "last=0"),
    ({"patterns": [{}]}, "1 layers, the model has 2"),
    ({"patterns": [{"9": [KIND, 1, 1, 1.0]}, {}]}, "head 9 in layer 0.*4 query heads"),
    ({"patterns": [{"0": ["stream_llm", 1, 1, 1.0]}, {}]}, "'stream_llm'; only"),
    ({"patterns": [{"0": [KIND, -1, 1, 1.0]}, {}]}, r"sizes of layer 0 head 0"),
    ({"patterns": [{"0": [KIND, 1]}, {}]}, "expected .kind, v, s, score."),
    ({"patterns": [{"x": [KIND, 1, 1]}, {}]}, "head 'x'"),
    ({"patterns": {"0": {}}}, "are a list with one"),
    ({"patterns": "/no/such.json"}, "'/no/such.json' does not exist"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_before_anything_changes(options, words):
    model = model_of("llama")
    with untouched(model), pytest.raises(hap.PatchError, match=words):
        hap.patch(model, "vertical_slash", **options)


def test_a_cache_that_dropped_tokens_is_refused():
    model = model_of("llama")
    ids = inputs_of(model, batch=1, length=30)["input_ids"]
    with hap.patched(model, "streaming", sinks=1, window=4), hap.patched(model, "vertical_slash", **SMALL):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), hap.prompt(model, length=30):
            model(ids[:, :20], past_key_values=cache)
            with pytest.raises(hap.PatchError, match="dropped tokens.*cache='keep'"):
                model(ids[:, 20:], past_key_values=cache)
