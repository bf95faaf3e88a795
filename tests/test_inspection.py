"""`capture` and `attention_flow`: numbers of the attention that the model computes, without its matrices."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.errors import ConfigError, PatchError
from hf_attn_patch.inspection import Flow, image_tokens
from hf_attn_patch.inspection.attention_flow import combined_heads
from hf_attn_patch.inspection.capture import CLASSES

from .small import close, differ, inputs_of, model_of, output, refused, untouched
from .test_context import GREEDY, two_images
from .test_decoding import alone
from .test_golden import read
from .test_grounding import positions

FAMILIES = ("llava", "qwen2_vl")
every_family = pytest.mark.parametrize("family", FAMILIES)


def padded(model, seed=0):
    return inputs_of(model, batch=2, length=9, left_pad=[0, 3], seed=seed)


def eager_weights(model, inputs):
    """[layers, H, L, L] of one unpadded prompt, by the model's own eager attention (softmax in float32)."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0]


def by_hand(weights, image, rows):
    """Class or entropy -> [layers, H]: means over `rows` of dense weights [layers, H, L, L] of a prompt."""
    kept = weights[:, :, rows]
    sink = torch.arange(image.numel()) == 0
    classes = {"image": image & ~sink, "sink": sink, "text": ~image & ~sink}
    made = {name: kept[..., keys].sum(-1).mean(-1) for name, keys in classes.items()}
    return {**made, "entropy": -torch.xlogy(kept, kept).sum(-1).mean(-1)}


def same(table, expected):
    for name, values in expected.items():
        found = torch.tensor(getattr(table, name)).float()
        torch.testing.assert_close(found, values.float())


# -- capture ------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("rows", ["all", "prompt", "answer"])
def test_statistics_are_those_of_the_models_eager_attention(family, rows):
    model = model_of(family)
    inputs = alone(padded(model), 0)
    image = inputs["input_ids"][0] == model.config.image_token_id
    length = image.numel()
    chosen = {"all": range(length), "prompt": range(length - 1), "answer": [length - 1]}[rows]
    with hap.capture(model, rows=rows) as table, torch.no_grad():
        model(**inputs)
    same(table, by_hand(eager_weights(model, inputs), image, list(chosen)))
    assert table.counted[0] == len(chosen) and table.layers == [0, 1]


@pytest.mark.parametrize("entropy", [True, False])
def test_a_padded_batch_counts_what_its_rows_count_alone(entropy):
    model = model_of("llava")
    inputs = positions(padded(model))  # counted from the first real token, in both
    with hap.capture(model, rows="all", entropy=entropy) as together, torch.no_grad():
        model(**inputs)
    with hap.capture(model, rows="all", entropy=entropy) as apart, torch.no_grad():
        for row in range(2):
            model(**alone(inputs, row))
    assert together.counted == apart.counted
    for name in [*CLASSES, *(["entropy"] if entropy else [])]:
        close(torch.tensor(getattr(together, name)), torch.tensor(getattr(apart, name)), name)


@every_family
def test_every_visible_key_is_in_one_class(family):
    model = model_of(family)
    with hap.capture(model) as table:
        model.generate(**padded(model), max_new_tokens=4, **GREEDY)
    total = sum(getattr(table, name) for name in CLASSES)
    close(torch.tensor(total), torch.ones(total.shape, dtype=torch.float64))
    assert table.answer.max() > 0 and table.image.max() > 0
    assert table.counted[0] == 2 * 4  # the last row of the prompt, and three tokens


@every_family
def test_generate_counts_what_one_forward_over_prompt_and_answer_counts(family):
    model = model_of(family)
    inputs = alone(padded(model), 1)
    length = inputs["input_ids"].shape[1]
    with hap.capture(model) as parts:
        ids = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    whole = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 3))
    with hap.capture(model) as once, hap.prompt(model, length=length), torch.no_grad():
        model(**whole, use_cache=False)
    assert parts.counted == once.counted
    kept = eager_weights(model, whole)[:, :, length - 1 :]
    same(parts, {"answer": kept[..., length:].sum(-1).mean(-1)})
    for name in (*CLASSES, "entropy"):
        close(torch.tensor(getattr(parts, name)), torch.tensor(getattr(once, name)), name)


@pytest.mark.parametrize("rows", ["all", "answer"])
def test_the_executors_own_class_masses_are_the_same_numbers(rows):
    model = model_of("llava")
    inputs = padded(model)
    with hap.capture(model, rows=rows) as passed:
        model.generate(**inputs, max_new_tokens=4, **GREEDY)
    with hap.capture(model, rows=rows, entropy=False) as masses:
        model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert masses.counted == passed.counted
    for name in CLASSES:
        close(torch.tensor(getattr(masses, name)), torch.tensor(getattr(passed, name)), name)
    with refused(PatchError, "entropy=False"):
        _ = masses.entropy


@pytest.mark.parametrize("entropy", [True, False])
def test_what_is_measured_stays_what_it_was(entropy):
    model = model_of("llava")
    inputs = padded(model)
    dense = output(model, inputs)
    real = inputs["attention_mask"].bool()
    with untouched(model, inputs), hap.capture(model, entropy=entropy):
        close(output(model, inputs)[real], dense[real])


def test_patches_on_the_model_are_part_of_what_is_measured():
    model = model_of("llava")
    inputs = alone(padded(model), 0)
    with hap.capture(model) as dense, torch.no_grad():
        model(**inputs)
    with hap.patched(model, "pai", alpha=2.0, first_layer=0), hap.capture(model) as edited, torch.no_grad():
        model(**inputs)
    assert (edited.image[0] > dense.image[0]).all()
    with hap.patched(model, "streaming", sinks=1, window=2), hap.capture(model) as narrow, torch.no_grad():
        model(**inputs)
    assert narrow.entropy.max() <= np.log(3) + 1e-9  # three keys are left


def test_a_language_model_has_no_image_mass_and_two_sinks_can_be_counted():
    model = model_of("llama")
    inputs = inputs_of(model, batch=1, length=9)
    with hap.capture(model, rows="all", sinks=2) as table, torch.no_grad():
        model(**inputs)
    assert table.image.max() == 0
    weights = eager_weights(model, inputs)
    same(table, {"sink": weights[..., :2].sum(-1).mean(-1)})


def test_the_table_prints_sorts_and_saves(tmp_path):
    model = model_of("llava")
    with hap.capture(model) as table:
        assert "nothing counted" in str(table)
        with refused(PatchError, "nothing was counted", "hap.prompt"):
            _ = table.image
        model.generate(**padded(model), max_new_tokens=3, **GREEDY)
    layer, head, value = table.heads("image", 1)[0]
    assert value == table.image.max() == table.image[layer, head]
    read_back = json.loads(table.to_json(tmp_path / "table.json"))
    assert read_back == json.loads((tmp_path / "table.json").read_text())
    assert np.allclose(read_back["entropy"], table.entropy) and read_back["counted"] == [6, 6]
    text = str(table)
    assert f"{table.image[0].mean():.3f}" in text and "6 rows" in text and len(text.splitlines()) == 4


def test_capture_refuses_what_it_cannot_count():
    model = model_of("llava")
    inputs = padded(model)
    with untouched(model):
        with refused(ConfigError, "rows='last'", "answer"):
            with hap.capture(model, rows="last"):
                pass
        with refused(ConfigError, "sinks=-1"):
            with hap.capture(model, sinks=-1):
                pass
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with refused(PatchError, "no input_ids", "image_keys="):
            with hap.capture(model), torch.no_grad():
                model(inputs_embeds=embeds)


# -- the flow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["each", "final", "none"])
@pytest.mark.parametrize("start", ["zero", "first"])
def test_the_flow_is_that_of_the_formula_in_all_six_readings(start, columns):
    tensors, config = read("vlsam__flow")
    flow = Flow(start, columns)
    for layer, attention in enumerate(tensors["in.attn"]):
        blocks = [(part, attention[:, part]) for part in torch.arange(config["N"]).split(5)]
        combined = combined_heads(blocks, blocks, config["N"])
        close(combined, tensors["out.layer_attn"][layer])
        flow.add(combined)
    close(flow.result(), tensors[f"out.flow_init_{'s1' if start == 'first' else 'zero'}_{columns}"])
    image = slice(config["image_start"], config["image_start"] + config["image_len"])
    found = flow.result()[config["object_rows"]][:, image]
    close(found, tensors[f"out.map_init_{'s1' if start == 'first' else 'zero'}_{columns}"])


@every_family
def test_maps_are_those_of_the_models_eager_attention(family):
    model = model_of(family)
    inputs = alone(padded(model), 0)
    image = inputs["input_ids"][0] == model.config.image_token_id
    flow = Flow()
    for attention in eager_weights(model, inputs).double():
        rows = torch.arange(image.numel())
        flow.add(combined_heads([(rows, attention)], [(rows, attention)], image.numel()))
    made = hap.attention_flow(model, inputs, tokens=[-1, -3])[0]
    expected = flow.result()[[image.numel() - 1, image.numel() - 3]][:, image]
    torch.testing.assert_close(torch.tensor(made.values).flatten(1), expected.float())
    side = 4 if family == "llava" else 2
    assert made.values.shape == (2, side, side)


def test_maps_do_not_depend_on_padding_neighbours_or_blocks():
    model = model_of("llava")
    inputs = padded(model)
    together = hap.attention_flow(model, inputs)
    small = hap.attention_flow(model, inputs, block=4)
    for row in range(2):
        one = hap.attention_flow(model, alone(inputs, row))[0]
        np.testing.assert_allclose(together[row].values, one.values, rtol=1e-6)
        np.testing.assert_allclose(small[row].values, one.values, rtol=1e-6)
    assert differ(torch.tensor(together[0].values), torch.tensor(together[1].values))


def test_two_pictures_in_a_row_get_a_map_each():
    model = model_of("llava")
    inputs = two_images(model)
    maps = hap.attention_flow(model, inputs)
    assert [m.row for m in maps] == [0, 0, 1, 1]
    assert differ(torch.tensor(maps[0].values), torch.tensor(maps[1].values))


def test_a_picture_is_drawn_over_the_image(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    model = model_of("llava")
    made = hap.attention_flow(model, padded(model))[0]
    assert made.mean.min() == 0 and made.mean.max() == 1 and "4 x 4 patches" in repr(made)
    bare = made.picture()
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    over = made.picture(image, path=tmp_path / "map.svg", title="a map")
    assert bare.startswith("<?xml") and over == (tmp_path / "map.svg").read_text() and "a map" in over
    assert over != made.picture(image + 99, title="a map") and over != made.picture(title="a map")
    assert made.picture(image, title="a map") == over  # the same map gives the same file


def test_flow_leaves_the_model_alone_and_refuses_what_it_cannot_show():
    model = model_of("qwen2_vl")
    inputs = padded(model)
    model.generate(**inputs, max_new_tokens=2, **GREEDY)
    before = model.model.rope_deltas
    hap.attention_flow(model, alone(inputs, 1))
    assert model.model.rope_deltas is before
    with untouched(model, inputs):
        hap.attention_flow(model, inputs)
    text = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 7)}
    with untouched(model, inputs):
        with refused(PatchError, "no image token"):
            hap.attention_flow(model, text)
        with refused(PatchError, "tokens=[99]", "13"):
            hap.attention_flow(model, inputs, tokens=[99])
        with refused(PatchError, "row 1", "padding"):
            hap.attention_flow(model, inputs, tokens=[0])
        with refused(ConfigError, "start='one'"):
            hap.attention_flow(model, inputs, start="one")
        with refused(ConfigError, "columns='some'"):
            hap.attention_flow(model, inputs, columns="some")


def test_image_tokens_without_a_grid_must_be_a_square_or_be_told():
    model = model_of("llava")
    image = model.config.image_token_id
    ids = torch.tensor([[3, *[image] * 6, 5]])
    with refused(PatchError, "6 image tokens", "grid="):
        image_tokens(model.config, {"input_ids": ids})
    place = image_tokens(model.config, {"input_ids": ids}, grid=(2, 3))[0]
    assert place.columns.tolist() == list(range(1, 7))
    assert place.on_grid(torch.arange(8.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
