"""`moa` with a rule per query head on grouped KV heads: what is kept, said with the number, and fitted if wanted."""

from __future__ import annotations

import random

import pytest

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.patches.sparse.moa import tightened

from .small import inputs_of, model_of, output

# KV head 0 serves query heads of 10 and 30 tokens, KV head 1 two of 20: 20 + 20 are asked for, 30 + 20 are kept
PLAN = {"alphas": [[10.0, 30.0, 20.0, 20.0]] * 2, "betas": [[0.0] * 4] * 2}
OPTIONS = dict(plan=PLAN, sinks=2, block=1, smallest=3, length=64)


def test_plan_says_how_much_more_is_kept():
    (note,) = hap.plan(model_of("llama"), "moa", **OPTIONS).warnings
    assert "25% more at 64 tokens" in note and "fit='density'" in note
    (note,) = hap.plan(model_of("llama"), "moa", **{**OPTIONS, "length": None}).warnings
    assert "25% more at 4,096 tokens, 25% more at 16,384 tokens" in note


@pytest.mark.parametrize(
    "change",
    [
        {"fit": "density"},
        {"plan": {"alphas": [[30.0, 20.0]] * 2, "betas": [[0.0] * 2] * 2}},  # a rule per KV head
        {"plan": {"alphas": [[30.0, 30.0, 20.0, 20.0]] * 2, "betas": [[0.0] * 4] * 2}},
    ],
    ids=["fitted", "rule per KV head", "rules of a group agree"],
)
def test_nothing_is_said_where_nothing_more_is_kept(change):
    assert not hap.plan(model_of("llama"), "moa", **{**OPTIONS, **change}).warnings


def test_density_keeps_what_the_plan_says_in_the_cache_and_the_report():
    kept = {}
    for fit in ("widest", "density"):
        patch = registry.build("moa", {**OPTIONS, "fit": fit})
        kept[fit] = [s + w for s, w in patch.spans({"layer": 0, "num_kv_heads": 2}, None)]
    assert kept == {"widest": [30, 20], "density": [24, 16]}
    model = model_of("llama")
    inputs = inputs_of(model, length=50)
    with pytest.warns(UserWarning, match="25% more"), hap.patched(model, "moa", **OPTIONS) as handle:
        wide = output(model, inputs)
        widest = handle.report().sites[0].density
    with hap.patched(model, "moa", **OPTIONS, fit="density") as handle:
        assert not (output(model, inputs) == wide).all()
        assert handle.report().sites[0].density < widest


def test_a_fitted_plan_is_the_given_one_where_groups_agree():
    for fit in ("widest", "density"):
        options = registry.get("moa").neutral(model_of("llama")) | {"fit": fit}
        assert registry.build("moa", options).kv_rules(0, 2, 4096) == [4096, 4096]


@pytest.mark.parametrize("seed", range(20))
def test_tightened_spans_keep_the_sum_to_a_block_and_stay_in_bounds(seed):
    draw = random.Random(seed)
    for _ in range(50):
        kv, group, block = draw.choice((1, 2, 8)), draw.choice((2, 4)), draw.choice((1, 16, 64))
        smallest = draw.choice((1, 64, 128, 1000))
        least = -(-smallest // block) * block
        sizes = [least + block * draw.choice((0, 0, draw.randrange(200))) for _ in range(kv * group)]
        found = tightened(sizes, kv, block, smallest)
        target = sum(sizes) / group
        assert target - block < sum(found) <= target
        for g, span in enumerate(found):
            own = sizes[g * group : (g + 1) * group]
            assert least <= span <= max(own) and span % block == 0


def test_a_group_that_needs_most_loses_no_larger_share_than_the_others():
    found = tightened([100, 1000, 500, 500, 200, 600], 3, 1, 1)
    assert sum(found) == 1450
    shares = [f / w for f, w in zip(found, (1000, 500, 600))]
    assert max(shares) - min(shares) < 0.01
