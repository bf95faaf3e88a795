"""Numbers of the original implementations, recorded in ``tests/golden`` (see its README for sources)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_attn_patch import registry
from hf_attn_patch.cache.spans import SpanLayer
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.ragged import RaggedKV
from hf_attn_patch.call.rules import BlockSinkWindow, Neighborhood, SinkWindow
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.grounding.var import sink_tokens
from hf_attn_patch.patches.sparse.moa import span_size

GOLDEN = Path(__file__).parent / "golden"
IMPLS = ("reference", "torch")


def read(name: str):
    """(tensors, config) of one golden case."""
    with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["config"])


def dense(rule, length: int, head: int = 0) -> torch.Tensor:
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    return rule.visible(torch.tensor(head), q, k)


# -- streaming ----------------------------------------------------------------------------------------------------


def test_streaming_mask_is_the_original_streaming_mask():
    tensors, _ = read("streaming__mask")
    for i, (length, sink, recent) in enumerate(tensors["in.L_sink_recent"].tolist()):
        ours = dense(SinkWindow(sink, recent), length) & torch.ones(length, length, dtype=torch.bool).tril()
        assert torch.equal(ours, tensors[f"out.mask_{i}"])


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding (rotate-half) of [B, H, T, D] at `positions`."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["decode_evict_for_space", "decode_pos_shift"])
def test_streaming_cache_keeps_and_attends_what_the_original_cache_does(case, impl):
    # the original stores keys un-rotated and rotates them at their cache index; the adapter does that here
    tensors, config = read(f"streaming__{case}")
    after = config["mode"] == "after"
    layer = SpanLayer([(config["start_size"], config["recent_size"] + after)] * config["Hk"])
    q, k, v = (tensors[f"in.{n}"] for n in "qkv")
    begin = 0
    for step, size in enumerate(config["chunks"]):
        rows = slice(begin, begin + size)
        key, value = layer.update(k[:, :, rows], v[:, :, rows])
        if isinstance(key, RaggedKV):
            group = key.groups[0]
            columns, order = group.columns[0].sort()
            order, columns = order[columns >= 0], columns[columns >= 0]
            key, value = group.key[:, :, order], group.value[:, :, order]
        else:
            columns = torch.arange(begin + size)
        kept = tensors["out.kept"][step]
        kept = kept[kept >= 0].tolist()
        if after:  # what stays after the step's own eviction: the oldest token of the window goes
            visible = columns.tolist()
            total = config["start_size"] + config["recent_size"]
            stays = (
                visible
                if len(visible) <= total
                else visible[: config["start_size"]] + visible[-config["recent_size"] :]
            )
            assert stays == kept
        else:
            assert columns.tolist() == kept
        n = len(columns)
        theta = config["rope_theta"]
        program = Program(
            rotate(q[:, :, rows], torch.arange(n - size, n, dtype=q.dtype), theta),
            rotate(key, torch.arange(n, dtype=q.dtype), theta),
            value,
            Mask(1, size, n, q_offset=n - size, causal=True),
            scale=config["D"] ** -0.5,
        )
        out = attention(program, impl).output.transpose(1, 2)
        torch.testing.assert_close(out, tensors["out.o"][:, rows].to(out.dtype), rtol=0, atol=2e-6)
        begin += size


# -- moa ----------------------------------------------------------------------------------------------------------


def test_moa_span_sizes_are_those_of_the_original_runtime():
    tensors, config = read("moa__runtime_span")
    for i, (seq, new) in enumerate(zip(tensors["in.seq_len"].tolist(), tensors["in.max_new_token"].tolist())):
        for layer, (alphas, betas) in enumerate(
            zip(tensors["in.alphas"].tolist(), tensors["in.betas"].tolist())
        ):
            sizes = [
                span_size(a, b, seq + new, config["split_size"], config["minimum_cache_size"])
                for a, b in zip(alphas, betas)
            ]
            assert sizes == tensors["out.cache_size"][i, layer].tolist()
            static = [min(size, config["sink_size"]) for size in sizes]
            assert static == tensors["out.static_size"][i, layer].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_moa_block_prefill_is_the_original_triton_kernel(impl):
    tensors, config = read("moa__runtime_prefill")
    block = config["block"]
    rule = BlockSinkWindow(
        tuple(s // block for s in config["sink_size"]), tuple(w // block for w in config["local_size"]), block
    )
    q, k, v = (tensors[f"in.{n}"].double() for n in "qkv")
    length = config["L"]
    program = Program(q, k, v, Mask(1, length, length, causal=True), scale=config["D"] ** -0.5, rules=[rule])
    out = attention(program, impl).output
    torch.testing.assert_close(out, tensors["out.o_fp64"], rtol=0, atol=1e-9)
    torch.testing.assert_close(out.float(), tensors["out.o_official_fp16"], rtol=0, atol=4e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_moa_ring_cache_attends_like_the_original_ring_cache_past_the_wrap(impl):
    tensors, config = read("moa__ring_cache")
    static, total = config["static_size"], config["cache_size"]
    spans = [(s, c - s) for s, c in zip(static, total)]
    layer = SpanLayer(spans)
    q, k, v = (tensors[f"in.{n}"] for n in "qkv")
    first = config["prefill_len"]
    layer.update(k[:, :, :first], v[:, :, :first])
    rule = SinkWindow(tuple(s for s, _ in spans), tuple(w for _, w in spans))
    for step in range(config["steps"]):
        at = first + step
        key, value = layer.update(k[:, :, at : at + 1], v[:, :, at : at + 1])
        mask = Mask(config["B"], 1, at + 1, q_offset=at, causal=True)
        program = Program(q[:, :, at : at + 1], key, value, mask, scale=config["D"] ** -0.5, rules=[rule])
        out = attention(program, impl).output[:, :, 0]
        torch.testing.assert_close(out, tensors["out.decode_out"][:, :, step], rtol=0, atol=1e-10)
    # the same keys are left in memory, per head, in whatever order
    start = tensors["out.head_start"].tolist()
    for head, (begin, size) in enumerate(zip(start, total)):
        theirs = tensors["out.k_store"][0, begin : begin + size]
        group = next(g for g in layer.groups if head in g.heads)
        columns = group.columns(layer.seen, layer.start)[0]
        ours = group.key[0, group.heads.index(head)][columns >= 0]
        assert sorted(map(tuple, theirs.tolist())) == sorted(map(tuple, ours.tolist()))


# -- neighborhood ---------------------------------------------------------------------------------------------------


def natten_rule(config, prefix: int = 0) -> Neighborhood:
    return Neighborhood(
        tuple(config["token_layout"]),
        tuple(config["kernel_size"]),
        tuple(config["stride"]),
        tuple(config["dilation"]),
        tuple(config["is_causal"]),
        prefix,
    )


def heads_first(x: torch.Tensor, grid_axes: int) -> torch.Tensor:
    return x.flatten(1, grid_axes).transpose(1, 2)


NATTEN = sorted(p.stem for p in GOLDEN.glob("natten__[123]d_*.safetensors") if "additional" not in p.stem)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", NATTEN)
def test_neighborhood_gives_nattens_mask_and_output(case, impl):
    tensors, config = read(case)
    rule = natten_rule(config)
    n = rule.required_len()
    assert torch.equal(dense(rule, n), tensors["out.mask"])
    q, k, v = (heads_first(tensors[f"in.{name}"], config["na_dim"]) for name in "qkv")
    program = Program(q, k, v, Mask(q.shape[0], n, n), scale=config["scale"], rules=[rule])
    out = attention(program, impl).output
    torch.testing.assert_close(out, heads_first(tensors["out.out"], config["na_dim"]), rtol=0, atol=1e-9)


def test_neighborhood_masks_agree_on_sixty_random_settings():
    tensors, config = read("natten__mask_sweep60")
    for i, item in enumerate(config["configs"]):
        rule = natten_rule(item)
        n = rule.required_len()
        bits = np.unpackbits(tensors[f"out.mask_packed_{i:03d}"].numpy())[: n * n].reshape(n, n).astype(bool)
        assert torch.equal(dense(rule, n), torch.from_numpy(bits)), item


@pytest.mark.parametrize("impl", IMPLS)
def test_prefix_tokens_are_nattens_additional_keys(impl):
    tensors, config = read("natten__2d_additional_kv")
    rule = natten_rule(config, prefix=config["num_additional"])
    q, k, v = (heads_first(tensors[f"in.{n}"], 2) for n in "qkv")
    extra = config["num_additional"]
    k = torch.cat([tensors["in.add_k"].transpose(1, 2), k], 2)
    v = torch.cat([tensors["in.add_v"].transpose(1, 2), v], 2)
    q = torch.cat([q[:, :, :extra], q], 2)  # prefix queries exist in a ViT; their rows are not in the file
    n = q.shape[2]
    program = Program(q, k, v, Mask(q.shape[0], n, n), scale=config["scale"], rules=[rule])
    out = attention(program, impl).output[:, :, extra:]
    torch.testing.assert_close(out, heads_first(tensors["out.out"], 2), rtol=0, atol=1e-5)


# -- var --------------------------------------------------------------------------------------------------------------


def test_var_sink_tokens_are_the_original_ones():
    tensors, config = read("var__sinks")
    found = sink_tokens(tensors["in.hidden"], tuple(config["dims"]), config["tau"])
    assert torch.equal(found, tensors["out.sink_mask"])
    assert found.any() and not found.all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("move", [40, 60])
@pytest.mark.parametrize("case", ["prefill", "decode", "no_visual_sink"])
def test_var_moves_the_mass_the_original_moves(case, move, impl):
    # scores log p against one-hot keys and values make the output of the program the edited probabilities
    tensors, config = read(f"var__{case}")
    probs, image, sinks = tensors["in.probs"], tensors["in.image_mask"], tensors["in.sink_mask"]
    B, H, L, S = probs.shape
    eye = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)
    query = probs.clamp(min=1e-300).log()
    mask = Mask(B, L, S, q_offset=S - L, causal=True)
    program = Program(query, eye, eye, mask, scale=1.0)
    hidden = torch.ones(B, L, 64)
    hidden[..., 5] = torch.where(sinks[:, S - L :], 1000.0, 1.0)
    memory = {"var sinks site": sinks[:, : S - L]}
    context = SimpleNamespace(
        layer_input=lambda path: hidden, memory=memory, image_keys=image, override={}, prompt_length=S
    )
    call = SimpleNamespace(layer=5, path="site", context=context, heads=None)
    patch = registry.build(
        "var", {"dims": [5], "tau": 7.0, "rho": config["rho"], "min_mass": config["summ"], "move": move / 100}
    )
    patch.edit(program, call)
    out = attention(program, impl).output
    torch.testing.assert_close(out, tensors[f"out.probs_move{move}"], rtol=0, atol=1e-10)
    changed = (out - probs).abs().amax(-1) > 1e-9
    assert torch.equal(changed, tensors["out.edited_rows"])
