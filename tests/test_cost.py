"""`hap.cost`: passes and operations of the published cascades, tiles counted from layouts, rooflines, the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.rules import Neighborhood, SinkWindow
from hf_attn_patch.cli import app as cli
from hf_attn_patch.cost import CASCADES, GPUS, Einsum, Variant, estimate, gpus, passes, simulate, tiles_of
from hf_attn_patch.cost.cascades import operations
from hf_attn_patch.errors import ConfigError

from .small import model_of, refused, untouched

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return json.loads((GOLDEN / f"fusemax__{name}.json").read_text())


def llama_8b():
    """One layer in the shape of Llama-3-8B, without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=32)  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# -- cascades -----------------------------------------------------------------------------------------------------


def test_passes_are_those_of_the_definition():
    facts = golden("pass_counts")
    wanted = dict(facts["out"]["passes_M"])
    for name, rows in facts["in"]["cascades"].items():
        cascade = tuple(Einsum(r["out"], tuple(r["in"]), r["ranks"], r["reduce"]) for r in rows)
        assert passes(cascade) == wanted.pop(name), name
    assert wanted == {"running_max_online": passes(CASCADES["1-pass"])}
    assert [passes(CASCADES[f"{n}-pass"]) for n in (1, 2, 3)] == [1, 2, 3]


def test_operations_of_the_one_pass_cascade_are_those_of_the_published_model():
    for name, facts in golden("one_pass_model")["out"].items():
        sizes = {**facts["dims"], "M": facts["dims"]["M"] // 256, "N": 256}
        found = {e.out: e.iterations(sizes) for e in CASCADES["1-pass"]}
        assert found == facts["one_pass_iterations"], name
        assert operations(CASCADES["1-pass"], sizes) == facts["one_pass_op_counts"], name


# -- tiles --------------------------------------------------------------------------------------------------------


def test_tiles_are_counted_as_a_dense_mask_counts_them():
    length, tile = 300, 64
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = SinkWindow(4, 50).visible(torch.tensor(0), q, k) & (k <= q)
    found = tiles_of(SinkWindow(4, 50), length, length, causal=True)
    padded = torch.nn.functional.pad(seen, (0, 320 - length, 0, 320 - length))
    blocks = padded.unfold(0, tile, tile).unfold(1, tile, tile).flatten(2).any(-1)
    assert found.pairs == int(seen.sum()) and found.visited == int(blocks.sum())
    assert found.possible == 5 * 6 // 2 and found.possible_pairs == length * (length + 1) // 2
    assert found.keys == length
    assert found.speedup == 15 / int(blocks.sum())


def test_aligned_windows_are_perfect_and_sliding_ones_on_a_small_grid_save_nothing():
    aligned = tiles_of(Neighborhood((16, 16), (8, 8), (8, 8), (1, 1), (False, False), 0), 256, 256)
    assert aligned.speedup == 4 and aligned.wasted == 0 and aligned.full == aligned.visited == 4
    assert "at most 4.00 x" in str(aligned) and "perfect" in str(aligned)
    sliding = tiles_of(Neighborhood((16, 16), (9, 9), (1, 1), (1, 1), (False, False), 0), 256, 256)
    assert sliding.speedup == 1 and sliding.wasted > 0.5
    assert "saves 0 %, every 64-token tile is touched" in str(sliding)


def test_a_plan_says_what_it_saves_and_which_stride_would_save_more():
    model = model_of("dinov2", image_size=256, patch_size=4)  # 64 x 64 tokens
    plan = hap.plan(model, "neighborhood", window=9)
    made = simulate(model, plan)
    assert made.grid == (64, 64) and len(made.savings) == 1
    assert made.savings[0].layers == [s.layer for s in plan.sites]
    stride, share = (int(made.savings[0].hint.split("stride=")[1].split(":")[0]), made.savings[0].tiles)
    better = simulate(model, hap.plan(model, "neighborhood", window=9, stride=stride)).savings[0].tiles
    assert better.visited < share.visited
    assert made.savings[0].hint == f"use stride={stride}: {better.visited / better.possible:.0%} of the tiles"
    assert simulate(model, hap.plan(model, "neighborhood", window=9, stride=stride)).savings[0].hint == ""
    assert made.savings[0].hint in str(made)


def test_a_patch_that_saves_nothing_is_told_a_stride_where_one_helps():
    model = model_of("dinov2", image_size=64, patch_size=4)  # 16 x 16
    note = lambda **options: " ".join(hap.plan(model, "neighborhood", **options).warnings)
    assert "saves 0 %" in note(window=8, stride=1) and "stride=8: 25% of the tiles" in note(
        window=8, stride=1
    )
    assert note(window=8, stride=8) == ""


# -- costs --------------------------------------------------------------------------------------------------------


def test_prefill_and_decode_of_llama_3_8b_are_the_known_numbers():
    """137.5 GFLOP a layer at 4096 tokens, 83.9 MB at least, 1639 FLOP per byte, 21 of eager attention; decoding 4."""
    model = llama_8b()
    eager, dense = estimate(model, length=4096)
    exact = dense.flops * dense.read / dense.pairs  # without what whole tiles add
    assert round(exact / 1e9, 1) == 137.5
    assert round(dense.bytes / 1e6, 1) == 83.9
    assert round(exact / dense.bytes) == 1639
    assert (eager.passes, dense.passes) == (3, 1)
    # eager makes every score, causal or not, and moves each six times: 2 x 137.4 GFLOP
    assert eager.pairs == 32 * 4096**2
    assert eager.bytes - dense.bytes == 6 * 32 * 4096**2 * 2
    _, decode = estimate(model, length=4096, decode=True)
    assert decode.queries == 1 and round(decode.intensity, 1) == 4.0


def test_the_roofline_takes_the_largest_of_three_bounds():
    dense = estimate(llama_8b(), length=4096)[1]
    h100 = GPUS["H100"]
    seconds, bound = dense.seconds(h100)
    assert bound == "matmul" and math.isclose(seconds, dense.flops / 989.4e12)
    decode = estimate(llama_8b(), length=4096, decode=True)[1]
    assert decode.seconds(h100)[1] == "memory"
    assert math.isclose(decode.seconds(h100)[0] / decode.seconds(GPUS["H200"])[0], 4.8 / 3.35)
    slow = type(h100)("slow", h100.flops, h100.bytes_per_s, 1e9, "made up")
    assert dense.seconds(slow) == (dense.exps / 1e9, "exp")


def test_a_window_costs_its_tiles_and_a_cached_token_reads_only_its_window():
    model = model_of("llama")
    _, dense, window = estimate(model, [Variant("streaming", {"sinks": 64, "window": 256})], length=4096)
    tiles = tiles_of(SinkWindow(64, 256), 4096, 4096, causal=True)
    assert math.isclose(window.pairs / dense.pairs, tiles.visited / tiles.possible)
    assert math.isclose(window.read / window.dense, tiles.pairs / tiles.possible_pairs)
    _, whole, cached = estimate(
        model, [Variant("streaming", {"sinks": 64, "window": 256})], length=4096, decode=True
    )
    assert cached.read / whole.read == 320 / 4096
    assert cached.bytes < whole.bytes / 10


def test_choosing_by_content_costs_a_pass_and_products_of_its_own():
    model = model_of("llama")
    _, dense, moba = estimate(model, [Variant("moba", {"block": 64, "topk": 2})], length=1024)
    assert (dense.passes, moba.passes) == (1, 2)
    assert dense.own_flops == 0 and moba.own_flops > 0
    assert moba.pairs < dense.pairs and "random" in moba.notes[0]


def test_agents_pay_for_reading_the_keys_first():
    model = model_of("dinov2", image_size=64, patch_size=4)  # 16 x 16 patches and CLS
    heads, dim, layers = 4, model.config.hidden_size // 4, model.config.num_hidden_layers
    agent = estimate(model, [Variant("agent", {"agents": 4})])[-1]
    assert agent.own_flops == 4 * 16 * 257 * dim * heads * layers


@pytest.mark.parametrize("family", ["llama", "dinov2", "llava"])
def test_every_patch_is_estimated_or_says_why_not(family):
    model = model_of(family)
    known = 0
    with untouched(model):
        for name in hap.available():
            for options in registry.get(name).examples(model)[:1]:
                try:
                    costs = estimate(model, [Variant(name, options)], length=256)
                except hap.PatchError as error:
                    assert name in str(error) or family in str(error).lower(), f"{name}: {error}"
                    continue
                known += 1
                assert 0 < costs[-1].flops < math.inf and costs[-1].read > 0, name
    assert known >= 5


# -- commands -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_cost_command_prints_every_variant_and_gpu():
    result = run(
        "cost", "tiny:llama", "-p", "streaming:window=64", "--lengths", "512,1024", "--gpu", "h100,mi300x"
    )
    assert result.exit_code == 0, result.output
    for word in ("512 x 512", "1024 x 1024", "3-pass", "1-pass", "streaming", "H100", "MI300X"):
        assert word in result.output
    made = json.loads(run("cost", "tiny:dinov2", "--image-size", "64,96", "--json").output)
    assert [len(r) for r in made["runs"]] == [2, 2] and made["runs"][0][0]["keys"] < made["runs"][1][0][
        "keys"
    ]
    assert all(g["source"] for g in made["gpus"])


def test_plan_command_shows_what_a_pattern_saves():
    result = run("plan", "tiny:llama", "streaming:window=64", "--length", "1024")
    assert "at 1024 tokens" in result.output and "of the tiles" in result.output
    made = json.loads(run("plan", "tiny:llama", "streaming:window=64", "--length", "1024", "--json").output)
    assert made["simulation"]["savings"][0]["speedup"] > 1


def test_bad_arguments_are_named():
    with refused(ConfigError, "B200", "A100"):
        gpus(["B200"])
    model = model_of("dinov2")
    with refused(ConfigError, "no multiple of the patch size"):
        estimate(model, image=(33, 32))
    with refused(ConfigError, "needs a length"):
        estimate(model_of("llama"))
    with refused(ConfigError, "int4"):
        estimate(model, dtype="int4")
