"""Numbers of the original vision code, recorded in ``tests/golden`` (see its README for sources)."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import Appended, BlockWindows, Disc
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.kernels import attention
from hf_attn_patch.kernels.layout import layout_for
from hf_attn_patch.patches.vision.agent import pooled, through_agents
from tests.test_golden import GOLDEN, IMPLS, dense, read


def rule_of(name, grid, prefix=0, **options):
    return registry.build(name, options).rule(tuple(grid), prefix)


def run(impl, q, k, v, rule, scale, bias=None):
    """Output [B, H, N, Dv] of bidirectional attention over the tokens of a grid."""
    length = q.shape[2]
    program = Program(q, k, v, Mask(q.shape[0], length, length), scale, rules=[rule], position_bias=bias)
    return attention(program, impl).output


def heads_of(x, heads):
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# -- maxvit -----------------------------------------------------------------------------------------------------------

MAXVIT = {"block": ("maxvit_block", "window"), "grid": ("maxvit_grid", "size")}


@pytest.mark.parametrize("kind", MAXVIT)
@pytest.mark.parametrize("case", ["8x8_p4_g4", "6x12_p3_g3"])
def test_maxvit_masks_are_the_original_partitions(case, kind):
    tensors, config = read(f"maxvit__{case}")
    name, option = MAXVIT[kind]
    rule = rule_of(
        name, config["grid"], **{option: config[f"{'window' if kind == 'block' else 'grid'}_size"]}
    )
    assert torch.equal(dense(rule, rule.required_len()), tensors[f"out.{kind}_mask"])
    layout = layout_for(rule, rule.required_len(), rule.required_len())
    assert torch.equal(layout.dense()[0, 0], tensors[f"out.{kind}_mask"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", MAXVIT)
@pytest.mark.parametrize("case", ["8x8_p4_g4", "6x12_p3_g3"])
def test_maxvit_attention_branch_is_the_original_one(case, kind, impl):
    tensors, config = read(f"maxvit__{case}")
    name, option = MAXVIT[kind]
    size = config["window_size" if kind == "block" else "grid_size"]
    weights = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"param.{kind}_attention.")}
    norm = (tensors[f"param.{kind}_attn_layer_norm.{n}"] for n in ("weight", "bias"))
    x = F.layer_norm(tensors["in.x"].flatten(1, 2), (config["dim"],), *norm, config["ln_eps"])
    q, k, v = (
        torch.einsum("bnc,chd->bhnd", x, weights[f"{n}.weight"]) + weights[f"{n}.bias"][None, :, None]
        for n in "qkv"
    )
    bias = x.new_zeros(1, config["heads"], x.shape[1], x.shape[1])
    for members in tensors[f"out.{kind}_partition"]:  # the model's bias, window by window
        bias[0][:, members[:, None], members[None]] = tensors[f"out.{kind}_attention.bias"]
    out = run(impl, q, k, v, rule_of(name, config["grid"], **{option: size}), config["q_scale"], bias)
    out = torch.einsum("bhnd,hdc->bnc", out, weights["o.weight"]) + weights["o.bias"]
    # its softmax is float32, hence the tolerance the file names
    torch.testing.assert_close(out, tensors[f"out.{kind}_attn"].flatten(1, 2), rtol=0, atol=2e-6)


# -- davit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["spatial_8x8_w4", "spatial_pad_5x7_w3"])
def test_davit_spatial_attention_is_the_original_one(case, impl):
    # where the grid is padded, the pads go in as the tokens they are there: zeros before the projection
    tensors, config = read(f"davit__{case}")
    param = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    (height, width), window, dim = config["grid"], config["window"], config["dim"]
    x = tensors["in.x"]
    image = x.mT.reshape(-1, dim, height, width)
    code = F.conv2d(image, param["cpe.0.proj.weight"], param["cpe.0.proj.bias"], padding=1, groups=dim)
    x = x + code.flatten(2).mT
    x = F.layer_norm(x, (dim,), param["norm1.weight"], param["norm1.bias"], config["layer_norm_eps"])
    pads = (0, 0, 0, -width % window, 0, -height % window)
    x = F.pad(x.reshape(-1, height, width, dim), pads)
    grid = x.shape[1:3]
    qkv = F.linear(x.flatten(1, 2), param["attn.qkv.weight"], param["attn.qkv.bias"])
    q, k, v = (heads_of(part, config["heads"]) for part in qkv.chunk(3, -1))
    out = run(impl, q, k, v, rule_of("davit_spatial", grid, window=window), q.shape[-1] ** -0.5)
    out = F.linear(out.transpose(1, 2).flatten(2), param["attn.proj.weight"], param["attn.proj.bias"])
    out = out.unflatten(1, grid)[:, :height, :width].flatten(1, 2)
    torch.testing.assert_close(out, tensors["out.attn_out"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["davit_spatial", "swin_window"])
def test_windows_that_do_not_divide_the_grid_are_the_original_ones_without_its_pads(name):
    tensors, config = read("davit__spatial_pad_5x7_w3")
    height, width = config["grid"]
    padded = tuple(-(-size // 3) * 3 for size in config["grid"])
    real = torch.zeros(padded, dtype=torch.bool)
    real[:height, :width] = True
    official = tensors["out.mask"][real.flatten()][:, real.flatten()]
    rule = rule_of(name, config["grid"], window=config["window"])
    assert torch.equal(dense(rule, height * width), official)
    assert torch.equal(layout_for(rule, height * width, height * width).dense()[0, 0], official)


# -- swin -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, window, shift", [((8, 12), 4, 2), ((14, 14), 7, 3), ((6, 9), 3, 1)])
def test_shifted_windows_are_those_of_transformers_swin(grid, window, shift):
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer, window_partition

    config = SwinConfig(window_size=window, embed_dim=8)
    layer = SwinLayer(config, dim=8, input_resolution=grid, num_heads=1, shift_size=shift)
    tokens = torch.arange(grid[0] * grid[1]).reshape(1, *grid, 1)
    windows = window_partition(layer.cyclic_shift(tokens), window).flatten(1)
    allowed = layer.get_attn_mask(*grid, torch.float32, tokens.device) == 0
    official = torch.zeros(tokens.numel(), tokens.numel(), dtype=torch.bool)
    for members, seen in zip(windows, allowed.reshape(len(windows), window**2, window**2)):
        official[members[:, None], members[None]] = seen
    rule = rule_of("swin_window", grid, window=window, shift=shift)
    assert torch.equal(dense(rule, tokens.numel()), official)


# -- halo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["b2_h0_blocks", "b4_h1"])
def test_halo_mask_is_the_valid_keys_of_the_original(case):
    tensors, config = read(f"halo__{case}")
    rule = rule_of("halo", config["grid"], block=config["block"], halo=config["halo"])
    assert torch.equal(dense(rule, rule.required_len()), tensors["out.mask"])
    keys = dense(rule, rule.required_len()).sum(-1).reshape(config["grid"])
    assert torch.equal(config["window"] ** 2 - keys, tensors["out.num_pad_keys"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["b2_h0_blocks", "b4_h1"])
def test_halo_attention_is_the_original_one_if_its_pads_are_tokens(case, impl):
    # the unofficial layer attends zero keys outside the image; here they are tokens of a larger grid
    tensors, config = read(f"halo__{case}")
    heads, dim, block, halo = (config[n] for n in ("heads", "dim_head", "block", "halo"))
    x = tensors["in.x"]
    q = F.conv2d(x, tensors["param.q.weight"], tensors["param.q.bias"])
    kv = F.conv2d(x, tensors["param.kv.weight"], tensors["param.kv.bias"])
    q, kv = (F.pad(y, (halo,) * 4).unflatten(1, (heads, -1)) for y in (q, kv))
    grid = tuple(q.shape[-2:])
    q, kv = (y.flatten(3).mT for y in (q, kv))  # [B, H, N, ...]
    k, v = kv.split([dim, kv.shape[-1] - dim], -1)
    rule = BlockWindows.of(grid, (block,) * 2, (halo,) * 2, (halo,) * 2, 0)
    bias = 0
    for axis, table in enumerate(("height_rel", "width_rel")):
        at = torch.unravel_index(torch.arange(grid[0] * grid[1]), grid)[axis]
        first = (at - halo).div(block, rounding_mode="floor") * block  # where the window of a query begins
        relative = at[None] - first[:, None] - ((at - halo) % block)[:, None] + config["window"] - 1
        size = 2 * config["window"] - 1
        logits = q @ tensors[f"param.pos_embed.{table}"].T
        index = relative.clamp(0, size - 1).expand(*logits.shape[:2], -1, -1)
        bias = bias + logits.gather(3, index)
    out = run(impl, q, k, v, rule, config["scale"], bias)
    out = out.mT.flatten(1, 2).unflatten(2, grid)
    out = out[..., halo : grid[0] - halo, halo : grid[1] - halo]
    torch.testing.assert_close(out, tensors["out.out"], rtol=0, atol=1e-9)


# -- clear ------------------------------------------------------------------------------------------------------------


def clear_inputs(tensors, config):
    """(q, k, v [B, H, N, D]) of text and image tokens."""
    param = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}

    def projected(x, name):
        return F.linear(x, param[f"{name}.weight"], param[f"{name}.bias"])

    if config["double_block"]:
        parts = [
            torch.cat(
                [projected(tensors["in.txt"], f"add_{n}_proj"), projected(tensors["in.img"], f"to_{n}")], 1
            )
            for n in "qkv"
        ]
    else:
        parts = [projected(tensors["in.x"], f"to_{n}") for n in "qkv"]
    return [heads_of(part, config["heads"]) for part in parts]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["double_r3", "single_r1_selfonly"])
def test_clear_gives_the_original_mask_and_output(case, impl):
    tensors, config = read(f"clear__{case}")
    text = config["text_len"]
    rule = rule_of("clear", config["grid"], text, radius=float(config["window_radius"]))
    assert torch.equal(dense(rule, rule.required_len()), tensors["out.mask"])
    assert torch.equal(
        layout_for(rule, rule.required_len(), rule.required_len()).dense()[0, 0], tensors["out.mask"]
    )
    out = run(impl, *clear_inputs(tensors, config), rule, config["scale"]).transpose(1, 2).flatten(2)
    if config["double_block"]:
        for part, module, name in ((out[:, :text], "to_add_out", "txt"), (out[:, text:], "to_out.0", "img")):
            got = F.linear(part, tensors[f"param.{module}.weight"], tensors[f"param.{module}.bias"])
            torch.testing.assert_close(got, tensors[f"out.{name}"], rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(out, tensors["out.out"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_clear_with_a_coarse_image_gives_the_original_mask_and_output(impl):
    tensors, config = read("clear__single_down2_r2")
    q, k, v = clear_inputs(tensors, config)
    program = Program(q, k, v, Mask(1, 53, 53), config["scale"], need_weights=impl == "reference")
    patch = registry.build("clear", {"radius": 2.0, "downsample": config["down_factor"]})
    context = SimpleNamespace(grid=tuple(config["grid"]))
    weight = SimpleNamespace(weight=tensors["param.spatial_weight"])
    patch.edit(program, SimpleNamespace(path="site", heads=None, context=context, tensors=weight))
    rows, keys = torch.arange(53)[:, None], torch.arange(65)[None]
    assert torch.equal(program.rules[0].visible(torch.tensor(0), rows, keys), tensors["out.mask"])
    assert torch.equal(layout_for(program.rules[0], 53, 65).dense()[0, 0], tensors["out.mask"])
    result = attention(program, impl)
    out = result.output.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, tensors["out.out"], rtol=0, atol=1e-9)
    if impl == "reference":  # one map over the tokens says the same
        torch.testing.assert_close(result.weights @ v, result.output)


def test_clear_reads_as_many_pairs_as_the_original():
    counts = json.loads((GOLDEN / "clear__pair_counts.json").read_text())["out"]
    for item in [*counts["small"], *counts["large"]]:
        rule = Disc(tuple(item["grid"]), item["r"], item["text_len"])
        length = rule.required_len()
        assert layout_for(rule, length, length).visible_count() == item["pairs"], item
    for radius, keys in counts["interior_keys"].items():
        rule = Disc((65, 65), float(radius))
        middle = torch.tensor(32 * 65 + 32)
        assert rule.visible(torch.tensor(0), middle, torch.arange(65 * 65)).sum() == keys


# -- agent ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_through_agents_is_that_of_agent_sd(impl):
    tensors, config = read("agent__sd_attn")
    project = lambda x, name: heads_of(F.linear(x, tensors[f"param.to_{name}.weight"]), config["heads"])
    q, k, v = (project(tensors["in.x"], name) for name in "qkv")
    batch, length = config["B"], config["N"]
    program = Program(q, k, v, Mask(batch, length, length), config["head_dim"] ** -0.5, need_weights=True)
    agents = project(tensors["in.agent_tokens"], "q")
    through_agents(program, agents, config["k_scale2"], config["k_shortcut"], Appended(length, 0))
    out = attention(replace(program, need_weights=False), impl).output
    torch.testing.assert_close(out, tensors["out.attn_out"], rtol=0, atol=1e-9)
    if impl == "reference":  # both softmaxes as one map over the tokens
        weights = attention(program, impl).weights
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        shortcut = config["k_shortcut"] * v
        torch.testing.assert_close(weights @ v + shortcut, tensors["out.attn_out"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["deit_attn_nobias", "deit_attn_g5_a9"])
def test_agents_are_pooled_as_in_agent_deit(case):
    tensors, config = read(f"agent__{case}")
    weight = tensors["param.qkv.weight"].chunk(3)[0]
    bias = tensors["param.qkv.bias"].chunk(3)[0] if "param.qkv.bias" in tensors else None
    query = heads_of(F.linear(tensors["in.x"], weight, bias), config["heads"])
    agents = pooled(query[:, :, config["prefix"] :], tuple(config["grid"]), (config["pool"],) * 2)
    torch.testing.assert_close(agents.transpose(1, 2).flatten(2), tensors["out.agents"], rtol=0, atol=1e-9)


def test_agent_sd_refuses_agents_only_where_the_original_does():
    # the original takes the agent path if twice the agents are fewer than the tokens
    patch = registry.build("agent", {"agents": [2, 3]})
    assert patch.sizes((5, 3)) == (2, 3)
    with pytest.raises(ModelMismatchError, match="less than half"):
        patch.sizes((4, 3))
