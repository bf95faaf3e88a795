"""`duo`: numbers of the original DuoAttention, gates that learn, caches that shrink, and what is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.cache.spans import SpanLayer
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Blend, Program
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.sparse.duo import full_heads, gates, penalty
from tests.kernels.cases import make
from tests.small import close, differ, inputs_of, model_of, output, untouched
from tests.test_golden import GOLDEN, IMPLS, dense, read, rotate

SHIPPED = json.loads((GOLDEN / "duo__shipped_alphas.json").read_text())
TABLE = [[0.1, 0.9], [0.8, 0.2]]  # of the tiny llama: 2 layers of 2 KV heads (and 4 query heads)


def rotated(tensors, config, names="qkv", suffix=""):
    """q, k, v of a golden case after the rotary embedding at absolute positions."""
    q, k, v = (tensors[f"in.{n}{suffix}"] for n in names)
    at = torch.arange(q.shape[2], dtype=q.dtype)
    return rotate(q, at, config["rope_theta"]), rotate(k, at, config["rope_theta"]), v


def causal(q, k, v) -> Program:
    return Program(q, k, v, Mask(q.shape[0], q.shape[2], k.shape[2], causal=True), scale=q.shape[3] ** -0.5)


def site(alpha=None):
    """A call as `edit` sees it."""
    ignored = lambda *loss: None
    return SimpleNamespace(
        layer=0, tensors=SimpleNamespace(alpha=alpha), context=None, heads=None, add_loss=ignored
    )


# -- the original's numbers -------------------------------------------------------------------------------------------


def test_full_heads_are_the_original_ones():
    tensors, config = read("duo__sparsify")
    alphas = tensors["in.alpha"].tolist()
    for i, sparsity in enumerate(config["sparsity"]):
        ours = torch.tensor(full_heads(alphas, sparsity))
        assert torch.equal(ours, tensors[f"out.full_{i}"]), sparsity
        assert 1 - ours.double().mean() == pytest.approx(float(tensors[f"out.sparsity_{i}"]), abs=1e-9)


@pytest.mark.parametrize("model", SHIPPED["in"])
def test_shipped_gates_give_the_original_number_of_full_heads(model):
    alphas, expected = SHIPPED["in"][model], SHIPPED["out"][model]
    count = expected["layers"] * expected["kv_heads"]
    for sparsity, case in expected["by_sparsity"].items():
        ours = full_heads(alphas, float(sparsity))
        assert sum(map(sum, ours)) == count - math.ceil(float(sparsity) * (count - 1))
        per_layer = [sum(row) for row in ours]
        if case["ties_at_threshold"] == 0:
            assert per_layer == case["full_per_layer_without_noise"]
        else:  # the original draws among the equal ones; whatever it draws is among these
            assert all(a <= b for a, b in zip(per_layer, case["full_per_layer_without_noise"]))


def test_equal_gates_are_told_apart_by_place_and_always_alike():
    assert full_heads([[0.5, 0.5], [0.5, 0.5]], 0.5) == [[True, True], [False, False]]
    assert full_heads([[0.5, 1.0], [0.5, 0.5]], 0.5) == [[True, True], [False, False]]
    assert full_heads([[0.0, 1.0], [0.5, 0.5]], threshold=0.5) == [[False, True], [True, True]]
    # a quantile that falls on a gate, where the product is not an integer in floating point
    assert sum(full_heads([[i / 31 for i in range(31)]], 0.1)[0]) == 28


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mix_of_one_stream_is_the_golden_one(impl):
    tensors, c = read("duo__mix")
    mask = (
        dense(SinkWindow(c["sink"], c["recent"]), c["L"])
        & torch.ones(c["L"], c["L"], dtype=torch.bool).tril()
    )
    assert torch.equal(mask, tensors["out.streaming_mask"])
    program = causal(*rotated(tensors, c))
    patch = registry.build("duo", {"mode": "train", "sinks": c["sink"], "window": c["recent"]})
    patch.edit(program, site(tensors["param.alpha"]))
    out = attention(program, impl).output.transpose(1, 2)
    torch.testing.assert_close(out, tensors["out.one_stream_mix"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_student_of_the_original_is_its_teacher_and_our_streaming_half(impl):
    tensors, c = read("duo__mix")
    full = attention(causal(*rotated(tensors, c, suffix="_full")), impl).output
    torch.testing.assert_close(full.transpose(1, 2), tensors["out.teacher"], rtol=0, atol=1e-8)
    program = causal(*rotated(tensors, c))
    patch = registry.build(
        "duo", {"alphas": [[0, 0]], "sparsity": 1.0, "sinks": c["sink"], "window": c["recent"]}
    )
    patch.edit(program, site())
    alpha = tensors["param.alpha"].clamp(0, 1).repeat_interleave(c["H"] // c["Hk"]).reshape(1, -1, 1, 1)
    student = alpha * full + (1 - alpha) * attention(program, impl).output
    torch.testing.assert_close(student.transpose(1, 2), tensors["out.student"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_decoding_from_the_shrunk_cache_is_the_original_decoding(impl):
    tensors, c = read("duo__deploy_decode")
    q, k, v = rotated(tensors, c)
    window = c["recent"] + 1  # its decode sees sink + recent + itself
    table = {"alphas": [[1.0, 0.0]], "threshold": 0.5, "sinks": c["sink"], "window": window}
    patch = registry.build("duo", table)
    spans = patch.spans({"layer": 0, "num_heads": c["H"], "num_kv_heads": c["Hk"]}, None)
    assert spans == [(0, 0), (c["sink"], window)]
    layer, begin = SpanLayer(spans), 0
    for step, size in enumerate(c["chunks"]):
        rows = slice(begin, begin + size)
        key, value = layer.update(k[:, :, rows], v[:, :, rows])
        begin += size
        program = Program(
            q[:, :, rows],
            key,
            value,
            Mask(1, size, begin, q_offset=begin - size, causal=True),
            scale=c["D"] ** -0.5,
        )
        patch.edit(program, site())
        out = attention(program, impl).output.transpose(1, 2)
        torch.testing.assert_close(out, tensors["out.o"][:, rows], rtol=0, atol=1e-9)
        if step:
            (group,) = (g for g in key.groups if g.heads == (1,))
            before = tensors["out.streaming_kept"][step - 1]
            seen = before[before >= 0].tolist() + [begin - 1]
            columns = group.columns[0]
            visible = dense_row(patch, columns[columns >= 0], begin - 1)
            assert sorted(visible) == seen


def dense_row(patch, columns, row):
    rule = SinkWindow(patch.sinks, patch.window)
    seen = rule.visible(torch.tensor(0), torch.tensor(row), columns)
    return columns[seen].tolist()


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_a_gate_is_full_minus_streaming(impl):
    alpha = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)  # the second is beyond the clip
    program = make(L=40, S=40)
    program.query.requires_grad_(True)
    registry.build("duo", {"mode": "train", "sinks": 2, "window": 5}).edit(program, site(alpha))
    out = attention(program, impl).output
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    full = attention(make(L=40, S=40), "reference").output
    streaming = make(L=40, S=40)
    streaming.restrict(SinkWindow(2, 5))
    gap = ((full - attention(streaming, "reference").output) * weight).sum((0, 2, 3))
    torch.testing.assert_close(alpha.grad, torch.stack([gap[:2].sum(), torch.zeros(()).double()]))
    assert float(program.query.grad.abs().max()) > 0


def test_probabilities_of_a_mix_are_the_mixed_probabilities():
    program = make(L=30, S=30, H=4, Hkv=4)
    program.blends = [Blend(SinkWindow(1, 4), 0.25), Blend(SinkWindow(0, 2), 0.5, (0, 3))]
    program.need_weights = True
    result = attention(program, "reference")
    torch.testing.assert_close(result.weights @ program.value, result.output)


def test_zero_and_one_gates_in_training_are_full_and_streaming_heads():
    model = model_of("llama")
    inputs = inputs_of(model, left_pad=[3, 0])
    binary = [[0.0, 1.0], [1.0, 0.0]]
    span = {"sinks": 2, "window": 4}
    with hap.patched(model, "duo", alphas=binary, mode="train", **span):
        mixed = output(model, inputs)
    with hap.patched(model, "duo", alphas=binary, threshold=0.5, **span):
        deployed = output(model, inputs)
    close(mixed[inputs["attention_mask"].bool()], deployed[inputs["attention_mask"].bool()])
    assert differ(deployed, output(model, inputs))


def test_gates_start_dense_train_and_come_back_from_disk(tmp_path):
    model = model_of("llama")
    inputs = inputs_of(model)
    before = output(model, inputs)
    handle = hap.patch(model, "duo", mode="train", sinks=1, window=3)
    close(output(model, inputs), before)  # alpha = 1 everywhere
    learnt = gates(model)
    assert {layer: alpha.shape for layer, alpha in learnt.items()} == {0: (2,), 1: (2,)}
    optimizer = torch.optim.SGD(learnt.values(), lr=0.5)
    loss = model(**inputs)[0].square().mean() + penalty(model)
    loss.backward()
    optimizer.step()
    assert all(bool((a.detach() != 1).all()) for a in learnt.values())
    expected, values = output(model, inputs), [a.tolist() for a in learnt.values()]
    assert differ(expected, before)
    handle.save(tmp_path)
    handle.remove()
    loaded = hap.load(model, tmp_path)
    close(output(model, inputs), expected)
    assert [a.tolist() for a in gates(model).values()] == values
    loaded.remove()
    with pytest.raises(hap.PatchError, match="no trainable gates"):
        gates(model)


def test_the_penalty_is_the_mean_of_the_unclipped_gates():
    model = model_of("llama")
    with hap.patched(model, "duo", mode="train", alphas=[[-0.5, 1.5], [0.25, 0.75]]):
        loss = penalty(model)
        assert float(loss.detach()) == pytest.approx((0.5 + 1.5 + 0.25 + 0.75) / 4)
        loss.backward()
        assert [a.grad.tolist() for a in gates(model).values()] == [[-0.25, 0.25], [0.25, 0.25]]


def test_a_model_in_training_adds_the_penalty_to_its_loss():
    model = model_of("llama").train()
    inputs = inputs_of(model)
    with hap.patched(model, "duo", mode="train", alphas=[[-0.5, 1.5], [0.25, 0.75]], l1=0.0):
        plain = model(**inputs, labels=inputs["input_ids"]).loss
    with hap.patched(model, "duo", mode="train", alphas=[[-0.5, 1.5], [0.25, 0.75]], l1=0.5):
        with_penalty = model(**inputs, labels=inputs["input_ids"]).loss
        assert float((with_penalty - plain).detach()) == pytest.approx(0.5 * 0.75)
        (with_penalty - plain.detach()).backward()
        assert all(a.grad is not None for a in gates(model).values())


# -- deployment -------------------------------------------------------------------------------------------------------


def test_only_full_heads_keep_the_whole_cache():
    model = model_of("llama")
    ids = torch.randint(3, 100, (1, 90), generator=torch.Generator().manual_seed(0))
    plain, kept = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=plain)
    with hap.patched(model, "duo", alphas=TABLE, sinks=4, window=16) as handle, torch.no_grad():
        model(ids, past_key_values=kept)
        report = str(handle.report())
    full = plain.layers[0].keys.nbytes + plain.layers[0].values.nbytes
    for layer, row in zip(kept.layers, full_heads(TABLE, 0.5)):
        assert layer.nbytes() * 2 * 90 == full * (
            90 + 4 + 16
        )  # one of two KV heads keeps 90 tokens, the other 20
        assert layer.spans == [(0, 0) if f else (4, 16) for f in row]
    assert "%" in report


def test_every_way_to_write_gates_gives_the_same_heads(tmp_path):
    model = model_of("llama")
    inputs = inputs_of(model)
    tsv, table, plan, heads = (tmp_path / n for n in ("a.tsv", "b.json", "c.json", "d.json"))
    tsv.write_text("\n".join("\t".join(map(str, row)) for row in TABLE) + "\n")
    table.write_text(json.dumps(TABLE))
    chosen = [
        {"layer": 0, "head": 1, "kind": "kv", "score": 0.9},
        {"layer": 1, "head": 0, "kind": "kv", "score": 0.8},
    ]
    plan.write_text(json.dumps({"alphas": TABLE, "heads": chosen}))
    heads.write_text(json.dumps({"model": "m", "heads": chosen}))
    queries = {"0": [2], "1": [1]}  # query heads of those KV heads
    outputs = []
    for alphas in (TABLE, str(tsv), str(table), str(plan), str(heads), queries, {"alphas": TABLE}):
        with hap.patched(model, "duo", alphas=alphas, sinks=1, window=3):
            outputs.append(output(model, inputs))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    with hap.patched(model, "duo", alphas=str(heads), threshold=0.85, sinks=1, window=3):
        cut = output(model, inputs)
    with hap.patched(model, "duo", alphas=[[0, 1], [0, 0]], threshold=1.0, sinks=1, window=3):
        close(cut, output(model, inputs))


def test_a_streaming_head_of_no_window_to_speak_of_still_sees_itself():
    model = model_of("llama")
    with hap.patched(model, "duo", alphas=TABLE, sparsity=1.0, sinks=0, window=1):
        assert torch.isfinite(output(model, inputs_of(model))).all()


@pytest.mark.parametrize("options, words", [
    ({}, "deployment needs alphas"),
    ({"alphas": [[1.0, 0.0]]}, "1 layers, the model has 2"),
    ({"alphas": [[1.0], [0.0]]}, "1 gates in layer 0.*2 KV heads"),
    ({"alphas": [[1.0, "x"], [0, 0]]}, "must be numbers"),
    ({"alphas": [[1.0, float("nan")], [0, 0]]}, "finite"),
    ({"alphas": TABLE, "sparsity": 1.5}, r"in \[0, 1\]"),
    ({"alphas": TABLE, "sparsity": 0.5, "threshold": 0.5}, "give one"),
    ({"alphas": TABLE, "sparsity": 0.5, "mode": "train"}, "no head is chosen"),
    ({"alphas": TABLE, "window": 0}, "window=0"),
    ({"alphas": "/no/such.tsv"}, "'/no/such.tsv' does not exist"),
    ({"alphas": {"0": [0]}, "sparsity": 0.5}, "only names the full ones"),
    ({"alphas": {"0": [0]}, "threshold": 0.5}, "needs a score"),
    ({"alphas": {"0": [9]}}, "query head 9 does not exist"),
    ({"alphas": {"0": [0]}, "mode": "train"}, "not from a head set"),
    ({"alphas": TABLE, "heads": [0]}, "heads"),
], ids=str)  # fmt: skip
def test_wrong_gates_are_refused_before_anything_changes(options, words):
    model = model_of("llama")
    with untouched(model), pytest.raises(hap.PatchError, match=words):
        hap.patch(model, "duo", **options)


def test_a_file_that_is_neither_json_nor_numbers_is_refused(tmp_path):
    file = tmp_path / "alphas.tsv"
    file.write_text("0.1\toops\n")
    with pytest.raises(hap.PatchError, match="neither JSON .* nor lines of numbers"):
        hap.plan(model_of("llama"), "duo", alphas=str(file))
