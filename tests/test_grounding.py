"""Edits on image tokens (pai, vaf, hgai, attnreal): which keys and rows, on which models, and what they refuse."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import CompositionError, ConfigError, ModelMismatchError, PatchError

from .conformance.families import columns_of, media_end
from .small import close, differ, inputs_of, model_of, output, refused, untouched
from .test_context import GREEDY, two_images

OPTIONS = {
    "pai": {"alpha": 2.0, "first_layer": 0},
    "vaf": {"enhance": 3.0, "suppress": 0.2, "first_layer": 0, "last_layer": None},
    "hgai": {"alpha": 2.0, "first_layer": 0, "last_layer": None},
    "attnreal": {"move": 0.9},
}
NAMES = list(OPTIONS)
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def llava():
    return model_of("llava")


def positions(inputs):
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


# -- which rows and keys ------------------------------------------------------------------------------------------


@every_name
def test_rows_with_two_images_are_the_same_in_a_batch_and_alone(llava, name):
    inputs = positions(two_images(llava))
    options = {**OPTIONS[name], **({"length": 40} if name == "attnreal" else {})}
    with hap.patched(llava, name, **options):
        together = output(llava, inputs)
        for row, pad in enumerate((0, 5)):
            alone = {k: v[row : row + 1, pad:] for k, v in inputs.items() if k != "pixel_values"}
            alone["pixel_values"] = inputs["pixel_values"][2 * row : 2 * row + 2]
            close(output(llava, alone), together[row : row + 1, pad:], f"row {row}")
    assert differ(together[0], output(llava, inputs)[0])


@every_name
def test_a_row_without_an_image_is_left_alone(llava, name):
    inputs = positions(inputs_of(llava, batch=2, length=9))
    ids = inputs["input_ids"].clone()
    ids[1][ids[1] == llava.config.image_token_id] = 7
    inputs = {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"][:1]}
    dense = output(llava, inputs)
    options = {**OPTIONS[name], **({"length": 20} if name == "attnreal" else {})}
    with hap.patched(llava, name, **options):
        edited = output(llava, inputs)
    close(edited[1], dense[1])
    assert differ(edited[0], dense[0])


@pytest.mark.parametrize("name", ["pai", "hgai"])
def test_right_padding_does_not_hide_the_row_that_predicts_the_answer(llava, name):
    alone = positions(inputs_of(llava, batch=1, length=9))
    length = alone["input_ids"].shape[1]
    padded = {k: torch.nn.functional.pad(v, (0, 4)) for k, v in alone.items() if k != "pixel_values"}
    both = {k: torch.cat([torch.nn.functional.pad(alone[k], (0, 4), value=1), padded[k]]) for k in padded}
    both["pixel_values"] = alone["pixel_values"].repeat(2, 1, 1, 1)
    with hap.patched(llava, name, **OPTIONS[name]):
        close(output(llava, both)[1, :length], output(llava, alone)[0])


# -- models --------------------------------------------------------------------------------------------------------

FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "smolvlm", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
@every_name
def test_decoding_with_a_cache_gives_what_one_forward_gives(name, family):
    model = model_of(family)
    inputs = inputs_of(model, left_pad=[3, 0])
    if "image_grid_thw" in inputs:  # positions in three axes, which the model finds only in its first forward
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        known = {k: inputs[k] for k in names if k in inputs}
        inputs["position_ids"] = model.model.get_rope_index(**known)[0]
    else:
        inputs = positions(inputs)
    first, length = media_end(inputs, model) + 3, inputs["input_ids"].shape[1]
    dense = output(model, inputs)
    with hap.patched(model, name, **OPTIONS[name]):
        with hap.prompt(model, length=first):
            whole = output(model, inputs)
        cache, parts, begin = DynamicCache(config=model.config), [], 0
        for end in range(first, length + 1):  # the cache knows where the prompt ended
            part = columns_of(inputs, begin, end)
            parts.append(output(model, part, past_key_values=cache, use_cache=True))
            begin = end
    for row, pad in enumerate((3, 0)):
        close(torch.cat(parts, 1)[row, pad:], whole[row, pad:])
    assert differ(whole, dense)


@every_name
def test_a_padded_prompt_read_in_parts_is_edited_only_where_it_ends(llava, name):
    inputs = positions(inputs_of(llava, left_pad=[3, 0]))
    first, length = media_end(inputs, llava) + 5, inputs["input_ids"].shape[1]
    cuts = [first - 4, first - 1, first, first + 2, length]
    with hap.patched(llava, name, **OPTIONS[name]), hap.prompt(llava, length=first):
        whole = output(llava, inputs)
        cache, parts, begin = DynamicCache(config=llava.config), [], 0
        for end in cuts:
            part = columns_of(inputs, begin, end)
            parts.append(output(llava, part, past_key_values=cache, use_cache=True))
            begin = end
    for row, pad in enumerate((3, 0)):
        close(torch.cat(parts, 1)[row, pad:], whole[row, pad:])


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@every_name
def test_generation_with_a_cache_gives_the_logits_of_generation_without(llava, name, more):
    inputs = two_images(llava)
    length = inputs["input_ids"].shape[1]
    plain = {k: v for k, v in more.items() if k == "num_beams"}
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    dense = llava.generate(**inputs, **options, **more)
    with hap.patched(llava, name, **OPTIONS[name]), hap.prompt(llava, length=length):
        cached = llava.generate(**inputs, **options, **more)
        expected = llava.generate(**inputs, use_cache=False, **options, **plain)
    assert torch.equal(cached.sequences, expected.sequences)
    close(torch.stack(cached.logits), torch.stack(expected.logits))
    assert differ(cached.logits[1], dense.logits[1])


@every_name
def test_a_cropped_cache_sees_the_images_that_are_read_next(llava, name):
    inputs = positions(
        {k: v[:1] if k != "pixel_values" else v[:2] for k, v in two_images(llava, (0, 0)).items()}
    )
    image = llava.config.image_token_id
    second = (
        int((inputs["input_ids"][0] == image).nonzero()[-1]) - 15
    )  # where the second image of 16 tokens begins
    other = {**inputs, "input_ids": inputs["input_ids"].clone(), "pixel_values": inputs["pixel_values"][:1]}
    other["input_ids"][:, second : second + 16] = 7
    cache = DynamicCache(config=llava.config)
    with hap.patched(llava, name, **OPTIONS[name]), hap.prompt(llava, length=second):
        output(llava, other, past_key_values=cache, use_cache=True)
        cache.crop(second - inputs["input_ids"].shape[1])
        rest = {
            **columns_of(inputs, second, inputs["input_ids"].shape[1]),
            "pixel_values": inputs["pixel_values"][1:],
        }
        close(output(llava, rest, past_key_values=cache, use_cache=True), output(llava, inputs)[:, second:])


@every_name
def test_paligemma_edits_the_answer_behind_its_bidirectional_prefix(name):
    model = model_of("paligemma")
    inputs = inputs_of(model, batch=1)
    with hap.patched(model, name, **OPTIONS[name]):
        out = model.generate(
            **inputs, max_new_tokens=4, **GREEDY, output_logits=True, return_dict_in_generate=True
        )
    dense = model.generate(
        **inputs, max_new_tokens=4, **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    step = 1 if name == "attnreal" else 0  # the first token has no answer before it
    assert differ(out.logits[step], dense.logits[step])
    if name == "attnreal":
        close(out.logits[0], dense.logits[0])


# -- refusals -------------------------------------------------------------------------------------------------------


@every_name
def test_a_text_only_prompt_is_refused_and_two_ways_out_are_dense(llava, name):
    ids = torch.randint(3, 99, (2, 9))
    assert not bool((ids == llava.config.image_token_id).any())
    dense = output(llava, {"input_ids": ids})
    with hap.patched(llava, name, **OPTIONS[name]) as handle:
        with refused(PatchError, name, "no image token", "handle.disabled()", "image_keys="):
            output(llava, {"input_ids": ids})
        with handle.disabled():
            assert torch.equal(output(llava, {"input_ids": ids}), dense)
        with hap.prompt(llava, image_keys=torch.zeros(2, 9, dtype=torch.bool)):
            close(output(llava, {"input_ids": ids}), dense)


@every_name
def test_embeddings_alone_need_the_image_keys_said(llava, name):
    embeds = llava.get_input_embeddings()(torch.randint(3, 99, (1, 12)))
    keys = torch.zeros(1, 12, dtype=torch.bool)
    keys[:, 2:7] = True
    options = {**OPTIONS[name], **({"length": 9} if name == "attnreal" else {})}
    with hap.patched(llava, name, **options):
        with refused(ModelMismatchError, name, "input_ids", "hap.prompt(model, image_keys="):
            output(llava, {"inputs_embeds": embeds})
        with hap.prompt(llava, image_keys=keys):
            edited = output(llava, {"inputs_embeds": embeds})
        with hap.prompt(llava, image_keys=keys.repeat(2, 1)), refused(PatchError, "2 rows", "batch has 1"):
            output(llava, {"inputs_embeds": embeds})
    assert differ(edited, output(llava, {"inputs_embeds": embeds}))


@every_name
def test_models_without_image_keys_are_refused_before_anything_changes(name):
    text, crossed = model_of("llama"), model_of("mllama")
    with untouched(text), refused(ModelMismatchError, name, "names no image token"):
        hap.patch(text, name)
    with untouched(crossed), refused(ModelMismatchError, name, "cross-attention", "placeholder"):
        hap.patch(crossed, name)


def test_two_methods_that_classify_keys_are_refused_together(llava):
    with hap.patched(llava, "pai", first_layer=0):
        with refused(CompositionError, "vaf", "pai", "key classes"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hap.patch(llava, "vaf")


@pytest.mark.parametrize("name, options", [
    ("pai", {"alpha": -0.1}), ("pai", {"alpha": float("inf")}), ("pai", {"first_layer": 4, "last_layer": 3}),
    ("hgai", {"alpha": -1.0}), ("vaf", {"enhance": 0.0}), ("vaf", {"suppress": -1.0}), ("attnreal", {"move": 1.1}),
    ("attnreal", {"length": 0}),
])  # fmt: skip
def test_options_out_of_range_are_refused(name, options):
    with refused(ConfigError, name, next(reversed(options))):
        registry.build(name, options)


@pytest.mark.parametrize("name, first, last", [("hgai", 5, 18), ("vaf", 9, 14)])
def test_a_range_published_for_32_layers_warns_on_other_depths(llava, name, first, last):
    assert any("nothing will be edited" in w for w in hap.plan(llava, name).warnings)
    deep = model_of("llava")
    deep.config.text_config.num_hidden_layers = 30
    sites = [dataclasses.replace(s, layer=10) for s in hap.plan(llava, name).sites[:1]]
    found = registry.build(name, {}).check_model(deep, sites)
    assert any(f"layers {first} to {last} were published for models of 32 layers" in w for w in found)
    deep.config.text_config.num_hidden_layers = 32
    assert registry.build(name, {}).check_model(deep, sites) == []
    assert registry.build(name, {"first_layer": 8}).check_model(deep, sites) == []
