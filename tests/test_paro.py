"""`paro` and its calibration: orders and blocks per head, what they hold, what is read, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.calibration.paro import block_masses, heaviest
from hf_attn_patch.errors import ConfigError, ModelMismatchError
from hf_attn_patch.install import stack
from hf_attn_patch.model.sites import find_sites
from hf_attn_patch.patches.vision.paro import orders, packed, slots, unpacked
from tests.conformance.families import forward
from tests.test_vision import image, vit


@pytest.fixture
def programs(monkeypatch):
    """Every program that runs, with its output."""
    seen, original = [], stack.attention
    monkeypatch.setattr(stack, "attention", lambda p, i: (seen.append((p, r := original(p, i))), r)[1])
    return seen


def plan_of(model, names, mask, grid, block):
    heads = model.config.num_attention_heads
    layer = {"orders": [names[h % len(names)] for h in range(heads)], "blocks": [packed(mask)] * heads}
    return {"grid": list(grid), "block": block, "layers": {"0": layer}}


def test_orders_read_the_grid_along_every_permutation_of_its_axes():
    assert orders(2) == ["hw", "wh"] and len(orders(3)) == 6 and orders(3)[0] == "fhw"
    assert slots((2, 3), "hw").tolist() == [0, 1, 2, 3, 4, 5]
    assert slots((2, 3), "wh").tolist() == [0, 2, 4, 1, 3, 5]
    x = torch.arange(24).reshape(2, 3, 4)
    for name in orders(3):  # reading in an order and putting back is the identity
        order = slots((2, 3, 4), name).argsort()
        assert torch.equal(order, x.permute(["fhw".index(a) for a in name]).flatten())


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_a_mask_survives_its_text(blocks):
    mask = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(unpacked(packed(mask), blocks), mask)
    with pytest.raises(ValueError, match="no mask of"):
        unpacked(packed(mask) + "00", blocks)


def test_heads_with_columns_read_columns(programs):
    model = vit(4, num_hidden_layers=1)
    with hap.patched(
        model, "paro", plan=plan_of(model, ["hw", "wh"], torch.eye(4, dtype=torch.bool), (4, 4), 4)
    ):
        forward(model, image(4))
    program, result = programs[0]
    attention = torch.softmax(program.query @ program.key.mT * program.scale, -1)
    y, x = torch.unravel_index(torch.arange(16), (4, 4))
    for head in range(program.num_heads):
        own = y if head % 2 == 0 else x
        seen = torch.ones(17, 17, dtype=torch.bool)
        seen[1:, 1:] = own[:, None] == own[None]
        weights = attention[:, head] * seen
        expected = weights / weights.sum(-1, keepdim=True) @ program.value[:, head]
        torch.testing.assert_close(result.output[:, head], expected)


def test_any_order_with_all_blocks_is_dense_and_so_are_layers_without_a_plan():
    model = vit(4, num_hidden_layers=2)
    dense = forward(model, image(4))
    with hap.patched(
        model, "paro", plan=plan_of(model, ["wh"], torch.ones(4, 4, dtype=torch.bool), (4, 4), 4)
    ):
        torch.testing.assert_close(forward(model, image(4)), dense)


# -- calibration ------------------------------------------------------------------------------------------------------


def columns_map(side):
    """Attention of one head in which a token reads its column."""
    x = torch.arange(side * side) % side
    same = (x[:, None] == x[None]).double()
    return (same / same.sum(-1, keepdim=True))[None, None]


def test_a_head_that_looks_along_columns_is_block_diagonal_in_column_order():
    masses = {name: block_masses(columns_map(8), slots((8, 8), name), 8) for name in orders(2)}
    torch.testing.assert_close(masses["wh"][0], 8 * torch.eye(8).double())
    torch.testing.assert_close(masses["hw"][0], torch.ones(8, 8).double())
    kept, held = heaviest(masses["wh"], 1 / 8)
    assert torch.equal(kept[0], torch.eye(8, dtype=torch.bool)) and float(held[0]) == 1.0
    assert float(heaviest(masses["hw"], 1 / 8)[1][0]) == pytest.approx(1 / 8)


def test_the_heaviest_blocks_are_kept_and_one_of_every_row():
    masses = torch.tensor([[[90, 80, 70], [2, 1, 0], [0, 0, 3]]]).double()
    kept, held = heaviest(masses, 5 / 9)
    assert kept[0].tolist() == [[True, True, True], [True, False, False], [False, False, True]]
    assert float(held[0]) == pytest.approx(245 / 246, abs=1e-12)
    assert int(heaviest(masses, 0.01)[0].sum()) == 3


def test_calibration_finds_columns_in_a_model_that_looks_along_columns(tmp_path):
    model = vit(8, num_hidden_layers=1)
    with torch.no_grad():
        # queries and keys alike, of tokens that differ by their column alone: every token looks along its column
        (codes,) = [p for n, p in model.named_parameters() if n.endswith("position_embeddings")]
        codes[:, 1:] = 30 * torch.randn(
            8, codes.shape[-1], generator=torch.Generator().manual_seed(0)
        ).repeat(8, 1)
        (layer,) = [m for m in model.modules() if hasattr(m, "k_proj")]
        layer.k_proj.weight.copy_(layer.q_proj.weight.mul_(3))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    found = hap.calibrate(model, "paro", data=pixels, density=0.125, block=8, out=tmp_path / "plan.json")
    assert set(found.plan["layers"]["0"]["orders"]) == {"wh"}
    assert found.report["mass_held"] > found.report["mass_held_row_major"]
    assert json.loads((tmp_path / "plan.json").read_text()) == found.plan
    dense = forward(model, {"pixel_values": pixels})
    outputs = []
    for plan in (str(tmp_path / "plan.json"), found.plan):
        with hap.patched(model, "paro", plan=plan) as handle:
            outputs.append(forward(model, {"pixel_values": pixels}))
            handle.save(tmp_path / "adapter")
    assert torch.equal(*outputs) and not torch.equal(outputs[0], dense)
    (tmp_path / "plan.json").unlink()  # the plan is in the adapter
    hap.load(model, tmp_path / "adapter")
    assert torch.equal(forward(model, {"pixel_values": pixels}), outputs[0])
    hap.unpatch(model)


def test_more_blocks_hold_more_and_all_of_them_everything():
    model = vit(6)
    held = [
        hap.calibrate(model, "paro", data=image(6)["pixel_values"], density=d, block=6).report["mass_held"]
        for d in (0.2, 0.5, 1.0)
    ]
    assert held[0] < held[1] < held[2] == 1.0


@pytest.mark.parametrize("change, message", [
    (lambda p: p.pop("grid"), "no plan of `calibrate paro`: KeyError"),
    (lambda p: p["layers"]["0"]["orders"].pop(), "3 orders and 4 masks"),
    (lambda p: p["layers"]["0"].update(orders=["xy"] * 4), "no plan of `calibrate paro`"),
    (lambda p: p.update(block=1), "are no mask of 16 x 16 blocks"),
])  # fmt: skip
def test_what_is_no_plan_is_refused(change, message):
    model = vit(4)
    plan = plan_of(model, ["hw"], torch.eye(4, dtype=torch.bool), (4, 4), 4)
    change(plan)
    with pytest.raises(ConfigError, match=message):
        hap.patch(model, "paro", plan=plan)


def test_no_plan_another_grid_other_heads_and_unknown_layers_are_refused():
    model = vit(4)
    with pytest.raises(ConfigError, match="hf-attn-patch calibrate paro"):
        hap.patch(model, "paro")
    with pytest.raises(ConfigError, match="is no file"):
        hap.patch(model, "paro", plan="missing.json")
    plan = plan_of(model, ["hw"], torch.eye(4, dtype=torch.bool), (4, 4), 4)
    with (
        hap.patched(model, "paro", plan=plan),
        pytest.raises(ModelMismatchError, match="calibrate at this image size"),
    ):
        model(**image(6), interpolate_pos_encoding=True)
    with pytest.raises(ModelMismatchError, match="4 heads in layer 0, .* has 2"):
        hap.patch(vit(4, num_attention_heads=2), "paro", plan=plan)
    plan["layers"]["99"] = plan["layers"].pop("0")
    with pytest.raises(ModelMismatchError, match=r"names layers \[99\]"):
        hap.patch(model, "paro", plan=plan)


def test_a_calibration_without_images_says_what_it_needs(tmp_path):
    with pytest.raises(hap.PatchError, match="processor of the model"):
        hap.calibrate(vit(4), "paro")
    with pytest.raises(hap.PatchError, match="is not a folder"):
        hap.calibrate(vit(4), "paro", images=str(tmp_path / "none"))


def test_int8_scores_are_integer_products_in_the_order_of_the_head(programs):
    model = vit(4, num_hidden_layers=1)
    plan = plan_of(model, ["hw", "wh"], torch.eye(4, dtype=torch.bool), (4, 4), 4)
    forward(model, image(4))
    with hap.patched(model, "paro", plan=plan):
        forward(model, image(4))
    with hap.patched(model, "paro", plan=plan, int8=True):
        forward(model, image(4))
    exact, whole = programs[-2][0], programs[-1][0]
    for head in range(exact.num_heads):
        order = torch.cat([torch.zeros(1).long(), 1 + slots((4, 4), ["hw", "wh"][head % 2]).argsort()])
        sides = []
        for x, block in ((exact.query, 32), (exact.key - exact.key.mean(2, keepdim=True), 4)):
            x = x[0, head, order]
            parts = [x[:1], *x[1:].split(block)]
            scales = [p.abs().max() / 127 for p in parts]
            ints = torch.cat([(p / s).round() for p, s in zip(parts, scales)])
            assert ints.abs().max() == 127
            sides.append((ints.to(torch.int8), torch.cat([s.expand(len(p)) for p, s in zip(parts, scales)])))
        (q, q_scale), (k, k_scale) = sides
        products = (q.long() @ k.long().T).double() * q_scale[:, None] * k_scale
        found = whole.query[0, head, order] @ whole.key[0, head, order].T
        torch.testing.assert_close(found, products)
        shift = exact.query[0, head, order] @ exact.key[0, head].mean(0)
        step = q_scale[:, None] / 2 * exact.key[0, head].abs().sum(-1).max() * 2
        away = exact.query[0, head, order] @ exact.key[0, head, order].T - shift[:, None] - found
        assert (
            0 < away.abs().max() < step.max() + k_scale.max() / 2 * exact.query[0, head].abs().sum(-1).max()
        )


def test_int8_is_limited_to_heads_and_passes_gradients(programs):
    model = vit(4, num_hidden_layers=1)
    plan = plan_of(model, ["hw"], torch.ones(4, 4, dtype=torch.bool), (4, 4), 4)
    pixels = image(4)["pixel_values"].requires_grad_()
    with hap.patched(model, "paro", plan=plan, int8=True, heads=[1]):
        model(pixel_values=pixels).last_hidden_state.square().sum().backward()
    program = programs[-1][0]
    with hap.patched(model, "paro", plan=plan):
        forward(model, image(4))
    plain = programs[-1][0]
    assert torch.equal(program.query[:, 0], plain.query[:, 0])
    assert not torch.equal(program.query[:, 1], plain.query[:, 1])
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0


def test_int8_needs_keys_of_their_own_for_every_head():
    model = vit(4, num_hidden_layers=1)
    plan = plan_of(model, ["hw"], torch.ones(4, 4, dtype=torch.bool), (4, 4), 4)
    site = dataclasses.replace(find_sites(model)[0], num_kv_heads=1)
    with pytest.raises(ModelMismatchError, match="1 KV heads"):
        registry.build("paro", {"plan": plan, "int8": True}).check(site)
