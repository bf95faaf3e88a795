"""Numbers of the original code of methods that choose what a ViT reads, recorded in ``tests/golden``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import ChosenCells
from hf_attn_patch.call.token_permute import Tiles
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.vision.biformer import region_means
from hf_attn_patch.patches.vision.dinat_compat import bias_index
from hf_attn_patch.patches.vision.sparsifiner import basis, coefficients, kept_coefficients, most_likely
from hf_attn_patch.patches.vision.vmoba import blocks_of, pick
from tests.test_golden import IMPLS, read
from tests.test_golden_vision import heads_of


def edited(name, q, k, v, scale, grid, tensors=None, layer=0, **options):
    """A bidirectional call on `grid` after the edit of patch `name`."""
    program = Program(q, k, v, Mask(q.shape[0], q.shape[2], k.shape[2]), scale)
    context = SimpleNamespace(grid=tuple(grid))
    call = SimpleNamespace(
        path="site",
        heads=None,
        layer=layer,
        context=context,
        tensors=SimpleNamespace(**tensors or {}),
        training=False,
    )
    registry.build(name, options).edit(program, call)
    return program


def read_pairs(program, batch=0, head=0):
    """Who reads whom, bool [L, S]."""
    tokens = torch.arange(program.q_len)
    heads = torch.arange(program.rule.heads).reshape(1, -1, 1, 1)
    return program.rule.visible(heads, tokens.reshape(1, 1, -1, 1), tokens.reshape(1, 1, 1, -1))[batch, head]


# -- biformer ---------------------------------------------------------------------------------------------------------


def biformer_inputs(tensors, config):
    """(q, k, v [B, H, N, D]) of the layers that hold a projection."""
    x = tensors["in.x"]
    x = x.flatten(1, 2) if x.shape[-1] == config["dim"] else x.flatten(2).mT
    split = F.linear(x, tensors["param.qkv.weight"].flatten(1), tensors["param.qkv.bias"]).chunk(3, -1)
    return [heads_of(part, config["num_heads"]) for part in split]


CASES = ["legacy_lce_off", "legacy_lce5", "legacy_topk_all_is_dense", "nchw_8x8"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_biformer_gives_the_original_regions_and_output(case, impl):
    tensors, config = read(f"biformer__{case}")
    regions = config.get("regions_per_side") or config["n_win"]
    lce = config["lce_kernel"]
    weights = {n: tensors[f"param.lce.{n}"] for n in ("weight", "bias")} if lce else {}
    q, k, v = biformer_inputs(tensors, config)
    program = edited(
        "biformer",
        q,
        k,
        v,
        config["scale"],
        config["grid"],
        weights,
        regions=regions,
        topk=config["topk"],
        lce=lce,
    )
    assert isinstance(program.rule, ChosenCells)
    expected = torch.zeros(len(q), regions**2, regions**2, dtype=torch.bool)
    assert torch.equal(program.rule.chosen[:, 0], expected.scatter(2, tensors["out.topk_idx"], True))
    for item in range(len(q)):
        assert torch.equal(read_pairs(program, item), tensors["out.mask"][item])
    out = attention(program, impl).output.transpose(1, 2).flatten(2)
    out = F.linear(out, tensors["param.wo.weight"].flatten(1), tensors["param.wo.bias"])
    official = tensors["out.out"]
    official = official.flatten(1, 2) if official.shape[-1] == config["dim"] else official.flatten(2).mT
    torch.testing.assert_close(out, official, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_biformer_with_the_scale_of_a_loaded_model(impl):
    tensors, config = read("biformer__qkv_hf_scale")
    q, k, v = (tensors[f"in.{n}"] for n in "qkv")
    program = edited("biformer", q, k, v, config["scale"], config["grid"], regions=4, topk=config["topk"])
    assert all(torch.equal(read_pairs(program, item), tensors["out.mask"][item]) for item in range(len(q)))
    torch.testing.assert_close(attention(program, impl).output, tensors["out.out"], rtol=0, atol=1e-9)


def test_biformer_routes_a_grid_that_regions_do_not_divide_as_the_original_and_reads_no_pads():
    tensors, config = read("biformer__nchw_nondiv_9x10")
    q, k, v = biformer_inputs(tensors, config)
    program = edited("biformer", q, k, v, config["scale"], config["grid"], regions=4, topk=config["topk"])
    cell = Tiles((9, 10), (2, 2)).cell()
    logits = region_means(q, cell) @ region_means(k, cell).mT
    torch.testing.assert_close(logits, tensors["out.region_logits"], rtol=0, atol=1e-9)
    expected = torch.zeros(1, 25, 25, dtype=torch.bool).scatter(2, tensors["out.topk_idx"], True)
    assert torch.equal(program.rule.chosen[:, 0], expected)
    real = torch.zeros(10, 10, dtype=torch.bool)  # the grid with its pads
    real[:9] = True
    official = tensors["out.mask"][0][real.flatten()][:, real.flatten()]
    assert torch.equal(read_pairs(program), official)


# -- vmoba ------------------------------------------------------------------------------------------------------------


def test_vmoba_cuts_the_grid_into_the_original_blocks():
    tensors, config = read("vmoba__partition")
    for i, item in enumerate(config["items"]):
        chunk = item["chunk"]
        tiles = blocks_of(tuple(item["grid"]), tuple(chunk) if isinstance(chunk, list) else (chunk,))
        assert torch.equal(tiles.order().flatten(), tensors[f"out.perm_{i}"])
        assert tiles.per_tile == tensors[f"out.chunk_size_{i}"]


POOLS = {"query": "query_head", "head": "head_global", "block": "block", "all": "overall"}


@pytest.mark.parametrize("pool", POOLS)
def test_vmoba_selects_the_pairs_that_the_original_selects(pool):
    tensors, _ = read("vmoba__selection")
    scores = tensors["out.gate"].masked_fill(~tensors["out.valid"], -torch.inf).permute(1, 2, 0)[None]
    own = tensors["out.self_chunk"][:, 0].T
    for i, tau in enumerate(tensors["in.tau"].tolist()):
        name = f"out.mask_{POOLS[pool]}_{i}"
        official = tensors.get(name.replace("mask_", "mask_fixed_"), tensors[name])
        assert torch.equal(pick(scores, own, pool, 0, tau)[0], official.permute(1, 2, 0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["topk", "threshold_query_head", "threshold_head_global"])
def test_vmoba_gives_the_original_output(case, impl):
    tensors, config = read(f"vmoba__attn_{case}")
    q, k, v, official = (tensors[n].transpose(0, 1)[None] for n in ("in.q", "in.k", "in.v", "out.o"))
    options = dict(slab=config["block"], pool="head" if "head_global" in case else "query")
    options |= dict(topk=config["topk"]) if case == "topk" else dict(threshold=config["tau"])
    program = edited("vmoba", q, k, v, config["D"] ** -0.5, config["lens"], **options)
    assert torch.equal(program.rule.chosen[0], tensors["out.selected"].permute(1, 2, 0))
    # the original adds up its two parts in float32
    torch.testing.assert_close(attention(program, impl).output, official, rtol=0, atol=2e-5)


# -- token_permute ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["8x8_t4", "7x10_t4x2_d1x2"])
def test_tiles_are_the_token_order_of_natten(case):
    tensors, config = read(f"natten__permute_{case}")
    tiles = Tiles(*(tuple(config[n]) for n in ("token_layout", "tile_shape", "dilation")))
    assert torch.equal(tiles.order().flatten(1), tensors["out.index"])


# -- dinat: relative position bias ------------------------------------------------------------------------------------


def neighborhood_with_bias(q, k, v, scale, grid, window, dilation, table):
    options = dict(window=window, dilation=dilation)
    return edited("dinat_compat", q, k, v, scale, grid, {"rpb": table}, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["2d_k3_d1", "2d_k3_d2"])
def test_neighborhood_with_a_bias_gives_the_output_of_the_old_natten_kernels(case, impl):
    tensors, config = read(f"dinat_rpb__{case}")
    q, k, v = (tensors[f"in.{n}"].flatten(2, 3) for n in "qkv")
    program = neighborhood_with_bias(
        q, k, v, 1.0, config["grid"], config["kernel_size"], config["dilation"], tensors["param.rpb"]
    )
    official = tensors["out.out"].flatten(2, 3)
    torch.testing.assert_close(attention(program, impl).output, official, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["2d_k3_d1", "2d_k3_d2"])
def test_keys_and_bias_entries_are_those_of_the_old_natten_kernels(case):
    tensors, config = read(f"dinat_rpb__{case}")
    grid, w, d = tuple(config["grid"]), config["kernel_size"], config["dilation"]
    rule = registry.build("dinat_compat", {"window": w, "dilation": d}).rule(grid, 0)
    index = bias_index(grid, (w, w), (d, d))
    for y in range(grid[0]):
        for x in range(grid[1]):
            keys = [
                r * grid[1] + c
                for r in tensors["out.key_row"][y].tolist()
                for c in tensors["out.key_col"][x].tolist()
            ]
            query = torch.tensor(y * grid[1] + x)
            seen = rule.visible(torch.tensor(0), query, torch.arange(grid[0] * grid[1]))
            assert seen.nonzero()[:, 0].tolist() == keys
            entry = tensors["out.bias_row"][y][:, None] * (2 * w - 1) + tensors["out.bias_col"][x][None]
            assert torch.equal(index[query, keys], entry.flatten())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["hf_layer_7x8_k3_d2", "hf_layer_padded_4x5_k3_d2"])
def test_a_whole_dinat_layer_with_this_attention_in_it(case, impl):
    # a grid smaller than its window is padded with tokens, as the layer does; the patch itself refuses it
    tensors, config = read(f"dinat_rpb__{case}")
    param = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    linear = lambda x, name: F.linear(x, param[f"{name}.weight"], param[f"{name}.bias"])
    norm = lambda x, name: F.layer_norm(
        x, x.shape[-1:], param[f"{name}.weight"], param[f"{name}.bias"], config["layer_norm_eps"]
    )
    (height, width), least = config["grid"], config["kernel_size"] * config["dilation"]
    x = norm(tensors["in.x"], "layernorm_before")
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    grid = x.shape[1:3]
    q, k, v = (
        heads_of(linear(x, f"attention.self.{n}").flatten(1, 2), config["heads"])
        for n in ("query", "key", "value")
    )
    program = neighborhood_with_bias(
        q,
        k,
        v,
        q.shape[-1] ** -0.5,
        grid,
        config["kernel_size"],
        config["dilation"],
        param["attention.self.rpb"],
    )
    out = attention(program, impl).output.transpose(1, 2).flatten(2).unflatten(1, grid)
    scales = param.get("layer_scale_parameters", torch.ones(2, 1, dtype=x.dtype))
    hidden = tensors["in.x"] + scales[0] * linear(out, "attention.output.dense")[:, :height, :width]
    mlp = F.gelu(linear(norm(hidden, "layernorm_after"), "intermediate.dense"))
    torch.testing.assert_close(
        hidden + scales[1] * linear(mlp, "output.dense"), tensors["out.out"], rtol=0, atol=1e-9
    )


# -- sparsifiner ------------------------------------------------------------------------------------------------------


def predicted(tensors, config, raw=False):
    """(coefficients, basis, scores of all rows but CLS, q, k, v) of the original layer."""
    split = F.linear(tensors["in.x"], tensors["param.qkv.weight"], tensors["param.qkv.bias"]).chunk(3, -1)
    q, k, v = (heads_of(part, config["heads"]) for part in split)
    param = lambda name: tensors[f"param.mask_predictor.{name}"]
    held = {f"{n}_{p}": param(f"proj_c_{n[0]}.{p}") for n in ("query", "key") for p in ("weight", "bias")}
    coefs = coefficients(q[:, :, 1:], k, held, param("proj_n"), config["predictor_scale"])
    if raw:
        return coefs, param("proj_back_n").mT, q, k, v
    coefs = kept_coefficients(coefs, config["coef_topk"], config["coef_threshold"])
    return coefs, basis(param("proj_back_n"), config["basis_threshold"]), q, k, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["eval_topk", "eval_threshold"])
def test_sparsifiner_predicts_the_original_mask_and_gives_its_output(case, impl):
    tensors, config = read(f"sparsifiner__{case}")
    coefs, vectors, q, k, v = predicted(tensors, config)
    torch.testing.assert_close(coefs, tensors["out.coef"], rtol=0, atol=1e-9)
    torch.testing.assert_close(vectors, tensors["out.basis"], rtol=0, atol=1e-9)
    scores = coefs @ vectors
    torch.testing.assert_close(scores, tensors["out.approx_attn"], rtol=0, atol=1e-9)
    mask = most_likely(
        scores, config["attn_keep_rate"], None if config["score_topk"] else config["score_threshold"]
    )
    assert torch.equal(mask, tensors["out.mask"][:, :, 1:])
    mask = torch.cat(
        [torch.ones_like(mask[:, :, :1]), mask], 2
    )  # there CLS reads all, and its key has to be chosen
    single = torch.arange(q.shape[2])
    program = Program(q, k, v, Mask(len(q), len(single), len(single)), config["attn_scale"])
    program.restrict(ChosenCells(mask, single, single))
    out = attention(program, impl).output.transpose(1, 2).flatten(2)
    out = F.linear(out, tensors["param.proj.weight"], tensors["param.proj.bias"])
    torch.testing.assert_close(out, tensors["out.out"], rtol=0, atol=1e-9)


def test_sparsifiner_reconstruction_is_the_original_one():
    tensors, config = read("sparsifiner__recon_stage1")
    coefs, vectors, *_ = predicted(tensors, config, raw=True)
    scores = coefs @ vectors
    torch.testing.assert_close(scores, tensors["out.approx_attn"], rtol=0, atol=1e-9)
    # the second of its two layers has the layer's own attention as teacher
    teachers = [tensors["in.teacher_attn_0"], tensors["out.attn_dense"]]
    loss = torch.stack([0.01 * (scores - teacher[:, :, 1:]).square().sum() for teacher in teachers]).mean()
    torch.testing.assert_close(loss, tensors["out.recon_loss_two_layers"], rtol=0, atol=1e-9)
