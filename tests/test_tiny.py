"""Tiny models: they build, their attention is not uniform, their inputs fit, equal seeds give equal models."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.testbed import tiny_rules as rules
from hf_attn_patch.testbed.tiny import TinyError, families, tiny_config, tiny_inputs, tiny_model

DECODERS = ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "mistral", "phi3", "qwen2", "gpt_neox"]
ENCODERS = [
    "bert",
    "vit",
    "dinov2",
    "dinov2_with_registers",
    "deit",
    "beit",
    "swin",
    "videomae",
    "clip",
    "siglip",
]
SEQ2SEQ = ["t5", "whisper"]
VLMS = ["gemma3", "llava", "qwen2_5_vl", "internvl", "paligemma", "smolvlm", "idefics3"]
SHARP = DECODERS + ENCODERS + SEQ2SEQ + VLMS


def tensors(output):
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor) and v.is_floating_point()]


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("family", SHARP)
def test_builds_and_runs_with_finite_outputs(family):
    model = tiny_model(family)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    output = run(model, tiny_inputs(model, left_pad=[0, 5]))
    assert tensors(output) and all(torch.isfinite(t).all() for t in tensors(output))


@pytest.mark.parametrize("family", SHARP)
def test_equal_seeds_give_equal_models_and_inputs(family):
    first, second = tiny_model(family), tiny_model(family)
    other = tiny_model(family, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    one, two, three = (tiny_inputs(first, seed=s) for s in (0, 0, 1))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], three[k]) for k in one)


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny_inputs(tiny_model("llama"))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", DECODERS + ["bert", "t5", "vit", "whisper"])
def test_attention_is_far_from_uniform(family):
    model = tiny_model(family, attn_implementation="eager")
    attentions = _attentions(run(model, {**tiny_inputs(model), "output_attentions": True}))
    assert attentions
    for weights in attentions:
        last = weights[:, :, -1]
        uniform = 1 / (last > 0).sum(-1)
        assert (last.max(-1).values / uniform).mean() > 1.5, "a wrong mask would not show in this model"


def _attentions(output):
    found = getattr(output, "attentions", None) or ()
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        found += getattr(output, name, None) or ()
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_grouped_heads_where_the_family_has_them(family):
    config = tiny_config(family)
    assert config.num_attention_heads == rules.HEADS and config.num_hidden_layers == 2
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert kv == (rules.HEADS if family in ("gpt2", "gpt_neox") else rules.KV_HEADS)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_does_not_change_real_rows(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2, length=17, left_pad=[0, 5])
    assert inputs["attention_mask"][1].tolist() == [0] * 5 + [1] * 12 and inputs["attention_mask"][0].all()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    padded = run(model, {**inputs, "position_ids": positions}).logits[1, 5:]
    alone = run(model, {"input_ids": inputs["input_ids"][1:, 5:]}).logits[0]
    assert torch.allclose(padded, alone, atol=2e-4 * float(alone.abs().max()))


def test_a_family_with_two_kinds_of_layers_keeps_one_of_each():
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention"]
    assert tiny_config("gemma3_text").sliding_window == rules.WINDOW
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}


@pytest.mark.parametrize("family", VLMS)
def test_vlm_inputs_hold_the_image_tokens_that_the_tower_returns(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=2, length=9, left_pad=[0, 4])
    placeholder = next(
        getattr(model.config, n)
        for n in ("image_token_id", "image_token_index")
        if getattr(model.config, n, None)
    )
    counts = (inputs["input_ids"] == placeholder).sum(-1)
    assert counts[0] == counts[1] > 0
    assert inputs["input_ids"].shape[1] == 9 + counts[0]
    assert (inputs["input_ids"][1, :4] != placeholder).all() and not inputs["attention_mask"][1, :4].any()
    changed = {**inputs, "pixel_values": inputs["pixel_values"] * -1}
    assert not torch.allclose(run(model, inputs).logits, run(model, changed).logits, atol=1e-2)


@pytest.mark.parametrize("length", [1, 2, 17, 33])
@pytest.mark.parametrize("family", ["llama", "t5", "llava"])
def test_lengths_and_batches(family, length):
    model = tiny_model(family)
    inputs = tiny_inputs(model, batch=3, length=length)
    assert inputs["input_ids"].shape[0] == 3 and inputs["attention_mask"].all()
    run(model, inputs)


def test_overrides_reach_fields_and_parts():
    assert tiny_config("llama", num_key_value_heads=1).num_key_value_heads == 1
    config = tiny_config(
        "llava", text_config={"num_key_value_heads": 1}, vision_config={"num_hidden_layers": 3}
    )
    assert config.text_config.num_key_value_heads == 1 and config.vision_config.num_hidden_layers == 3
    assert config.text_config.hidden_size == rules.WIDTH
    assert tiny_model("llama", num_hidden_layers=1).config.num_hidden_layers == 1


def test_llava_takes_another_vision_tower():
    vision = tiny_config("dinov2").to_dict()
    model = tiny_model("llava", vision_config=vision, vision_feature_select_strategy="full")
    assert type(model.model.vision_tower).__name__ == "Dinov2Model"
    assert not hasattr(model.config.vision_config, "projection_dim"), "fields of the CLIP tower are left over"
    run(model, tiny_inputs(model))


def test_errors_say_what_to_do():
    with pytest.raises(TinyError, match="Near: llama"):
        tiny_config("lama")
    with pytest.raises(TinyError, match="no field 'num_kv_heads'. Near: num_key_value_heads"):
        tiny_config("llama", num_kv_heads=1)
    with pytest.raises(TinyError, match="LlamaConfig has no field 'n_heads'"):
        tiny_config("llava", text_config={"n_heads": 1})
    with pytest.raises(TinyError, match="left_pad"):
        tiny_inputs(tiny_model("llama"), batch=2, left_pad=[1])
    with pytest.raises(TinyError, match="left_pad"):
        tiny_inputs(tiny_model("llama"), length=4, left_pad=4)
    with pytest.raises(TinyError, match="llama"):
        tiny_model("llama", num_attention_heads=0)


def test_rows_of_the_tables_name_known_families():
    from transformers import CONFIG_MAPPING

    known = {name for name in CONFIG_MAPPING.keys()}
    assert set(families()) >= set(SHARP) and len(families()) > 300
    missing = [name for name in [*rules.PARTS, *rules.OVERRIDES] if name not in known]
    parts = {
        name
        for name in missing
        if name.endswith(("_text", "_vision", "_encoder", "_vision_model", "_talker"))
    }
    assert set(missing) <= parts, "a row that no config of this transformers carries is a typo or out of date"
