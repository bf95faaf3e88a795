"""`paint`: the original code's numbers, and what a vision tower's CLS row chooses in batches and caches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch.errors import CacheError, ConfigError, ModelMismatchError, PatchError
from hf_attn_patch.inspection.calls import watched
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.grounding.paint import LOCAL, SUMMARY, streams, summary_patches
from hf_attn_patch.patches.grounding.paint import PayAttentionToInformedTokens as Paint

from .conformance.families import columns_of
from .small import close, differ, inputs_of, model_of, output, refused, untouched
from .test_context import two_images
from .test_golden import read
from .test_golden_vlm import EXACT, program_of

OPTIONS = {"ratio": 0.25, "alpha": 2.0, "beta": 1.0, "first_layer": 0}


@pytest.fixture
def llava():
    return model_of("llava")


def positions(inputs):
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


# -- the original code's numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["streams", "streams_natural"])
def test_streams_are_those_of_the_original_code(case):
    tensors, config = read(f"paint__{case}")
    first, late = (tensors[f"in.cls_attn_{n}"][..., 1:].sum(1) for n in ("first", "penultimate"))
    found = streams(first, late, config["ratio"])
    assert torch.equal(found == SUMMARY, tensors["out.summary_mask_exact_count"])
    assert torch.equal(found == LOCAL, tensors["out.local_mask_exact_count"])


def test_summary_begins_one_and_a_half_interquartile_ranges_above_the_upper_quartile():
    row = torch.arange(101, dtype=torch.float64)
    for last, outlier in (
        (100.0, False),
        (149.0, False),
        (150.0, False),
        (150.1, True),
    ):  # quartiles 25 and 75
        row[100] = last
        found = summary_patches(row[None])
        assert bool(found[0, 100]) == outlier and int(found.sum()) == outlier, last


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", ["score_prefill", "score_decode"])
def test_output_is_that_of_the_original_code(case, impl):
    tensors, config = read(f"paint__{case}")
    program = program_of(tensors)
    dense = attention(program, impl).output
    local, summary = tensors["in.local_mask"], tensors["in.summary_mask"]
    program.classify((local * LOCAL + summary * SUMMARY).to(torch.int8))
    # the edits `paint` makes, on the classes the file names
    patch = Paint(alpha=config["alpha"], beta=config["beta"], first_layer=0)
    patch._learn = lambda program, call: program.key_class
    context = SimpleNamespace(prompt_length=tensors["in.q"].shape[2], memory={}, scratch={}, override={})
    if case == "score_decode":
        context.prompt_length = config["S"] - 2
    patch.edit(program, SimpleNamespace(layer=10, part="text", heads=None, context=context))
    out = attention(program, impl).output
    assert bool(tensors["in.valid_rows"].all())
    torch.testing.assert_close(out, tensors["out.context"], rtol=0, atol=EXACT)
    assert float((out - dense).abs().max()) > 1e-3


# -- what the tower's CLS token looks at --------------------------------------------------------------------------


def classes_of(model, inputs, **options):
    """Key classes of the last text layer in a forward, and the scores' amounts of its edits."""
    seen = {}
    with hap.patched(model, "paint", **{**OPTIONS, **options}):
        with watched(
            model, lambda program, call: seen.update(classes=program.key_class, edits=program.score_edits)
        ):
            output(model, inputs)
    return seen


def eager_streams(model, inputs, ratio, local=0, summary=-2):
    """The same from the tower's own attention probabilities, with eager attention."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation(before)
    first, late = (maps[n][:, :, 0, 1:].sum(1) for n in (local, summary))
    return streams(first, late, ratio)


@pytest.mark.parametrize("local, summary", [(0, -2), (1, 0), (-1, -1)])
def test_classes_are_the_streams_of_eager_probabilities_at_the_image_tokens(llava, local, summary):
    inputs = two_images(llava)
    seen = classes_of(llava, inputs, local_layer=local, summary_layer=summary)
    image = inputs["input_ids"] == llava.config.image_token_id
    wanted = eager_streams(llava, inputs, OPTIONS["ratio"], local, summary)
    assert torch.equal(seen["classes"][image], wanted.flatten())
    assert not seen["classes"][~image].any()
    assert bool((wanted == LOCAL).any())


def test_the_tower_computes_what_it_did_and_stays_on_its_own_implementation(llava):
    inputs = inputs_of(llava)
    tower = llava.model.vision_tower
    with torch.no_grad():
        dense = tower(inputs["pixel_values"])[0]
        with hap.patched(llava, "paint", **OPTIONS):
            close(tower(inputs["pixel_values"])[0], dense)
        assert torch.equal(tower(inputs["pixel_values"])[0], dense)


def test_the_plan_names_the_two_vision_layers_and_neutral_looks_at_none(llava):
    vision = lambda plan: [s.layer for s in plan.sites if s.part == "vision"]
    depth = llava.config.vision_config.num_hidden_layers
    assert vision(hap.plan(llava, "paint", **OPTIONS)) == sorted({0, depth - 2})
    assert vision(hap.plan(llava, "paint", alpha=0.0, beta=0.0)) == []
    assert vision(hap.plan(llava, "paint", layers=[1], **OPTIONS)) == sorted({0, depth - 2})


# -- batches, caches, several images --------------------------------------------------------------------------------


@pytest.mark.parametrize("by_head", [False, True])
def test_rows_with_two_images_are_the_same_in_a_batch_and_alone(llava, by_head):
    inputs = positions(two_images(llava))
    with hap.patched(llava, "paint", by_head=by_head, **OPTIONS):
        together = output(llava, inputs)
        for row, pad in enumerate((0, 5)):
            alone = {k: v[row : row + 1, pad:] for k, v in inputs.items() if k != "pixel_values"}
            alone["pixel_values"] = inputs["pixel_values"][2 * row : 2 * row + 2]
            close(output(llava, alone), together[row : row + 1, pad:], f"row {row}")
    assert differ(together[0], output(llava, inputs)[0])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("parts", ["decode", "two parts"])
def test_a_cache_gives_what_one_forward_gives(llava, parts, by_head):
    inputs = inputs_of(llava, batch=2, length=17, left_pad=[0, 3])
    total = inputs["input_ids"].shape[1]
    image = (inputs["input_ids"] == llava.config.image_token_id).any(0).nonzero()
    begin = int(image.max()) + 1
    cuts = [0, *range(begin, total + 1)] if parts == "decode" else [0, begin, total - 2, total]
    length = begin if parts == "decode" else total - 2
    with hap.patched(llava, "paint", by_head=by_head, **OPTIONS):
        with hap.prompt(llava, length=length):
            whole = output(llava, inputs)
            cache, outputs = DynamicCache(config=llava.config.get_text_config()), []
            for a, b in zip(cuts, cuts[1:]):
                outputs.append(output(llava, columns_of(inputs, a, b), past_key_values=cache, use_cache=True))
    real = inputs["attention_mask"].bool()
    close(torch.cat(outputs, 1)[real], whole[real])
    assert differ(whole[real], output(llava, inputs)[real])


def test_generate_says_what_one_forward_over_its_answer_says(llava):
    """`generate` runs the tower in a forward of its own."""
    inputs = inputs_of(llava, batch=2, length=17, left_pad=[0, 3])
    length = inputs["input_ids"].shape[1]
    with hap.patched(llava, "paint", **OPTIONS):
        made = llava.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None,
                              output_logits=True, return_dict_in_generate=True)  # fmt: skip
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        with hap.prompt(llava, length=length):
            whole = output(llava, positions({**inputs, "input_ids": made.sequences, "attention_mask": mask}))
    # generate keeps its logits in float32
    torch.testing.assert_close(whole[:, length - 1 : -1].float(), torch.stack(made.logits, 1))


def test_generation_with_beams_is_that_of_each_row_alone(llava):
    inputs = inputs_of(llava, batch=2, length=17, left_pad=[0, 0])
    how = dict(max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    images = len(inputs["pixel_values"]) // 2
    with hap.patched(llava, "paint", **OPTIONS):
        both = llava.generate(**inputs, **how)
        for row in range(2):
            alone = {k: v[row : row + 1] for k, v in inputs.items() if k != "pixel_values"}
            alone["pixel_values"] = inputs["pixel_values"][row * images : (row + 1) * images]
            assert torch.equal(llava.generate(**alone, **how)[0], both[row])


def test_a_row_without_an_image_is_left_alone(llava):
    inputs = positions(inputs_of(llava, batch=2, length=9))
    ids = inputs["input_ids"].clone()
    ids[1][ids[1] == llava.config.image_token_id] = 7
    inputs = {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"][:1]}
    dense = output(llava, inputs)
    with hap.patched(llava, "paint", by_head=True, **OPTIONS):
        edited = output(llava, inputs)
    close(edited[1], dense[1])
    assert differ(edited[0], dense[0])


# -- by_head ------------------------------------------------------------------------------------------------------


def test_by_head_scales_by_a_heads_share_of_the_image_and_has_mean_one(llava):
    inputs = inputs_of(llava, batch=1, length=9)
    seen = classes_of(llava, inputs, by_head=True)
    amounts = [edit.amount for edit in seen["edits"]]
    assert [e.key_class for e in seen["edits"]] == [LOCAL, SUMMARY]
    last = amounts[0][:, :, -1, 0]
    close(last.mean(1), torch.full((1,), OPTIONS["alpha"], dtype=last.dtype))
    assert float(last.std()) > 1e-3
    close(amounts[1][:, :, -1, 0] * OPTIONS["alpha"], last * OPTIONS["beta"])


def test_by_head_is_neutral_where_all_heads_are_alike(llava):
    inputs = inputs_of(llava, batch=1, length=9)
    for name, weight in llava.model.language_model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:  # every head the first one
            dim = llava.config.text_config.head_dim
            weight.copy_(weight[:dim].repeat(weight.shape[0] // dim, 1))
    with hap.patched(llava, "paint", **OPTIONS):
        plain = output(llava, inputs)
    with hap.patched(llava, "paint", by_head=True, **OPTIONS):
        close(output(llava, inputs), plain)
    assert differ(plain, output(llava, inputs))


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, word", [
    ("paligemma", "no CLS token"), ("internvl", "pixel-shuffled"), ("idefics3", "pixel-shuffled"),
    ("qwen2_vl", "merged"), ("llava_next", "newlines"), ("gemma3", "pooled"), ("video_llava", "2 of them"),
])  # fmt: skip
def test_towers_whose_cls_row_says_nothing_about_image_tokens_are_refused(family, word):
    model = model_of(family)
    with untouched(model), refused(ModelMismatchError, "paint", word):
        hap.patch(model, "paint")


def test_a_vision_layer_that_does_not_exist_is_refused(llava):
    with untouched(llava), refused(ConfigError, "vision layer 9", "the tower has"):
        hap.patch(llava, "paint", summary_layer=9)


def test_other_stream_layers_for_some_text_layers_are_refused(llava):
    layers = {"0": {"local_layer": 1, "summary_layer": 1}}
    with hap.patched(llava, "paint", layers=layers, local_layer=0, summary_layer=0, first_layer=0):
        with refused(PatchError, "vision layer 1 is not watched"):
            output(llava, inputs_of(llava))


def test_images_without_a_tower_in_the_forward_are_refused(llava):
    inputs = inputs_of(llava, batch=1)
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = llava.get_input_embeddings()(ids.clamp(max=90))
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with (
        hap.patched(llava, "paint", **OPTIONS),
        hap.prompt(llava, image_keys=ids == llava.config.image_token_id),
    ):
        with refused(PatchError, "no vision tower ran"):
            output(llava, given)


def test_a_cache_with_images_from_before_the_patch_is_refused(llava):
    inputs = inputs_of(llava, batch=1)
    total = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=llava.config.get_text_config())
    image = inputs["input_ids"] == llava.config.image_token_id
    output(llava, columns_of(inputs, 0, total - 1), past_key_values=cache, use_cache=True)
    with hap.patched(llava, "paint", **OPTIONS), hap.prompt(llava, image_keys=image):
        with refused(CacheError, "fresh cache"):
            output(llava, columns_of(inputs, total - 1, total), past_key_values=cache, use_cache=True)
