"""Numbers of the original hallucination-mitigation codes, recorded in ``tests/golden`` (see its README for sources)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.kernels import attention

from .small import close, differ
from .test_golden import read

IMPLS = ("reference", "torch")
EXACT = 1e-9  # the tolerance the files carry for float64


def call_of(image: torch.Tensor, prompt_length: int, layer: int = 10) -> SimpleNamespace:
    """An attention call of a middle layer in a forward that knows its image keys [B, S] and prompt length."""
    context = SimpleNamespace(
        image_keys=image, prompt_length=prompt_length, memory={}, scratch={}, override={}
    )
    return SimpleNamespace(layer=layer, path="site", context=context, heads=None)


def program_of(tensors: dict, rows: slice = slice(None)) -> Program:
    query, key, value = (tensors[f"in.{name}"] for name in "qkv")
    offset = key.shape[2] - query.shape[2] + (rows.start or 0)
    query = query[:, :, rows]
    end = offset + query.shape[2]
    mask = Mask(query.shape[0], query.shape[2], end, q_offset=offset, causal=True)
    return Program(query, key[:, :, :end], value[:, :, :end], mask, scale=query.shape[-1] ** -0.5)


def patched(name: str, options: dict, program: Program, call: SimpleNamespace, impl: str) -> torch.Tensor:
    registry.build(name, options).edit(program, call)
    return attention(program, impl).output


def options_of(name: str, config: dict) -> dict:
    if name == "vaf":
        return {"enhance": config["enh"], "suppress": config["sup"]}
    return {"alpha": config["alpha"]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["pai", "hgai", "vaf"])
def test_output_is_that_of_the_original_code(name, case, impl):
    tensors, config = read(f"{name}__{case}")
    # a decoded row stands behind a prompt of any length; the prefill ends with the prompt
    call = call_of(tensors["in.image_mask"], config["S"] if case == "prefill" else config["S"] - 2)
    program = program_of(tensors)
    dense = attention(program, impl).output
    out = patched(name, options_of(name, config), program, call, impl)
    assert bool(tensors["in.valid_rows"].all())
    torch.testing.assert_close(out, tensors["out.context"], rtol=0, atol=EXACT)
    assert float((out - dense).abs().max()) > 1e-3  # the file is about the edit


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cuts", [[18], [14, 15, 16, 17, 18], [11, 14, 18]], ids=["once", "decode", "parts"])
def test_pai_gives_the_originals_prefill_and_decode_whatever_the_parts(cuts, impl):
    tensors, config = read("pai__trace")
    outputs, begin = [], 0
    for end in cuts:
        image = tensors["in.image_mask"][:, :end]
        call = call_of(image, config["prompt_len"])
        program = program_of(tensors, slice(begin, end))
        outputs.append(patched("pai", {"alpha": config["alpha"]}, program, call, impl))
        begin = end
    torch.testing.assert_close(torch.cat(outputs, 2), tensors["out.context"], rtol=0, atol=EXACT)


def test_vaf_edits_no_row_where_no_text_follows_the_image_and_the_original_edits_all():
    tensors, config = read("vaf__quirk_no_text_after_image")
    program = program_of(tensors)
    dense = attention(program, "reference").output
    call = call_of(tensors["in.image_mask"], config["S"])
    out = patched("vaf", options_of("vaf", config), program, call, "reference")
    assert torch.equal(out, dense)
    assert float((dense - tensors["out.context"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["pai", "hgai", "vaf"])
def test_layers_are_those_the_released_scripts_patch(name):
    """vlm_config__layer_ranges.json: the official installers called on 32 layers."""
    published = {"pai": (2, 31), "hgai": (5, 18), "vaf": (9, 14)}[name]
    tensors, config = read(f"{name}__decode")
    edited = []
    for layer in range(32):
        program = program_of(tensors)
        registry.build(name, {}).edit(program, call_of(tensors["in.image_mask"], config["S"] - 2, layer))
        edited += [layer] if program.score_edits else []
    assert edited == list(range(published[0], published[1] + 1))


# -- the formula of attnreal, for which there is no original code -----------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_attnreal_moves_a_share_of_the_answers_mass_to_the_image_in_proportion(impl):
    tensors, config = read("pai__trace")
    program = program_of(tensors)
    length, prompt, move = config["L"], config["prompt_len"], 0.3
    # one-hot values: the output of the program is the probabilities
    program.value = torch.eye(length, dtype=torch.float64).expand(*program.value.shape[:2], -1, -1)
    before = attention(program, impl).output
    call = call_of(tensors["in.image_mask"], prompt)
    registry.build("attnreal", {"move": move}).edit(program, call)
    after = attention(program, impl).output
    image = tensors["in.image_mask"][0].tolist()
    for head in range(config["H"]):
        for row in range(length):
            p = before[0, head, row].tolist()
            answer = sum(p[prompt:])
            seen = sum(x for x, i in zip(p, image) if i)
            expected = [
                x * (1 + move * answer / seen) if i else x * (1 - move) if j >= prompt else x
                for j, (x, i) in enumerate(zip(p, image))
            ] if seen else p  # fmt: skip
            error = (after[0, head, row] - torch.tensor(expected, dtype=torch.float64)).abs().max()
            assert float(error) < EXACT, (head, row)
    assert differ(before[:, :, prompt:], after[:, :, prompt:])
    close(after[:, :, :prompt], before[:, :, :prompt])
    close(after.sum(-1), torch.ones(after.shape[:3], dtype=torch.float64))


# -- which rows and keys ------------------------------------------------------------------------------------------


def test_hgai_averages_over_all_heads_and_edits_only_the_chosen_ones():
    tensors, config = read("hgai__prefill")
    program = program_of(tensors)
    dense = attention(program, "reference").output
    call = SimpleNamespace(**{**vars(call_of(tensors["in.image_mask"], config["S"])), "heads": (1,)})
    registry.build("hgai", {"alpha": config["alpha"]}).edit(program, call)
    out = attention(program, "torch").output
    close(out[:, 1], tensors["out.context"][:, 1])
    close(out[:, [0, 2, 3]], dense[:, [0, 2, 3]])


@pytest.mark.parametrize("name", ["pai", "hgai"])
def test_only_rows_from_the_end_of_the_prompt_on_are_edited(name):
    tensors, config = read("pai__trace")
    program = program_of(tensors)
    dense = attention(program, "reference").output
    call = call_of(tensors["in.image_mask"], config["prompt_len"])
    registry.build(name, {"alpha": 1.0}).edit(program, call)
    moved = (attention(program, "reference").output - dense).abs().amax((1, 3))[0] > EXACT
    assert moved.tolist() == [row >= config["prompt_len"] - 1 for row in range(config["L"])]


def test_vaf_edits_no_image_row_and_text_between_two_images_counts_as_behind():
    tensors, config = read("vaf__prefill")
    image = torch.zeros(2, config["S"], dtype=torch.bool)
    image[:, 3:8] = image[:, 11:16] = True
    program = program_of(tensors)
    dense = attention(program, "reference").output
    registry.build("vaf", {"enhance": 2.0, "suppress": 0.5}).edit(program, call_of(image, config["S"]))
    moved = (attention(program, "reference").output - dense).abs().amax((1, 3))[0] > EXACT
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, *range(16, config["L"])]
    assert program.key_class[0].tolist() == [2] * 3 + [1] * 5 + [0] * 3 + [1] * 5 + [0] * 8
