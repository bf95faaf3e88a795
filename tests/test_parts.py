"""Which part of a model an attention module belongs to."""

from __future__ import annotations

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.install.plan import restricts
from hf_attn_patch.model.sites import find_sites
from hf_attn_patch.testbed.tiny import tiny_inputs

from .small import model_of, refused

STREAMING = {"sinks": 1, "window": 3}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model, batch=1, length=12))).logits


# family -> [(piece of the path, part, first layer, merged)]
PARTS = {
    "idefics2": [("perceiver_resampler", "bridge", 0), ("text_model", "text", 0), ("vision_model", "vision", 0)],
    "granite_speech": [("qformer", "bridge", 0), ("language_model", "text", 0)],
    "blip-2": [("qformer", "bridge", 0), ("language_model", "text", 0), ("vision_model", "vision", 0)],
    "instructblip": [("qformer", "bridge", 0), ("language_model", "text", 0)],
    "blip_2_qformer": [("crossattention", "cross", 0), ("layer.0.attention", "bridge", 0)],
    "kosmos-2": [("x_attn", "bridge", 0), ("text_model", "text", 0)],
    "pix2struct": [("encoder_decoder_attention", "cross", 0), ("self_attention", "decoder", 0)],
    "qwen2_5_omni": [("talker", "bridge", 0), ("token2wav", "bridge", 2), ("language_model", "text", 0)],
    "evolla": [("protein_encoder", "encoder", 0), ("model.layers", "text", 0)],
    "csm": [("backbone_model", "text", 0), ("depth_decoder", "bridge", 0), ("codec_model", "audio", 0)],
    "molmo2": [("multi_modal_projector", "bridge", 0), ("language_model", "text", 0)],
    "pi0": [("dit", "bridge", 0), ("language_model", "text", 0)],
    "florence2": [("language_model.decoder", ("decoder", "cross"), 0), ("language_model.encoder", "encoder", 0)],
    "t5gemma2": [("model.decoder", "decoder", 0), ("text_model", "encoder", 0), ("vision_tower", "vision", 0)],
    "rt_detr": [("decoder.layers", "decoder", 0)],
    "speech_to_text": [("model.encoder", "encoder", 0)],
    "xclip": [("mit", "vision", 4), ("text_model", "text", 0)],
    "mllama_vision_model": [("transformer", "vision", 0)],
    "sam": [("final_attn_token_to_image", "cross", 4)],
}  # fmt: skip


@pytest.mark.parametrize("family", list(PARTS))
def test_text_is_the_language_model_and_nothing_beside_it(family):
    sites = find_sites(model_of(family))
    for piece, part, first in PARTS[family]:
        own = [s for s in sites if piece in s.path]
        assert own and {s.part for s in own} <= ({part} if isinstance(part, str) else set(part)), piece
        assert min(s.layer for s in own) == first, piece
    text = [s for s in sites if s.part == "text"]
    assert [s.layer for s in text] == list(range(len(text)))


def test_detectors_decode_no_text_and_speech_encoders_read_none():
    assert {s.parts for s in find_sites(model_of("rt_detr"))} == {
        frozenset({"encoder", "vision"}), frozenset({"decoder", "vision"})
    }  # fmt: skip
    encoder = [s for s in find_sites(model_of("speech_to_text")) if s.part == "encoder"]
    assert {s.parts for s in encoder} == {frozenset({"encoder", "audio"})}


def test_a_bridge_is_edited_only_where_it_is_asked_for():
    model = model_of("blip-2")
    bridge = {s.path for s in find_sites(model) if "bridge" in s.parts}
    assert bridge and not bridge & {s.path for s in hap.plan(model, "head_gate", gate=0.5).sites}
    assert {s.path for s in hap.plan(model, "head_gate", part="bridge", gate=0.5).sites} == bridge
    with refused(ModelMismatchError, "streaming", "bridge"):
        hap.plan(model, "streaming", part="bridge")
    with hap.patched(model, "head_gate", part="bridge", gate=0.5) as handle:
        logits(model)
        assert {s.executor for s in handle.report().sites} != {""}


def test_merged_attention_is_its_own_kind():
    model = model_of("t5gemma2")
    merged = [s for s in find_sites(model) if s.merged]
    assert merged and {s.part for s in merged} == {"decoder"} and "merged" in str(merged[0])
    with refused(ModelMismatchError, "streaming", merged[0].path, "encoder"):
        hap.plan(model, "streaming", part="decoder", window=4)
    assert hap.plan(model, "head_gate", part="decoder", gate=0.5).sites == merged
    assert not any(s.merged for family in ("t5gemma", "bart", "llama") for s in find_sites(model_of(family)))


def test_methods_with_rules_are_told_from_those_without():
    build = hap.registry.build
    assert restricts(build("streaming", {})) and restricts(build("block_topk", {}))
    assert not restricts(build("head_gate", {})) and not restricts(build("pasta", {"marked": [[0, 1]]}))
