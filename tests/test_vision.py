"""Spatial attention on loaded ViTs: what is read, what is saved, what is refused."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import Appended, BlockWindows, Disc, Neighborhood
from hf_attn_patch.errors import CompositionError, ConfigError, ModelMismatchError
from hf_attn_patch.install import stack
from hf_attn_patch.kernels import attention
from hf_attn_patch.kernels.layout import BlockLayout, layout_for
from hf_attn_patch.testbed.tiny import tiny_model
from tests.conformance.families import forward
from tests.test_golden import dense

pytestmark = pytest.mark.filterwarnings("ignore:.*saves 0 %")


def vit(side, family="vit", **overrides):
    """A tiny float64 ViT with a grid of side x side tokens."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(family, image_size=4 * side, patch_size=4, **overrides)
    return model.double().requires_grad_(False)


def image(side, batch=1):
    pixels = torch.randn(batch, 3, 4 * side, 4 * side, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels.double()}


def rule_of(name, grid, prefix=0, **options):
    return registry.build(name, options).rule(tuple(grid), prefix)


@pytest.fixture
def programs(monkeypatch):
    """Every program that runs, with its output."""
    seen, original = [], stack.attention
    monkeypatch.setattr(stack, "attention", lambda p, i: (seen.append((p, r := original(p, i))), r)[1])
    return seen


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_window", "davit_spatial", "maxvit_block"])
def test_windows_that_divide_the_grid_are_neighborhoods_with_stride_window(name):
    ours, gna = rule_of(name, (6, 8), 2, window=2), rule_of("neighborhood", (6, 8), 2, window=2, stride=2)
    assert torch.equal(dense(ours, 50), dense(gna, 50))


def test_lattice_is_a_dilated_neighborhood():
    assert rule_of("maxvit_grid", (6, 8), 1, size=2) == Neighborhood(
        (6, 8), (2, 2), (1, 1), (3, 4), (False, False), 1
    )


def test_halo_is_a_neighborhood_away_from_the_borders_and_fewer_keys_at_them():
    halo = dense(rule_of("halo", (24, 24), block=4, halo=2), 576)
    gna = dense(rule_of("neighborhood", (24, 24), window=8, stride=4), 576)
    y, x = torch.unravel_index(torch.arange(576), (24, 24))
    inner = (y >= 4) & (y < 20) & (x >= 4) & (x < 20)
    assert torch.equal(halo[inner], gna[inner])
    assert (halo <= gna).all() and halo.sum() < gna.sum()


def test_seven_by_seven_windows_on_14_by_14_tokens_touch_a_quarter_of_the_tiles():
    windows = layout_for(rule_of("swin_window", (14, 14), 0, window=7), 196, 196)
    gna = layout_for(rule_of("neighborhood", (14, 14), 0, window=7, stride=7), 196, 196)
    assert torch.equal(windows.dense(), gna.dense())
    assert windows.density() == (0.25, 0.25)
    assert gna.density() == (0.25, 1.0)


@pytest.mark.parametrize("rule", [
    BlockWindows.of((9, 13), (4, 5), (0, 0), (2, 3), 3), BlockWindows.of((16, 16), (8, 8), (3, 3), (0, 0), 1),
    BlockWindows.of((5, 6, 7), (2, 3, 4), (1, 0, 0), (0, 1, 0), 2), Disc((9, 13), 3.5, 2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("block", [64, 128, 256])
def test_a_token_order_lists_every_token_once_in_whole_blocks(rule, block):
    order = torch.tensor(rule.token_order(block))
    assert order.numel() % block == 0
    assert order[order >= 0].sort().values.equal(torch.arange(rule.required_len()))


def test_shifted_layers_alternate_through_the_layers_option(programs):
    model = vit(4, num_hidden_layers=2)
    with hap.patched(model, "swin_window", window=2, layers={"0::2": {}, "1::2": {"shift": 1}}):
        forward(model, image(4))
    starts = [program.rules[0].start for program, _ in programs]
    assert starts == [(0, 0), (1, 1)]
    assert [len(dense(p.rules[0], 17)[1:, 1:].unique(dim=0)) for p, _ in programs] == [4, 9]


def test_alternating_blocks_and_lattices_connect_every_pair_of_tokens(programs):
    model = vit(4, num_hidden_layers=2)
    with (
        hap.patched(model, "maxvit_block", window=2, layers="0::2"),
        hap.patched(model, "maxvit_grid", size=2, layers="1::2"),
    ):
        forward(model, image(4))
    block, lattice = (dense(program.rules[0], 17)[1:, 1:].long() for program, _ in programs)
    assert (lattice @ block > 0).all()
    assert not (block @ block > 0).all() and not (lattice @ lattice > 0).all()


def test_nothing_is_shifted_where_one_window_spans_an_axis():
    assert torch.equal(
        dense(rule_of("swin_window", (3, 6), window=3, shift=1), 18),
        dense(rule_of("swin_window", (3, 6), window=3), 18),
    )


@pytest.mark.parametrize("name, options, grid, words", [
    ("swin_window", {"window": 7}, (6, 8), "window 7 exceeds axis 0 of the grid (6, 8); at most 6 fits"),
    ("davit_spatial", {"window": [2, 2, 2]}, (6, 8), "has 3 axes, the grid (6, 8) has 2"),
    ("maxvit_block", {"window": 4}, (8, 6), "does not divide axis 1 of the grid (8, 6); 1, 2, 3, 6 do"),
    ("maxvit_grid", {"size": 4}, (8, 6), "does not divide axis 1 of the grid (8, 6); 1, 2, 3, 6 do"),
    ("halo", {"block": 9}, (8, 6), "block 9 exceeds axis 0"),
    ("clear", {"downsample": 4}, (8, 6), "a 2-D grid whose sides it divides, this one is (8, 6)"),
    ("agent", {"agents": 3}, (4, 4), "9 agents on the grid (4, 4) of 16 patches save nothing"),
])  # fmt: skip
def test_options_that_do_not_fit_the_grid_are_refused_with_what_would(name, options, grid, words):
    with pytest.raises(ModelMismatchError) as refusal:
        rule_of(name, grid, **options)
    assert words in str(refusal.value)
    with pytest.raises(ModelMismatchError):  # a grid that was named is checked before there is a model
        registry.build(name, {**options, "grid": list(grid)})


@pytest.mark.parametrize("name, options, field", [
    ("swin_window", {"window": 0}, "window=0"), ("swin_window", {"window": 3, "shift": 3}, "shift=3"),
    ("swin_window", {"window": [4, 3], "shift": [3, 3]}, "shift"), ("halo", {"halo": -1}, "halo=-1"),
    ("clear", {"radius": 0.0}, "radius=0.0"), ("clear", {"downsample": 1}, "downsample=1"),
    ("agent", {"residual": -1.0}, "residual"),
    ("maxvit_grid", {"size": 2, "grid": [4, 4, 4, 4]}, "grid"),
])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, options, field):
    with pytest.raises(ConfigError, match="out of range") as refusal:
        registry.build(name, options)
    assert field in str(refusal.value)


# -- what a plan says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, idle", [
    ("neighborhood", {"window": 7}, True),  # 14 x 14 tokens are four 8 x 8 boxes: each touches all
    ("neighborhood", {"window": 7, "stride": 7}, True), ("swin_window", {"window": 7}, False),
    ("maxvit_grid", {"size": 7}, False), ("clear", {"radius": 4.0}, True),
    ("neighborhood", {"window": 14}, False),  # dense by request: nothing was to be saved
])  # fmt: skip
def test_plan_says_when_every_tile_is_touched(name, options, idle):
    plan = hap.plan(vit(14), name, **options)
    assert any("saves 0 %" in warning for warning in plan.warnings) == idle
    if idle:
        assert "grid (14, 14)" in str(plan) and "every 64-token tile is touched" in str(plan)
        share = layout_for(registry.build(name, options).rule((14, 14), 0), 196, 196).density()[0]
        assert f"reads {share:.0%} of the keys" in str(plan)


def test_a_larger_grid_saves_and_the_plan_is_silent():
    assert not hap.plan(vit(32), "neighborhood", window=7).warnings
    assert hap.plan(vit(32), "neighborhood", window=7, grid=[8, 8]).warnings


def test_plan_warns_of_a_window_that_the_configured_images_do_not_fit():
    (warning,) = hap.plan(vit(6), "maxvit_block", window=4).warnings
    assert "images of the configured size will be refused" in warning and "1, 2, 3, 6 do" in warning


# -- clear ----------------------------------------------------------------------------------------------------------


def test_a_disc_of_radius_one_is_the_token_alone_and_a_large_one_is_dense():
    alone = dense(rule_of("clear", (5, 6), 2, radius=1.0), 32)
    assert (
        torch.equal(alone[2:, 2:], torch.eye(30, dtype=torch.bool)) and alone[:2].all() and alone[:, :2].all()
    )
    assert dense(rule_of("clear", (5, 6), 2, radius=6.5), 32).all()


def test_discs_touch_fewer_tiles_in_boxes_of_tokens_than_in_rows():
    rule = Disc((64, 64), 8.0)
    boxes = layout_for(rule, 4096, 4096)
    rows = BlockLayout.from_predicate(rule.visible, 4096, 4096)
    assert boxes.visible_count() == rows.visible_count()
    assert boxes.density()[1] < 0.6 * rows.density()[1]


def test_other_heads_do_not_read_the_coarse_image(programs):
    model = vit(4)
    with hap.patched(model, "clear", radius=1.5, downsample=2, layers=0, heads=[1, 3]):
        forward(model, image(4))
    ((program, result),) = programs
    q, k, v = program.query, program.key, program.value
    exact = attention(Program(q, k[:, :, :17], v[:, :, :17], Mask(1, 17, 17), program.scale)).output
    torch.testing.assert_close(result.output[:, [0, 2]], exact[:, [0, 2]])
    torch.testing.assert_close(result.output[:, :, 0], exact[:, :, 0])  # CLS reads tokens only
    assert (result.output[:, [1, 3], 1:] - exact[:, [1, 3], 1:]).abs().amax((0, 2, 3)).min() > 1e-3


# rows of 64 tokens: blocks are rows, and a bound that is one row short shows
@pytest.mark.parametrize("grid, prefix, inner", [
    ((18, 17), 2, None), ((18, 17), 2, 3.5), ((6, 64), 0, 2.0), ((6, 64), 0, None), ((6, 64), 1, 2.5)
])  # fmt: skip
@pytest.mark.parametrize("on, heads", [(None, 1), ((1,), 3)], ids=str)
@pytest.mark.parametrize("blocks", [(64, 64), (32, 128)], ids=str)
def test_layout_of_added_keys_is_the_rule(grid, prefix, inner, on, heads, blocks):
    n = prefix + math.prod(grid)
    rule = Appended(n, prefix, inner and Disc(grid, inner, prefix), on, heads)
    head, q, k = torch.arange(heads)[:, None, None], torch.arange(n)[None, :, None], torch.arange(n + 150)
    wanted = rule.visible(head, q, k).expand(heads, -1, -1)
    layout = BlockLayout.from_rule(rule, n, n + 150, block_q=blocks[0], block_k=blocks[1])
    assert torch.equal(layout.dense()[0], wanted)
    chosen = [h for h in range(heads) if on is None or h in on]
    assert wanted[chosen][:, prefix:, n:].all() and not wanted[chosen][:, :prefix, n:].any()
    others = [h for h in range(heads) if h not in chosen]
    assert wanted[others][..., :n].all() and not wanted[others][..., n:].any()


def test_keys_are_added_to_bidirectional_calls_only():
    x = torch.zeros(1, 1, 4, 8)
    program = Program(x, x, x, Mask(1, 4, 4, causal=True), 1.0)
    with pytest.raises(ModelMismatchError, match="its mask .*causal.* says who sees"):
        program.append(x, x)
    program = Program(x, x, x, Mask(1, 4, 4), 1.0, position_bias=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ModelMismatchError, match="position bias"):
        program.append(x, x)


# -- kk_attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["key", "value", "query"])
def test_kk_attention_compares_a_projection_with_itself(of, programs, monkeypatch):
    model = vit(4, "clip_vision_model")
    made, original = [], stack.make_program
    monkeypatch.setattr(
        stack, "make_program", lambda *a: (made.append((p := original(*a)).__dict__.copy()), p)[1]
    )
    with hap.patched(model, "kk_attention", of=of, layers=-1, heads=[0, 2]):
        forward(model, image(4))
    (before,), ((_, result),) = made, programs
    x, value = before[of], before["value"]
    same = torch.softmax(before["scale"] * x @ x.mT, -1) @ value
    plain = torch.softmax(before["scale"] * before["query"] @ before["key"].mT, -1) @ value
    torch.testing.assert_close(result.output[:, [0, 2]], same[:, [0, 2]])
    torch.testing.assert_close(result.output[:, [1, 3]], plain[:, [1, 3]])


def test_kk_attention_is_for_bidirectional_layers():
    with pytest.raises(ModelMismatchError, match="no site for kk_attention"):
        hap.plan(tiny_model("llama"), "kk_attention")
    site = SimpleNamespace(path="tower.layers.0", causal=True, num_heads=4, num_kv_heads=4)
    with pytest.raises(ModelMismatchError, match="tower.layers.0 is causal"):
        registry.build("kk_attention", {}).check(site)


# -- agent ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, [1]], ids=str)
def test_agents_leave_prefix_rows_and_other_heads_exact(heads, programs):
    model = vit(6, "dinov2_with_registers", num_register_tokens=2)
    pixels = image(6)
    forward(model, pixels)
    with hap.patched(model, "agent", agents=2, layers=0, heads=heads):
        forward(model, pixels)
    ((program, result),) = programs
    tokens = program.query.shape[2]
    key, value = program.key[:, :, :tokens], program.value[:, :, :tokens]
    exact = attention(Program(program.query, key, value, Mask(1, tokens, tokens), program.scale)).output
    torch.testing.assert_close(result.output[:, :, :3], exact[:, :, :3])
    q, scale = program.query, program.scale
    agents = q[:, :, 3:].unflatten(2, (2, 3, 2, 3)).mean((3, 5)).flatten(2, 3)
    read = torch.softmax(scale * agents @ key.mT, -1) @ value
    through = torch.softmax(scale**0.3 * q @ agents.mT, -1) @ read + 0.075 * value
    on = list(heads or range(4))
    off = [h for h in range(4) if h not in on]
    torch.testing.assert_close(result.output[:, on, 3:], through[:, on, 3:])
    torch.testing.assert_close(result.output[:, off], exact[:, off])


def test_agents_read_a_share_of_the_keys(programs):
    model = vit(16)
    with hap.patched(model, "agent", agents=4) as handle:
        forward(model, image(16))
        rows = handle.report().sites
    tokens = 16 * 16
    expected = (tokens * 16 + (tokens + 1)) / ((tokens + 1) * (tokens + 1 + 16))
    assert all(math.isclose(row.density, expected) for row in rows)


def test_agents_and_a_window_are_refused_together_with_both_names():
    model = vit(6)
    with hap.patched(model, "agent", agents=2):
        for other in ("swin_window", "kk_attention"):
            options = {"window": 3} if other == "swin_window" else {}
            with pytest.raises(CompositionError, match=f"{other} cannot be combined with agent"):
                hap.patch(model, other, **options)
