"""Bytes, turns, pictures and the undo proof."""

from __future__ import annotations

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.eval import measurements, pictures
from hf_attn_patch.eval.demo.common import Size
from hf_attn_patch.eval.demo.plan import demo_plan, needle_columns
from hf_attn_patch.eval.demo.undo import UndoProof
from tests.eval_models import language_model, vision_model

PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head dim, bytes


def test_dense_cache_bytes_are_the_formula():
    model, tokenizer = language_model()
    assert measurements.kv_bytes(model, 50, tokenizer) == 50 * PER_TOKEN
    assert measurements.kv_bytes(model, 50) == 50 * PER_TOKEN


def test_a_streaming_cache_really_holds_less():
    model, _ = language_model()
    with hap.patched(model, "streaming", sinks=2, window=10):
        held = measurements.kv_bytes(model, 100)
    assert held == 12 * PER_TOKEN
    assert measurements.kv_bytes(model, 100) == 100 * PER_TOKEN


def test_a_view_counts_as_the_storage_it_keeps_alive_and_only_once():
    class Layer:
        def __init__(self):
            whole = torch.zeros(10, 4)
            self.keys, self.values, self.more = whole[:1], whole[1:2], [{"x": torch.zeros(3)}]

    class Cache:
        layers = [Layer()]

    assert measurements.cache_nbytes(Cache()) == 10 * 4 * 4 + 3 * 4


def test_an_object_without_layers_is_refused():
    with pytest.raises(ValueError, match="object has no layers"):
        measurements.cache_nbytes(object())


def test_runs_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert measurements.in_turns(runs, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]


def test_speeds_are_positive_and_leave_the_model_alone():
    model, tokenizer = language_model()
    assert measurements.prefill_tokens_per_second(model, tokenizer, 64, repeats=1) > 0
    vit, preprocess = vision_model()
    assert measurements.images_per_second(vit, torch.rand(4, 3, 56, 56), batch=2, repeats=1) > 0


def test_keys_read_are_counted_by_hand():
    rule = SinkWindow(sinks=(2, 2), window=(5, 100))
    assert pictures.keys_read(rule, 49, 50) == [7, 50]
    assert pictures.keys_read(rule, 3, 50) == [4, 4]


def test_picture_data_of_a_language_model():
    model, tokenizer = language_model()
    plan = {"alphas": [[8.0, 8.0], [8.0, 0.0]], "betas": [[0.0, 0.0], [0.0, 1.0]]}
    with hap.patched(model, "moa", plan=plan, sinks=2, block=1, smallest=1, length=128) as handle:
        measurements.prefill(model, torch.arange(128)[None])
        seen = pictures.language(handle, 128)
    assert seen["spans"] == [[8, 8], [8, 128]] and seen["shown_layer"] == 1
    assert len(seen["blocks"]) == 2 and len(seen["blocks"][0]) == 2  # KV heads, 128 / 64 query blocks
    assert seen["blocks"][1] == pictures.causal_blocks(128)
    assert 0 < seen["density"] < 1 and seen["executor"]


def test_picture_data_of_a_vision_model():
    model, _ = vision_model()
    pixels = torch.rand(2, 3, 56, 56)
    with hap.patched(model, "neighborhood", window=3) as handle:
        model(pixel_values=pixels)
        seen = pictures.vision(handle, pixels)
    assert seen["grid"] == [4, 4] and seen["prefix"] == 1
    assert all(sum(map(sum, view["seen"])) == 9 for view in seen["views"])
    assert seen["views"][1]["query"] == [0, 0] and seen["views"][1]["seen"][0] == [1, 1, 1, 0]


def test_undo_proof_holds_for_a_patch_that_was_removed():
    model, _ = language_model()
    proof = UndoProof(model, {"input_ids": torch.arange(60)[None]})
    found = proof.check(("streaming", {"window": 4}))
    assert found["undone"] and found["max_abs_difference"] == 0.0 and found["while_patched"] > 0.01


@pytest.mark.parametrize("what", ["weights", "hook", "attention"])
def test_undo_proof_notices_what_is_left_behind(what):
    model, _ = language_model()
    proof = UndoProof(model, {"input_ids": torch.arange(60)[None]})
    if what == "weights":
        with torch.no_grad():
            model.lm_head.weight[5, 5] += 1e-3
    elif what == "hook":
        model.model.layers[0].register_forward_pre_hook(lambda module, args: None)
    else:
        model.set_attn_implementation("eager")
    assert not proof.check(("streaming", {"window": 4}))["undone"]


def test_needle_columns_cover_every_occurrence():
    assert needle_columns([9, 1, 2, 9, 9, 1, 2], [1, 2], before=1) == [0, 1, 2, 4, 5, 6]


def test_a_demo_plan_fits_the_model_and_restores_its_attention():
    model, tokenizer = language_model()
    attention = model.config._attn_implementation
    # thresholds that every head passes, then none: the rules follow the scores
    everything = demo_plan(model, tokenizer, retrieves=0.0, length=300)
    short = demo_plan(model, tokenizer, retrieves=2.0, looks_far=2.0, length=300)
    assert everything == {"alphas": [[0.0] * 4] * 2, "betas": [[1.0] * 4] * 2}
    assert short == {"alphas": [[256.0] * 4] * 2, "betas": [[0.0] * 4] * 2}
    assert model.config._attn_implementation == attention
    with hap.patched(model, "moa", plan=short):
        pass


@pytest.mark.parametrize("slow, expected", [(2, 1), (1, 2)])
def test_one_thread_is_chosen_where_more_are_slower(slow, expected):
    import time

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = lambda: time.sleep(0.05 if torch.get_num_threads() == slow else 0.01)
        assert measurements.fastest_threads(run) == expected and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_demo_shrinks_for_a_slow_machine_and_never_below_one_item():
    full = Size()
    assert full.fitting_tokens(1e6, 4) == full and full.fitting_images(1e6, 3) == full
    half = full.fitting_tokens(500.0, 4)
    assert 4 * half.tokens / 500 <= 200 and half.passkey_lengths == full.passkey_lengths
    smallest = full.fitting_tokens(1e-3, 4)
    assert smallest.rounds == 1 and smallest.passkey_depths == (0.5,)
    assert full.fitting_images(1e-3, 3).large_images == 0 and full.fitting_images(1e-3, 3).knn_test == 40
