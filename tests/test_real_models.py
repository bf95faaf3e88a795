"""Claims about real checkpoints: skipped, visibly, where the testbed cannot be had."""

from __future__ import annotations

import pytest
import torch

import hf_attn_patch as hap

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    from hf_attn_patch import testbed

    try:
        return testbed.load("smollm2")
    except testbed.TestbedError as error:
        pytest.skip(f"testbed item smollm2: {error}")


@pytest.fixture(scope="module")
def dinov2():
    from hf_attn_patch import testbed

    try:
        return testbed.load("dinov2s")
    except testbed.TestbedError as error:
        pytest.skip(f"testbed item dinov2s: {error}")


def loss(model, ids) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_a_window_breaks_perplexity_and_sinks_repair_it(smollm2):
    from hf_attn_patch.testbed.prose import prose

    model, tokenizer = smollm2
    ids = tokenizer(prose(4000), return_tensors="pt").input_ids[:, :768]
    dense = loss(model, ids)
    with hap.patched(model, "streaming", sinks=0, window=128):
        window = loss(model, ids)
    with hap.patched(model, "streaming", sinks=4, window=128):
        sinks = loss(model, ids)
    assert dense < sinks < window
    assert window - dense > 3 * (sinks - dense)
    assert loss(model, ids) == dense  # undone, bit for bit


def test_generate_frees_the_cache_of_a_real_model(smollm2):
    from transformers import DynamicCache

    model, tokenizer = smollm2
    ids = torch.arange(600)[None] + 100
    cache = DynamicCache(config=model.config)
    with hap.patched(model, "streaming", sinks=4, window=64), torch.no_grad():
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    held = sum(layer.nbytes() for layer in cache.layers)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert held == 68 * per_token
    assert cache.get_seq_length() == 602


def test_neighborhood_with_the_whole_grid_is_dense_on_a_real_vit(dinov2):
    model, _ = dinov2
    pixels = torch.randn(1, 3, 112, 168, generator=torch.Generator().manual_seed(0))  # 8 x 12 patches
    with torch.no_grad():
        dense = model(pixels).last_hidden_state
        with hap.patched(model, "neighborhood", window=(8, 12)):
            whole = model(pixels).last_hidden_state
        with hap.patched(model, "neighborhood", window=3):
            local = model(pixels).last_hidden_state
        again = model(pixels).last_hidden_state
    scale = float(dense.abs().max())
    assert float((whole - dense).abs().max()) < 1e-4 * scale
    assert float((local - dense).abs().max()) > 1e-2 * scale
    assert torch.equal(again, dense)
