"""Methods for language models: numbers of the original code (of the formula, where there is none), and their edges."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import AllOf, OnHeads, SinkWindow, StridedShards
from hf_attn_patch.errors import ConfigError, ModelMismatchError
from hf_attn_patch.kernels import attention
from hf_attn_patch.kernels.layout import BlockLayout
from hf_attn_patch.model import head_sets
from hf_attn_patch.patches.heads.entropy_scale import visible_keys
from hf_attn_patch.patches.heads.pasta import token_span
from hf_attn_patch.patches.sparse.s2 import block_density, missing_residues, repaired, strides_of_heads
from tests.conformance.families import forward, inputs_of, model_of, row_of
from tests.test_golden import GOLDEN, IMPLS, dense, read


def call(path="site", layer=0, heads=None, **context):
    return SimpleNamespace(
        path=path,
        layer=layer,
        heads=heads,
        context=SimpleNamespace(override={}, prompt_length=None, **context),
    )


def attends(tensors, impl, patch, at, **mask):
    """Output and edited program of a golden case."""
    q, k, v = (tensors[f"in.{n}"].double() for n in "qkv")
    batch, _, length, width = q.shape
    program = Program(
        q, k, v, Mask(batch, length, k.shape[2], q_offset=k.shape[2] - length, **mask), scale=width**-0.5
    )
    patch.edit(program, at)
    return attention(program, impl).output, program


# -- s2 -----------------------------------------------------------------------------------------------------------

_, S2_PATTERNS = read("s2__block_mask")


@pytest.mark.parametrize("i", [i for i, p in enumerate(S2_PATTERNS["patterns"]) if p["causal"]])
def test_s2_block_masks_are_the_original_ones(i):
    tensors, config = read("s2__block_mask")
    p = config["patterns"][i]
    expected = tensors[f"out.block_mask_{i}"]
    heads = 1 if p["homo_head"] else p["num_kv_heads"]
    step = max(1, p["vert_stride"] // p["num_heads"])  # the original's: from the query heads
    residues = strides_of_heads(heads, p["vert_stride"], step, p["head_sliding_offset"], p["num_dense_heads"])
    rule = StridedShards(residues, p["vert_stride"], p["local_blocks"], p["block_size"])
    at = torch.arange(expected.shape[-1]) * p["block_size"]
    ours = torch.stack([rule.visible(torch.tensor(h), at[:, None], at[None]) for h in range(heads)]).tril()
    assert torch.equal(ours.repeat_interleave(expected.shape[0] // heads, 0), expected)
    assert (not missing_residues(residues, p["vert_stride"])) == p["union_complete"]
    assert block_density(rule, expected.shape[-1]) == pytest.approx(p["density"], abs=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_s2_attends_like_the_original(impl):
    tensors, c = read("s2__attention")
    options = {"block": c["block"], "local_blocks": c["local_blocks"], "stride": c["vert_stride"]}
    patch = registry.build(
        "s2", {**options, "step": max(1, c["vert_stride"] // c["H"]), "incomplete": "allow"}
    )
    out, program = attends(tensors, impl, patch, call(), causal=True)
    for head in range(c["H"]):
        seen = dense(program.rule, c["L"], head // (c["H"] // c["Hk"])).tril()
        assert torch.equal(seen, tensors["out.token_mask"][head])
    torch.testing.assert_close(out, tensors["out.o"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [2, 3, 5, 8])
@pytest.mark.parametrize("stride", [2, 3, 8, 16])
def test_s2_repair_makes_the_union_complete_and_shares_evenly(kv_heads, stride):
    plain = strides_of_heads(kv_heads, stride)
    fixed = repaired(plain, stride)
    assert missing_residues(fixed, stride) == []
    assert all(set(a) <= set(b) for a, b in zip(plain, fixed))
    sizes = [len(own) for own in fixed]
    assert max(sizes) - min(sizes) <= 1
    if stride <= kv_heads:
        assert fixed == plain


def test_s2_density_of_the_fact_sheet():
    rule = StridedShards(strides_of_heads(8, 8), 8, 4, 64)
    assert block_density(rule, 64) == pytest.approx(0.230, abs=5e-4)


def test_s2_says_and_refuses_incomplete_unions():
    model = model_of("llama", num_key_value_heads=2)
    options = {"stride": 8, "block": 2, "local_blocks": 1}
    (note,) = hap.plan(model, "s2", **options).warnings
    assert "complete after repair" in note and "[4, 4] of 8" in note and "%" in note
    (note,) = hap.plan(model, "s2", incomplete="allow", **options).warnings
    assert "INCOMPLETE" in note and "[1, 2, 3, 5, 6, 7] of 8" in note
    with pytest.raises(ModelMismatchError, match=r"2 of 8 stripes.*incomplete='repair'"):
        hap.plan(model, "s2", incomplete="refuse", **options)
    with pytest.raises(ModelMismatchError, match="one KV head"):
        hap.plan(model_of("llama", num_key_value_heads=1), "s2", **options)
    with pytest.raises(ModelMismatchError, match="dense_heads=3"):
        hap.plan(model, "s2", dense_heads=3, **options)
    with pytest.raises(ModelMismatchError, match="layer 7"):
        hap.plan(model, "s2", dense_layers=[7], **options)
    with pytest.raises(ModelMismatchError, match="no chosen layer sparse"):
        hap.plan(model, "s2", dense_every=2, layers=1, **options)
    with pytest.raises(ConfigError, match="local_blocks=0"):
        hap.plan(model, "s2", local_blocks=0)


@pytest.mark.filterwarnings("ignore")
def test_s2_hybrid_leaves_dense_layers_alone_and_reports_density():
    model, inputs = model_of("llama"), inputs_of("llama")
    options = {"stride": 4, "block": 2, "local_blocks": 1}
    with hap.patched(model, "s2", **options, dense_every=2) as handle:
        hybrid = forward(model, inputs)
        report = handle.report()
    with hap.patched(model, "s2", **options, layers="0::2"):
        assert torch.equal(forward(model, inputs), hybrid)
    assert [s.density is None for s in report.sites] == [s.layer % 2 == 1 for s in report.sites]
    assert 0 < report.density < 1


def random_shards(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda lo, hi: int(torch.randint(lo, hi, (1,), generator=g))
    stride, heads = r(1, 7), r(1, 4)
    residues = tuple(tuple(x for x in range(stride) if r(0, 2)) for _ in range(heads))
    rule = StridedShards(residues, stride, r(1, 4), (1, 3, 16, 20, 64, 100)[r(0, 6)])
    kind = seed % 3
    rule = OnHeads(rule, (0, 2), 2 * heads + 2 * (heads == 1)) if kind == 1 else rule
    rule = AllOf((rule, SinkWindow(2, 60))) if kind == 2 else rule
    length, offset = r(100, 600), r(0, 50)
    return rule, length, offset, bool(r(0, 2)), (None, 90)[r(0, 2)]


@pytest.mark.parametrize("seed", range(30))
def test_layout_of_strided_shards_is_the_rule(seed):
    rule, length, offset, causal, window = random_shards(seed)
    blocks = {"block_q": (32, 64, 128)[seed % 3], "block_k": (64, 32)[seed % 2]}
    layout = BlockLayout.from_rule(rule, length - offset, length, offset, causal, window, **blocks)
    q, k = torch.arange(offset, length)[:, None], torch.arange(length)[None]
    seen = rule.visible(torch.arange(rule.heads).reshape(-1, 1, 1), q, k).expand(rule.heads, -1, -1)
    seen = seen & (k <= q) if causal else seen
    seen = seen & (k > q - window) if window else seen
    assert torch.equal(layout.dense()[0], seen)


def test_layout_of_long_strided_shards_holds_one_tile():
    rule = StridedShards(strides_of_heads(4, 8), 8, 4, 64)
    layout = BlockLayout.from_rule(rule, 16384, 16384, causal=True)
    assert layout.bits.shape[0] == 1  # the causal diagonal
    assert layout.density()[1] == pytest.approx(block_density(rule, 256))


# -- entropy_scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["causal_logn", "t2i_global"])
def test_entropy_scale_is_the_formula(case, impl):
    tensors, c = read(f"logn__{case}")
    patch = registry.build("entropy_scale", {"train_length": c["train_len"]})  # the rest are the defaults
    causal = c["mode"] == "causal"
    patch.check(SimpleNamespace(path="site", part="text", causal=causal, module=None))
    out, program = attends(tensors, impl, patch, call(), causal=causal, padding=tensors["in.attention_mask"])
    valid = tensors["out.valid_rows"]
    factor = program.query_scale.expand_as(tensors["out.factor"])
    for ours, theirs in ((factor, tensors["out.factor"]), (out, tensors["out.o"])):
        ours, theirs = ours.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def some_masks():
    holes = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    same_third = lambda b, h, q, k: (q // 3 == k // 3) & (k <= q)
    given = torch.rand(2, 1, 5, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    return {
        "causal": Mask(2, 5, 12, q_offset=7, causal=True),
        "causal window": Mask(2, 5, 12, q_offset=7, causal=True, window=4),
        "window over a cut cache": Mask(2, 2, 5, q_offset=10, kv_offset=7, causal=True, window=4),
        "holes": Mask(2, 5, 12, q_offset=7, causal=True, padding=holes),
        "holes in a window": Mask(2, 5, 12, q_offset=7, causal=True, window=4, padding=holes),
        "bidirectional": Mask(2, 12, 12, padding=holes),
        "packed": Mask(2, 12, 12, rule=same_third),
        "given": Mask(2, 5, 12, q_offset=7, given=given),
    }


@pytest.mark.parametrize("name", some_masks())
def test_visible_keys_are_those_of_the_dense_mask(name):
    mask = some_masks()[name]
    dense_count = mask.block(mask.query_columns, mask.key_columns).expand(2, 1, -1, -1).sum(-1)[:, 0]
    assert torch.equal(visible_keys(mask).expand(2, -1), dense_count)


def test_entropy_scale_takes_the_trained_length_of_the_config_and_says_when_there_is_none():
    model = model_of("llama")
    trained = model.config.max_position_embeddings
    inputs = inputs_of("llama")
    plain = forward(model, inputs)
    with hap.patched(model, "entropy_scale"):  # shorter than trained: log-n with clip changes nothing
        torch.testing.assert_close(forward(model, inputs), plain, rtol=0, atol=1e-12)
    with hap.patched(model, "entropy_scale", clip=False):
        ours = forward(model, inputs)
    with hap.patched(model, "entropy_scale", clip=False, train_length=trained):
        assert torch.equal(forward(model, inputs), ours)
    with pytest.raises(ModelMismatchError, match="train_length"):
        hap.plan(model_of("dinov2"), "entropy_scale")


def test_entropy_scale_refuses_models_that_scale_already_and_leaves_sliding_layers_alone(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(model.config, "attn_temperature_tuning", True, raising=False)
    with pytest.raises(ModelMismatchError, match="attn_temperature_tuning"):
        hap.plan(model, "entropy_scale")
    sliding = Program(*(torch.ones(1, 1, 9, 4),) * 3, Mask(1, 9, 9, causal=True, window=3), scale=1.0)
    patch = registry.build("entropy_scale", {"train_length": 6})
    patch.check(SimpleNamespace(path="site", part="text", causal=True, module=None))
    patch.edit(sliding, call())
    assert torch.equal(sliding.query_scale, torch.ones_like(sliding.query_scale))


def test_two_query_scales_multiply():
    model, inputs = model_of("llama"), inputs_of("llama")
    options = {"train_length": 4, "length": 8}
    with (
        hap.patched(model, "entropy_scale", gamma=1.0, **options),
        hap.patched(model, "entropy_scale", gamma=2.0, **options),
    ):
        twice = forward(model, inputs)
    with hap.patched(model, "entropy_scale", gamma=3.0, **options):
        torch.testing.assert_close(forward(model, inputs), twice, rtol=0, atol=1e-9)


# -- pasta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["exclude", "decode_step"])
def test_pasta_steers_like_the_original(case, impl):
    tensors, c = read(f"pasta__{case}")
    patch = registry.build("pasta", {"alpha": c["alpha"]})
    at = call(heads=tuple(c["heads"]))
    at.context.override["marked"] = tensors["in.token_ranges"].transpose(0, 1)  # [B, sections, 2]
    at.context.prompt_length = c["input_len"]
    out, _ = attends(tensors, impl, patch, at, causal=True)
    torch.testing.assert_close(out, tensors["out.o"], rtol=0, atol=1e-9)


def test_pasta_token_spans_are_the_original_ones():
    cases = json.loads((GOLDEN / "pasta__token_range.json").read_text())
    for item, expected in zip(cases["in"], cases["out"]):
        found = token_span(item["string"], item["substring"], item["offsets"], item["occurrence"])
        assert list(found) == expected
    assert token_span("ab", "b", [(0, 0), (0, 1), (1, 2)]) == (2, 3)  # neither BOS nor a token that touches
    with pytest.raises(ConfigError, match="occurs 1 times"):
        token_span("ab", "b", [(0, 1), (1, 2)], 1)


def test_pasta_spans_of_hap_prompt_are_those_of_the_row():
    model = model_of("llama")
    pads, spans = [4, 0, 1], [[[2, 5]], [[0, 1], [7, 9]], []]
    inputs = inputs_of("llama", batch=3, left_pad=pads)
    plain = forward(model, inputs)
    with hap.patched(model, "pasta", head_config={"0": [0, 3], "1": [1]}):
        with hap.prompt(model, marked=spans):
            together = forward(model, inputs)
        for row, pad in enumerate(pads):
            with hap.prompt(model, marked=spans[row] if spans[row] else [[]]):
                alone = forward(model, row_of(inputs, row, 3, pad))
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(together[2, 1:], plain[2, 1:], rtol=0, atol=1e-9)
    assert float((together[0, 8:] - plain[0, 8:]).abs().max()) > 1e-4


def test_pasta_complement_with_a_marked_head_equals_the_option():
    model, inputs = model_of("llama"), inputs_of("llama")
    with hap.patched(model, "pasta", marked=[[1, 4]]):
        expected = forward(model, inputs)
    with hap.patched(model, "pasta"), hap.prompt(model, marked=[[1, 4]]):
        assert torch.equal(forward(model, inputs), expected)
    # multiplying the others by alpha is multiplying the marked ones by 1 / alpha while everything is prompt
    with hap.patched(model, "pasta", marked=[[1, 4]], target="span", alpha=100.0):
        torch.testing.assert_close(forward(model, inputs), expected, rtol=0, atol=1e-9)


def test_pasta_says_what_is_wrong():
    model, inputs = model_of("llama"), inputs_of("llama")
    with hap.patched(model, "pasta") as handle:
        with pytest.raises(ConfigError, match=r"no spans.*hap\.prompt"):
            forward(model, inputs)
        with handle.disabled():
            forward(model, inputs)
        with (
            hap.prompt(model, marked=[[[0, 1]]] * 3),
            pytest.raises(ConfigError, match="3 rows, the batch has 2"),
        ):
            forward(model, inputs)
    for options, words in [
        ({"marked": [[3, 1]]}, r"span \[3, 1\]"),
        ({"marked": [[0.5, 1]]}, "span"),
        ({"marked": [[[0, 1]], [[1, 2]]]}, "per row"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"head_config": {"0": 3}}, "layer 0 maps to 3"),
    ]:
        with pytest.raises(ConfigError, match=words):
            hap.plan(model, "pasta", **options)
    with pytest.raises(ModelMismatchError, match="layer 0 query head 9 does not exist"):
        hap.plan(model, "pasta", marked=[[0, 1]], head_config={0: [9]})


def test_pasta_heads_of_a_mapping_may_have_their_own_alpha():
    model, inputs = model_of("llama"), inputs_of("llama")
    with hap.patched(model, "pasta", marked=[[1, 4]], heads={0: {"alpha": 0.1}, 2: {"alpha": 0.5}}):
        assert torch.isfinite(forward(model, inputs)).all()


# -- retrieval_mask and head sets -----------------------------------------------------------------------------------


def test_retrieval_mask_equals_zeroing_the_output_projection():
    model, inputs = model_of("llama"), inputs_of("llama")
    with hap.patched(model, "retrieval_mask", head_set={"0": [1, 2], "1": [0]}):
        masked = forward(model, inputs)
    projections = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    before = [w.clone() for w in projections]
    width = model.config.head_dim
    try:
        with torch.no_grad():
            for layer, head in ((0, 1), (0, 2), (1, 0)):
                projections[layer][:, head * width : (head + 1) * width] = 0
        torch.testing.assert_close(masked, forward(model, inputs), rtol=0, atol=1e-12)
    finally:
        with torch.no_grad():
            for w, old in zip(projections, before):
                w.copy_(old)


def test_head_sets_are_read_in_every_format(tmp_path):
    model, inputs = model_of("llama"), inputs_of("llama")  # 4 query heads, 2 KV heads
    entries = [{"layer": a, "head": h, "score": s} for a, h, s in ((0, 3, 0.2), (1, 0, 0.9), (0, 1, 0.5))]
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"model": "a/b", "objective": "retrieval", "heads": entries}))
    outputs = []
    for options in (
        {"head_set": {0: [1], 1: [0]}},
        {"head_set": str(file), "top": 2},
        {"head_set": entries, "top": 2},
        {"head_set": {"0-3": [0.1, 0.3], "1-0": [0.9], "0-1": 0.5}, "top": 2},
    ):
        with hap.patched(model, "retrieval_mask", **options):
            outputs.append(forward(model, inputs))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    kv = head_sets.read({"kind": "kv", "heads": [{"layer": 0, "head": 1}]}, "test")
    assert kv.of_layer(0, 4, 2) == (2, 3) and kv.of_layer(1, 4, 2) == ()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"head_set": "/no/such.json"}, ConfigError, "'/no/such.json' does not exist"),
        ({"head_set": {"0": [0]}, "top": 1}, ConfigError, "layer 0 query head 0 has none"),
        ({"head_set": {"0-1": 0.5}, "top": 2}, ConfigError, "top=2, but the head set holds 1"),
        ({"head_set": {"a": [0]}}, ConfigError, "'a' is no layer number"),
        ({"head_set": {"0": [0, 0]}}, ConfigError, "twice"),
        ({"head_set": [{"layer": 0}]}, ConfigError, "head=None"),
        ({"head_set": [{"layer": 0, "head": 0, "kind": "v"}]}, ConfigError, "kind='v'"),
        ({"head_set": [{"layer": 0, "head": 0, "score": "x"}]}, ConfigError, "score='x'"),
        (
            {"head_set": {"0": [4]}},
            ModelMismatchError,
            "query head 4 does not exist, .* 4 query heads and 2 KV",
        ),
        (
            {"head_set": [{"layer": 0, "head": 2, "kind": "kv"}]},
            ModelMismatchError,
            "KV head 2 does not exist",
        ),
        ({"head_set": {"9": [0]}}, ModelMismatchError, "numbered 0 to 1"),
        ({"head_set": {"1": [0]}, "layers": 0}, ModelMismatchError, "none of the 1 heads"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_head_sets_are_refused_before_anything_changes(options, error, words):
    with pytest.raises(error, match=words):
        hap.plan(model_of("llama"), "retrieval_mask", **options)


def test_a_head_set_of_another_model_warns(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(model.config, "_name_or_path", "org/this-model")
    made = hap.plan(
        model, "retrieval_mask", head_set={"model": "org/other", "heads": [{"layer": 0, "head": 0}]}
    )
    assert made.warnings == ["the head set was made for org/other, this model is org/this-model"]
