"""What inspection says about the attention modules of real architectures."""

from __future__ import annotations

import pytest
from torch import nn

import hf_attn_patch as hap
from hf_attn_patch.errors import ModelMismatchError, PatchError
from hf_attn_patch.model import sites as site_module
from hf_attn_patch.model.sites import find_sites, layer_module, register_site_facts

from .small import model_of, refused

# family -> [(path, part, layer, causal, heads, KV heads, head dim)], first site of every kind
FACTS = {
    "llama": [("model.layers.1.self_attn", "text", 1, True, 4, 2, 16)],
    "gpt2": [("transformer.h.1.attn", "text", 1, True, 4, 4, 16)],
    "bert": [("encoder.layer.1.attention.self", "text", 1, False, 4, 4, 16)],
    "vit": [("layers.1.attention", "vision", 1, False, 4, 4, 16)],
    "videomae": [("encoder.layer.1.attention.attention", "vision", 1, False, 4, 4, 16)],
    "whisper": [
        ("model.encoder.layers.1.self_attn", "encoder", 1, False, 4, 4, 16),
        ("model.decoder.layers.1.self_attn", "decoder", 1, True, 4, 4, 16),
        ("model.decoder.layers.1.encoder_attn", "cross", 1, False, 4, 4, 16),
    ],
    "t5": [
        ("encoder.block.1.layer.0.SelfAttention", "encoder", 1, False, 4, 4, 16),
        ("decoder.block.1.layer.0.SelfAttention", "decoder", 1, True, 4, 4, 16),
        ("decoder.block.1.layer.1.EncDecAttention", "cross", 1, False, 4, 4, 16),
    ],
    "llava": [
        ("model.vision_tower.encoder.layers.1.self_attn", "vision", 1, False, 4, 4, 16),
        ("model.language_model.layers.1.self_attn", "text", 1, True, 4, 2, 16),
    ],
    "gemma3": [
        ("model.vision_tower.encoder.layers.1.self_attn", "vision", 1, False, 4, 4, 16),
        ("model.language_model.layers.1.self_attn", "text", 1, True, 4, 2, 16),
    ],
}


@pytest.mark.parametrize("family", list(FACTS))
def test_facts_of_the_sites(family):
    found = {s.path: s for s in find_sites(model_of(family))}
    for path, part, layer, causal, heads, kv_heads, dim in FACTS[family]:
        s = found.get(path)
        assert s is not None, f"{path} is not among {list(found)}"
        got = (s.part, s.layer, s.causal, s.num_heads, s.num_kv_heads, s.head_dim)
        assert got == (part, layer, causal, heads, kv_heads, dim), path
        assert part in s.parts and s.group_size == heads // kv_heads
        assert path in str(s) and s.class_name in repr(type(s.module))


def test_whisper_encoder_is_audio_and_its_decoder_text():
    sites = find_sites(model_of("whisper"))
    assert {s.parts for s in sites if s.part == "encoder"} == {frozenset({"encoder", "audio"})}
    assert {s.parts for s in sites if s.part == "decoder"} == {frozenset({"decoder", "text"})}
    assert {s.parts for s in sites if s.part == "cross"} == {frozenset({"cross"})}


def test_blocks_of_swin_are_counted_through_all_stages():
    sites = find_sites(model_of("swin"))
    assert [s.layer for s in sites] == list(range(len(sites))) and len(sites) > 2
    assert len({s.num_heads for s in sites}) > 1 and {s.part for s in sites} == {"vision"}


def test_sliding_window_of_gemma_layers_is_known():
    windows = [s.window for s in find_sites(model_of("gemma3_text"))]
    assert None in windows and any(isinstance(w, int) for w in windows)
    sliding = next(s for s in find_sites(model_of("gemma3_text")) if s.window)
    assert f"window {sliding.window}" in str(sliding)


def test_projections_are_named():
    llama = dict(find_sites(model_of("llama"))[0].projections)
    assert llama == {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    gpt2 = dict(find_sites(model_of("gpt2"))[0].projections)
    assert gpt2["fused"] == "c_attn" and gpt2["out"] == "c_proj"


@pytest.mark.parametrize("family", ["falcon", "bloom", "mpt"])
def test_models_with_their_own_attention_have_no_site(family):
    assert find_sites(model_of(family)) == []


def test_every_site_is_reachable_and_has_a_layer():
    for family in FACTS:
        model = model_of(family)
        for site in find_sites(model):
            assert model.get_submodule(site.path) is site.module
            layer = layer_module(model, site.path)
            assert site.module in list(layer.modules()) and layer is not model


@pytest.fixture
def facts(monkeypatch):
    """Registered facts are forgotten after the test."""
    known: dict = {}
    monkeypatch.setattr(site_module, "_site_facts", lambda: known)
    return known


def test_registered_facts_correct_inspection(facts):
    model = model_of("llama")
    register_site_facts(
        "LlamaAttention", part="audio", num_heads=".config.num_attention_heads", causal=False, window=7
    )
    site = find_sites(model)[0]
    assert (site.part, site.num_heads, site.causal, site.window) == ("audio", 4, False, 7)
    with refused(PatchError, "moa", "audio"):
        hap.plan(model, "moa", plan={"alphas": [[1.0] * 4] * 2, "betas": [[0.0] * 4] * 2})


def test_unknown_fact_is_refused(facts):
    with refused(ModelMismatchError, "['colour']", "num_heads"):
        register_site_facts("LlamaAttention", colour="red")
    assert facts == {}


def test_sites_are_found_through_any_wrapper():
    model = model_of("llama")
    wrapped = nn.Sequential(nn.Identity(), model)
    assert [s.path for s in find_sites(wrapped)] == [s.path for s in find_sites(model)]
    with hap.patched(wrapped, "streaming") as handle:
        assert hap.active(model)[0].name == handle.name


def test_a_part_of_a_model_can_be_patched_alone():
    # the caller may hold only the language model of a larger one
    model = model_of("llava")
    inner = model.model.language_model
    with hap.patched(inner, "streaming", window=2) as handle:
        assert [s.path for s in handle.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert [h.name for h in hap.active(model)] == ["streaming"]  # found from outside as well
