"""The contracts of every patch, over registry x families (DESIGN 10). A new patch is tested without touching this file.

Models run in float64: two exact ways to compute one thing then agree to ~1e-12, and anything above 1e-9 is a bug, so
no tolerance has to be tuned.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.forward.needs.images import image_token_ids
from hf_attn_patch.install import dispatch, stack

from .families import (
    DECODERS,
    FAMILIES,
    LENGTH,
    PER_TOKEN,
    Case,
    cases,
    columns_of,
    forward,
    inputs_of,
    joined,
    media_end,
    model_of,
    or_dense_too,
    row_of,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = 1e-9  # float64; relative to the size of the output


def close(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    scale = max(float(b.abs().max()), 1.0)
    error = float((a - b).abs().max())
    assert torch.isfinite(a).all(), f"{what}: not finite"
    assert error <= EXACT * scale, f"{what}: {error:.3g} off at scale {scale:.3g}"


def every(families=FAMILIES):
    return pytest.mark.parametrize("case", cases(families), ids=str)


def patch(case: Case, model, **more):
    return hap.patched(model, case.patch, **{**case.options, **more})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(hap.available()))
def test_neutral_value_is_dense(name, family):
    model = model_of(family)
    options = registry.get(name).neutral(model)
    if options is None:
        pytest.skip(f"{name} has no neutral value on {family}")
    inputs = inputs_of(family)
    dense = forward(model, inputs)
    try:
        made = hap.plan(model, name, **options)
        assert made.sites
        with hap.patched(model, name, **options):
            close(forward(model, inputs), dense)
    except hap.PatchError as refusal:
        pytest.skip(f"refused: {refusal}")


@every()
def test_example_changes_the_output(case):
    # otherwise the contracts below would hold for a patch that does nothing
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    dense = forward(model, inputs)
    with patch(case, model):
        changed = float((forward(model, inputs) - dense).abs().max())
    assert changed > 100 * EXACT * float(dense.abs().max())


@every()
def test_undo_leaves_nothing(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    before, dense = snapshot(model), forward(model, inputs)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    handle = hap.patch(model, case.patch, **case.options)
    forward(model, inputs)
    assert dispatch.registered()
    handle.remove()
    handle.remove()  # a second call does nothing
    after = snapshot(model)
    for key in before:
        assert after[key] == before[key], key
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(forward(model, inputs), dense)
    assert not hap.active(model) and not dispatch.registered()


@every()
def test_torch_executor_agrees_with_reference(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family, left_pad=[3, 0]) if case.family in PER_TOKEN else inputs_of(case.family)
    with patch(case, model, impl="reference"):
        truth = forward(model, inputs)
    with patch(case, model, impl="torch") as handle:
        got = forward(model, inputs)
        assert {s.executor for s in handle.report().sites} == {"torch"}
    if case.family in PER_TOKEN:
        got, truth = got[0, 3:], truth[0, 3:]
    close(got, truth)


@every(PER_TOKEN)
def test_left_padded_batch_equals_unpadded_rows(case):
    model = model_of(case.family)
    pads = [0, 5, 2]
    inputs = inputs_of(case.family, batch=3, left_pad=pads)
    with patch(case, model):
        together = forward(model, inputs)
        for row, pad in enumerate(pads):
            alone = forward(model, row_of(inputs, row, 3, pad))
            close(together[row : row + 1, pad:], alone, f"row {row}")


@every(PER_TOKEN)
def test_batch_neighbours_do_not_matter(case):
    model = model_of(case.family)
    a = inputs_of(case.family, batch=2, seed=1)
    b = inputs_of(case.family, batch=2, seed=2)
    first = row_of(a, 0, 2)
    mixed = joined(first, row_of(b, 1, 2))
    with patch(case, model):
        close(forward(model, mixed)[:1], forward(model, a)[:1])


@every(DECODERS)
@pytest.mark.parametrize("parts", ["decode", "chunks"])
def test_cache_gives_what_one_forward_gives(case, parts):
    model = model_of(case.family)
    pads = [4, 0]
    inputs = inputs_of(case.family, left_pad=pads)
    first = max(6, media_end(inputs, model))
    length = inputs["input_ids"].shape[1]
    cuts = {
        "decode": [first, *range(first + 1, length + 1)],
        "chunks": [first, first + 1, first + 4, length],
    }[parts]
    cuts = sorted({min(c, length) for c in cuts})

    def in_parts():
        cache, outputs, begin = DynamicCache(config=model.config), [], 0
        for end in cuts:
            part = columns_of(inputs, begin, end)
            outputs.append(forward(model, part, past_key_values=cache, use_cache=True))
            begin = end
        assert cache.get_seq_length() == length
        return outputs

    with or_dense_too(in_parts), patch(case, model):
        with hap.prompt(model, length=first):  # what was the prompt, said to the forward that cannot know
            whole = forward(model, inputs)
        with hap.prompt(model, length=first):
            outputs = in_parts()
    got = torch.cat(outputs, 1)
    for row, pad in enumerate(pads):
        close(got[row, pad:], whole[row, pad:], f"row {row}")


@every(("llama", "gemma3_text"))
@pytest.mark.parametrize("length", [1, 2, 15, 63, 65, 111, 257])
def test_odd_lengths_with_cache(case, length):
    model = model_of(case.family)
    inputs = inputs_of(case.family, batch=2, length=length)
    cut = max(1, length // 2)
    with patch(case, model), hap.prompt(model, length=cut):  # as in the test above
        whole = forward(model, inputs)
        cache = DynamicCache(config=model.config)
        a = forward(model, columns_of(inputs, 0, cut), past_key_values=cache, use_cache=True)
        parts = [a]
        if cut < length:
            parts.append(
                forward(model, columns_of(inputs, cut, length), past_key_values=cache, use_cache=True)
            )
        close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@every(("llama",))
def test_grouped_query_attention(case, kv_heads):
    model = model_of("llama", num_key_value_heads=kv_heads)
    inputs = inputs_of("llama", left_pad=[2, 0])
    options = registry.get(case.patch).examples(model)[case.number]
    first = LENGTH // 2
    with hap.patched(model, case.patch, **options, impl="reference"), hap.prompt(model, length=first):
        truth = forward(model, inputs)
    with hap.patched(model, case.patch, **options), hap.prompt(model, length=first):
        close(forward(model, inputs)[1], truth[1])
        cache = DynamicCache(config=model.config)
        parts = [
            forward(model, columns_of(inputs, a, b), past_key_values=cache, use_cache=True)
            for a, b in [(0, first), *((i, i + 1) for i in range(first, LENGTH))]
        ]
        close(torch.cat(parts, 1)[1], truth[1])


@every(PER_TOKEN)
def test_fully_masked_row_is_finite(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0] = 0
    assert torch.isfinite(forward(model, inputs)).all(), "the model itself cannot do this"
    with patch(case, model):
        out = forward(model, inputs)
    assert torch.isfinite(out).all()


@every(DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache_equals_without(case, beams):
    model = model_of(case.family)
    inputs = inputs_of(case.family, left_pad=[3, 0])
    inputs.pop("position_ids", None)
    prompt = inputs["input_ids"].shape[1]
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=None)
    # a random model may write its own image placeholder, for which a cacheless step then wants an image
    settings["suppress_tokens"] = image_token_ids(model.config) or None
    with or_dense_too(lambda: model.generate(**inputs, **settings)), patch(case, model):
        with hap.prompt(model, length=prompt):
            cached = model.generate(**inputs, **settings)
            if "pixel_values" in inputs and "image_grid_thw" in inputs:
                return  # Qwen-VL derives positions of a cacheless step from state of its own
            again = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, again)


@every()
def test_save_and_load_gives_the_same_output(case, tmp_path):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    with patch(case, model) as handle:
        expected = forward(model, inputs)
        handle.save(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files in (["attn_patch_config.json"], ["attn_patch.safetensors", "attn_patch_config.json"])
    loaded = hap.load(model, tmp_path)
    try:
        assert torch.equal(forward(model, inputs), expected)
        assert loaded.config.to_dict() == handle.config.to_dict()
    finally:
        loaded.remove()


@every()
def test_config_survives_json(case):
    cls = registry.get(case.patch)
    config = cls.from_dict(case.options)
    again = cls.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again == config


@pytest.mark.parametrize("name", list(hap.available()))
def test_unknown_option_is_refused_before_anything_changes(name):
    for family in FAMILIES:
        model = model_of(family)
        examples = registry.get(name).examples(model)
        if examples:
            break
    before = snapshot(model)
    with pytest.raises(hap.PatchError, match="no_such_option"):
        hap.patch(model, name, **examples[0], no_such_option=1)
    with pytest.raises(hap.PatchError, match="impl"):
        hap.patch(model, name, **examples[0], impl="cuda")
    with pytest.raises(hap.PatchError, match="part"):
        hap.patch(model, name, **examples[0], part="brain")
    with pytest.raises(hap.PatchError, match="99"):
        hap.patch(model, name, **examples[0], layers=99)
    assert snapshot(model) == before


@every(("llama", "llava", "dinov2"))
def test_failing_half_way_rolls_back(case, monkeypatch):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    before, dense = snapshot(model), forward(model, inputs)
    original, calls = stack.SitePatch.to, []

    def fails_at_the_second(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("no room for site 2")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(stack.SitePatch, "to", fails_at_the_second)
    with pytest.raises(MemoryError):
        hap.patch(model, case.patch, **case.options)
    assert len(calls) == 2
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs), dense) and not dispatch.registered()


@every()
def test_deepcopy_is_patched_and_independent(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    dense = forward(model, inputs)
    with patch(case, model):
        expected = forward(model, inputs)
        twin = copy.deepcopy(model)
    assert torch.equal(forward(model, inputs), dense)
    assert torch.equal(forward(twin, inputs), expected)
    assert [h.name for h in hap.active(twin)] == [case.patch]
    assert hap.unpatch(twin) == 1
    assert torch.equal(forward(twin, inputs), dense)


@every()
def test_disabled_is_dense_for_a_while(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    dense = forward(model, inputs)
    with patch(case, model) as handle:
        expected = forward(model, inputs)
        with handle.disabled():
            assert torch.equal(forward(model, inputs), dense)
        assert torch.equal(forward(model, inputs), expected)


@every(("llama", "llava", "dinov2", "bert"))
@pytest.mark.parametrize("other", list(hap.available()))
def test_composes_with_a_second_patch_or_refuses_with_both_names(case, other):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    examples = registry.get(other).examples(model)
    if not examples:
        pytest.skip(f"{other} does not apply to {case.family}")
    first = hap.patch(model, case.patch, **case.options)
    try:
        try:
            second = hap.patch(model, other, **examples[0])
        except hap.PatchError as refusal:
            assert case.patch in str(refusal) or "site" in str(refusal)
            assert other in str(refusal)
            return
        out = forward(model, inputs)
        assert torch.isfinite(out).all()
        with pytest.raises(hap.PatchError, match="reverse"):
            first.remove()
        second.remove()
    finally:
        hap.unpatch(model)


@pytest.mark.parametrize("case", [c for c in cases() if registry.get(c.patch).trainable], ids=str)
def test_trainable_patch_has_gradients(case):
    model = copy.deepcopy(model_of(case.family))
    handle = hap.patch(model, case.patch, **case.options)
    own = [p for n, p in model.named_parameters() if "attn_patch" in n]
    if own:
        loss = model.train()(**inputs_of(case.family))[0].square().sum()
        (
            loss + sum(hap.aux_losses(model, weighted=True).values())
        ).backward()  # some learn from a loss of their own
        # a tower may end before its last layer (LLaVA reads features of layer -2)
        reached = [p for p in own if p.grad is not None]
        assert len(reached) >= len(own) // 2 and any(float(p.grad.abs().max()) > 0 for p in reached)
    handle.remove()


@every(("llama", "dinov2"))
def test_gradients_reach_the_model(case):
    model = copy.deepcopy(model_of(case.family)).requires_grad_(True)
    inputs = inputs_of(case.family)
    grads = []
    for impl in ("reference", "torch"):
        model.zero_grad()
        with patch(case, model, impl=impl):
            model(**inputs)[0].square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in grads[0].items():
        close(grads[1][name], expected, name)


@every(("llama", "bert", "dinov2"))
def test_output_attentions_are_the_edited_probabilities(case):
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    with patch(case, model), torch.no_grad():
        plain = model(**inputs)[0]
        output = model(**inputs, output_attentions=True)
    close(output[0], plain)
    assert output.attentions and output.attentions[0] is not None
    weights = output.attentions[0]
    assert weights.shape[-2:] == (weights.shape[-2], weights.shape[-2])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@every(("llama", "dinov2"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_in_budget(case, dtype, monkeypatch):
    from ..kernels.budget import assert_within_budget

    model = model_of(case.family)
    programs = []
    original = stack.attention
    monkeypatch.setattr(stack, "attention", lambda p, impl: (programs.append(p), original(p, impl))[1])
    with patch(case, model):
        forward(model, inputs_of(case.family))
    for program in programs:
        assert_within_budget(program, "torch", dtype)


@every(("llama",))
def test_head_subset_leaves_other_heads_dense(case, monkeypatch):
    if not registry.get(case.patch).head_selectable:
        with pytest.raises(hap.PatchError, match="heads"):
            hap.patch(model_of("llama"), case.patch, **case.options, heads=0)
        return
    model = model_of(case.family)
    inputs = inputs_of(case.family)
    outputs = []
    original = stack.attention
    monkeypatch.setattr(
        stack, "attention", lambda p, impl: (outputs.append((p, r := original(p, impl))), r)[1]
    )
    with patch(case, model, heads=[1], layers=0):
        forward(model, inputs)
    program, result = outputs[0]
    plain = stack.Program(program.query, program.key, program.value, program.mask, program.scale)
    dense = original(plain, "reference").output
    close(result.output[:, [0, 2, 3]], dense[:, [0, 2, 3]])
    assert float((result.output[:, 1] - dense[:, 1]).abs().max()) > 1e-6


def test_every_builtin_patch_meets_some_family():
    covered = {c.patch for c in cases()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert covered == set(hap.available())
