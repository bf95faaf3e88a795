"""`biformer`, `vmoba`, `dinat_compat`, `sparsifiner` on loaded ViTs: what is read, what is learned, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.token_permute import Tiles
from hf_attn_patch.errors import ConfigError, ModelMismatchError
from hf_attn_patch.install import stack
from hf_attn_patch.patches.vision.biformer import local_enhancement
from hf_attn_patch.patches.vision.sparsifiner import basis, coefficients, kept_coefficients, most_likely
from tests.conformance.families import forward
from tests.small import model_of
from tests.test_golden_chosen import edited
from tests.test_vision import image, vit

pytestmark = pytest.mark.filterwarnings("ignore:.*saves 0 %")


@pytest.fixture
def programs(monkeypatch):
    """Every program that runs, with its output."""
    seen, original = [], stack.attention
    monkeypatch.setattr(stack, "attention", lambda p, i: (seen.append((p, r := original(p, i))), r)[1])
    return seen


def qkv(length, heads=4, kv_heads=4, dim=8, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, dim, generator=draw).double() for h in (heads, kv_heads, kv_heads)]


def call_on(rule, kv_heads=4):
    length = rule.required_len()
    q, k, v = (x.requires_grad_() for x in qkv(length, kv_heads=kv_heads))
    return Program(q, k, v, Mask(2, length, length), 0.3, rules=[rule])


# -- biformer ---------------------------------------------------------------------------------------------------------


def test_a_region_reads_whole_regions_and_more_of_them_with_a_larger_topk():
    q, k, v = qkv(64)
    chosen = [edited("biformer", q, k, v, 0.3, (8, 8), regions=4, topk=n).rule.chosen for n in (1, 3, 7)]
    assert [c.sum(-1).unique().tolist() for c in chosen] == [[1], [3], [7]]
    assert all((few <= many).all() for few, many in zip(chosen, chosen[1:]))


def test_keep_self_puts_the_own_region_in_and_nothing_else_is_added():
    q, k, v = qkv(64)
    free, own = (
        edited("biformer", q, k, v, 0.3, (8, 8), regions=4, topk=2, keep_self=s).rule.chosen
        for s in (False, True)
    )
    assert not free.diagonal(dim1=2, dim2=3).all() and own.diagonal(dim1=2, dim2=3).all()
    assert (own.sum(-1) == 2).all()


@pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 3, 4)])
def test_local_enhancement_sums_over_neighbours_of_the_own_channel(grid):
    n = torch.Size(grid).numel()
    value = torch.zeros(1, 2, n, 3)
    value[0, 1, 0, 2] = 1.0
    weight = torch.rand(6, 1, *[3] * len(grid))
    out = local_enhancement(value, grid, weight, torch.zeros(6))
    assert out[0, 1, 0, 2] == weight[5, 0][(1,) * len(grid)]
    assert out[0, 1, 1, 2] == weight[5, 0][(*[1] * (len(grid) - 1), 0)]
    assert (out[0, 0] == 0).all() and (out[0, 1, :, :2] == 0).all()


def test_an_untrained_convolution_changes_nothing_and_a_trained_one_only_patches(programs):
    model = vit(4, num_hidden_layers=1)
    options = dict(regions=2, topk=2)
    with hap.patched(model, "biformer", **options):
        plain = forward(model, image(4))
    handle = hap.patch(model, "biformer", lce=3, **options)
    assert torch.equal(forward(model, image(4)), plain)
    own = [p for n, p in model.named_parameters() if "attn_patch" in n]
    with torch.no_grad():
        own[1].fill_(1.0)  # the bias
    forward(model, image(4))
    handle.remove()
    (_, first), (_, second), (_, third) = programs
    torch.testing.assert_close(third.output[:, :, 1:], second.output[:, :, 1:] + 1)
    torch.testing.assert_close(third.output[:, :, :1], second.output[:, :, :1])


def test_more_regions_than_tokens_are_refused():
    with pytest.raises(ModelMismatchError, match="9 regions on axis 0 of the grid .*4 tokens"):
        edited("biformer", *qkv(16), 0.3, (4, 4), regions=9)
    with pytest.raises(ConfigError, match="lce"):
        edited("biformer", *qkv(16), 0.3, (4, 4), regions=2, lce=4)


# -- vmoba ------------------------------------------------------------------------------------------------------------


def test_layers_cut_slabs_tiles_and_cubes_in_turn():
    q, k, v = qkv(4 * 6 * 8)
    options = dict(slab=2, tile=[3, 4], cube=[2, 3, 4])
    for layer, tile in enumerate([(2, 6, 8), (4, 3, 4), (2, 3, 4), (2, 6, 8)]):
        rule = edited("vmoba", q, k, v, 0.3, (4, 6, 8), layer=layer, **options).rule
        assert torch.equal(rule.k_cell, Tiles((4, 6, 8), tile).cell())
    two = [edited("vmoba", q, k, v, 0.3, (12, 16), layer=i, **options).rule.k_cell for i in range(3)]
    assert torch.equal(two[1], Tiles((12, 16), (3, 4)).cell()) and torch.equal(two[0], two[2])


@pytest.mark.parametrize("pool", ["query", "head", "block", "all"])
def test_a_higher_threshold_reads_more_the_own_block_always_and_at_1_everything(pool):
    q, k, v = qkv(64)
    rules = [
        edited("vmoba", q, k, v, 0.3, (8, 8), kinds=["tile"], tile=[2, 2], pool=pool, threshold=t).rule
        for t in (0.1, 0.4, 1.0)
    ]
    chosen = [rule.chosen for rule in rules]
    assert all((few <= many).all() and few.sum() < many.sum() for few, many in zip(chosen, chosen[1:]))
    assert chosen[2].all()
    own = chosen[0].gather(3, rules[0].k_cell.expand(2, 4, 64)[..., None])
    assert own.all()


def test_every_item_of_a_batch_has_its_own_pool():
    q, k, v = qkv(64)
    whole = edited("vmoba", q, k, v, 0.3, (8, 8), kinds=["tile"], tile=[2, 2], pool="all").rule.chosen
    alone = edited(
        "vmoba", q[1:], k[1:], v[1:], 0.3, (8, 8), kinds=["tile"], tile=[2, 2], pool="all"
    ).rule.chosen
    assert torch.equal(whole[1:], alone)


@pytest.mark.parametrize("options, message", [
    (dict(kinds=["cube"]), "a cube cuts 3 axes, the grid .* has 2"),
    (dict(tile=[9, 2]), "tile .* exceeds the axes"),
    (dict(pool="block", topk=2), "needs a threshold"),
    (dict(kinds=["ball"]), "kinds"),
])  # fmt: skip
def test_vmoba_refuses_what_does_not_fit(options, message):
    with pytest.raises((ConfigError, ModelMismatchError), match=message):
        edited("vmoba", *qkv(64), 0.3, (8, 8), **options)


# -- dinat ------------------------------------------------------------------------------------------------------------


def test_hf_dinat_is_refused_with_the_reason_and_a_way_out(monkeypatch):
    from transformers import DinatConfig, DinatModel
    from transformers.models.dinat import modeling_dinat

    monkeypatch.setattr(
        modeling_dinat, "requires_backends", lambda *a: None
    )  # it cannot even be built without natten
    model = DinatModel(
        DinatConfig(embed_dim=8, depths=[1], num_heads=[2], kernel_size=3, dilations=[[1]], image_size=32)
    )
    with pytest.raises(ModelMismatchError, match="does not use transformers' attention interface") as refusal:
        hap.patch(model, "dinat_compat", window=3)
    assert "natten2dqkrpb" in str(refusal.value) and "Use this method on a ViT" in str(refusal.value)
    assert [tuple(p.shape) for n, p in model.named_parameters() if n.endswith("rpb")] == [(2, 5, 5)]


def test_the_bias_of_a_vit_layer_has_the_shape_of_dinat_and_learns():
    model = vit(6, num_hidden_layers=1)
    with hap.patched(model, "neighborhood", window=3):
        without_bias = forward(model, image(6))
    handle = hap.patch(model, "dinat_compat", window=3)
    (table,) = [p for n, p in model.named_parameters() if n.endswith("rpb")]
    assert table.shape == (model.config.num_attention_heads, 5, 5)
    before = forward(model, image(6))
    torch.testing.assert_close(before, without_bias)
    model(**image(6))[0].square().sum().backward()
    assert (table.grad.abs() > 0).all()
    with torch.no_grad():
        table[:, 2, 2] = 50.0  # everybody reads itself
    after = forward(model, image(6))
    handle.remove()
    assert not torch.allclose(after, before)


def test_a_window_beyond_the_grid_and_a_table_of_another_number_of_axes_are_refused():
    with pytest.raises(
        ModelMismatchError, match="window 3 x dilation 2 = 6 exceeds axis 0 of the grid .*at most 2"
    ):
        edited("dinat_compat", *qkv(20), 0.3, (4, 5), {"rpb": torch.zeros(4, 5, 5)}, window=3, dilation=2)
    with pytest.raises(ModelMismatchError, match="table of site has 2 axes, the grid .* has 3"):
        edited("dinat_compat", *qkv(60), 0.3, (3, 4, 5), {"rpb": torch.zeros(4, 5, 5)}, window=3)


# -- sparsifiner ------------------------------------------------------------------------------------------------------

SMALL = dict(coefs=3, reduce=3)


def own_parameters(model):
    return {n: p for n, p in model.named_parameters() if "attn_patch" in n}


def test_stage_1_leaves_the_output_and_learns_to_find_the_keys_that_attention_reads(programs):
    torch.manual_seed(0)
    model = vit(6, num_hidden_layers=2).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images = image(6, batch=8)
    dense = forward(model, images)
    hap.patch(model, "sparsifiner", coefs=8, reduce=1)
    optimiser = torch.optim.Adam(own_parameters(model).values(), lr=0.05)

    def recall(oracle=False):
        programs.clear()
        model.eval()
        forward(model, images)
        model.train()
        found = []
        for program, _ in programs:
            attention_map = torch.softmax(program.query @ program.key.mT * program.scale, -1)[:, :, 1:, 1:]
            chosen = most_likely(attention_map, 0.25, None) if oracle else program.rules[0].chosen
            found.append(float((attention_map * chosen).sum() / attention_map.sum()))
        return sum(found) / len(found)

    before, losses = recall(), []
    for _ in range(150):
        optimiser.zero_grad()
        output = model(**images)[0]
        torch.testing.assert_close(output.detach(), dense)
        loss = sum(hap.aux_losses(model, weighted=True).values())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after, best = recall(), recall(oracle=True)
    assert after - before > (best - before) / 2  # half of the way from chance to the best choice there is
    hap.unpatch(model)


def test_stage_2_trains_the_model_with_the_mask_of_a_frozen_predictor(programs):
    model = vit(6, num_hidden_layers=1)
    hap.patch(model, "sparsifiner", **SMALL, keep=0.3)
    for parameter in own_parameters(model).values():
        parameter.requires_grad_(False)
    model.train()(**image(6))
    (program, _) = programs[0]
    assert (program.rules[0].chosen.sum(-1) == 11).all()  # ceil(0.3 * 36)
    assert not hap.aux_losses(model)
    hap.unpatch(model)


def test_squares_choose_by_the_mean_score_of_their_pairs():
    q, k, v = qkv(36)
    draw = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=draw).double()
    held = {
        f"{n}_{p}": rand(4, 8) if p == "weight" else rand(4)
        for n in ("query", "key")
        for p in ("weight", "bias")
    }
    held |= {n: rand(6, 6, 5) for n in ("down", "up")}
    tensors = SimpleNamespace(
        named_parameters=lambda recurse: held.items(), parameters=lambda recurse: held.values()
    )
    program = Program(q, k, v, Mask(2, 36, 36), 0.3)
    call = SimpleNamespace(
        path="site", heads=None, context=SimpleNamespace(grid=(6, 6)), tensors=tensors, training=False
    )
    hap.registry.build("sparsifiner", dict(block=2, keep=0.3, coefs=3)).edit(program, call)
    coefs = kept_coefficients(coefficients(q, k, held, held["down"].flatten(0, 1), 0.5), 3, 0.0)
    scores = coefs @ basis(held["up"].flatten(0, 1), 0.02)
    mean = lambda x, dim: (
        Tiles((6, 6), (2, 2)).permute(x, dim).unflatten(dim, (9, 4)).mean(dim if dim < 0 else dim + 1)
    )
    squares = mean(mean(scores, 3), 2)
    assert squares.shape == (2, 4, 9, 9)
    expected = torch.zeros_like(squares, dtype=torch.bool).scatter(3, squares.topk(3, -1).indices, True)
    assert torch.equal(program.rules[0].chosen, expected)


def test_a_predictor_serves_images_of_another_size(programs):
    model = vit(6, num_hidden_layers=1)
    with hap.patched(model, "sparsifiner", **SMALL, keep=0.25), torch.no_grad():
        model(**image(8), interpolate_pos_encoding=True)
    chosen = programs[0][0].rules[0].chosen
    assert chosen.shape[2:] == (64, 64) and (chosen.sum(-1) == 16).all()


@pytest.mark.parametrize(
    "name, options",
    [
        ("vmoba", {"slab": 1, "tile": [1, 4], "cube": [1, 1, 4], "threshold": 0.3}),
        ("biformer", {"regions": [2, 2], "topk": 2}),
        ("sparsifiner", {"coefs": 2, "reduce": 2, "keep": 0.4}),
    ],
)
def test_padded_patches_are_refused_where_keys_are_pooled(name, options):
    model = model_of("idefics3", vision_config={"image_size": 64})
    tower = model.model.vision_model
    real = torch.ones(1, 8, 8, dtype=torch.bool)
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with hap.patched(model, name, part="vision", **options), torch.no_grad():
        tower(pixel_values=pixels, patch_attention_mask=real)  # nothing is padded
        real[:, :, 5:] = False
        with pytest.raises(hap.PatchError, match="padding"):
            tower(pixel_values=pixels, patch_attention_mask=real)
