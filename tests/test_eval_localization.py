"""`localization`: pointing and energy of maps that are known, boxes of scenes, CLS and Prompt-CAM maps of a model."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.labelled import labelled
from hf_attn_patch.eval.localization import (
    PICTURED,
    Item,
    Localization,
    Object,
    class_boxes,
    cls_maps,
    on_boxes,
    without_prompts,
)
from hf_attn_patch.eval.localization_pictures import SIDE, drawn, peak
from hf_attn_patch.eval.result import jsonable
from hf_attn_patch.report.evaluation import render
from hf_attn_patch.testbed import scenes
from tests.eval_models import vision_model

BOX = (0, 0, 50, 100)


def test_a_map_inside_the_box_has_all_its_energy_there_and_a_uniform_one_the_area():
    heat = torch.zeros(10, 10)
    heat[2, 1] = 3.0
    found = on_boxes(heat, [BOX], 100)
    assert found["pointing"] == 1 and found["energy"] == pytest.approx(1, abs=1e-6)
    assert found["box_area"] == pytest.approx(0.5)
    assert on_boxes(heat.flip(1), [BOX], 100)["pointing"] == 0
    assert on_boxes(torch.ones(10, 10), [BOX], 100)["energy"] == pytest.approx(0.5)
    assert on_boxes(torch.ones(10, 10), [BOX, BOX], 100)["box_area"] == pytest.approx(0.5)  # counted once
    with pytest.raises(ValueError, match="without mass"):
        on_boxes(torch.zeros(4, 4), [BOX], 100)


def test_boxes_are_those_of_objects_of_the_scenes_group():
    _, test = labelled("t", "testbed:scenes", 0, 12, seed=0)
    for row, boxes in zip(scenes.build("test", 12, seed=0), class_boxes(test)):
        assert list(map(list, boxes)) == [
            o["box"] for o in row["objects"] if o["name"] in scenes.GROUPS[row["group"]]
        ]


def test_what_lies_under_a_place_is_an_object_of_the_group_if_there_is_one():
    objects = [Object("cow", (0, 0, 60, 60), False), Object("cup", (40, 40, 80, 80), True)]
    item = Item(None, 0, "kitchen", None, objects)
    assert item.boxes == [(40, 40, 80, 80)]
    assert [item.under(x, y) for x, y in ((10, 10), (50, 50), (79, 79), (80, 80))] == [
        "cow", "cup", "cup", "background",
    ]  # fmt: skip


def images(n=3):
    return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_cls_maps_are_the_models_own_attention_and_see_what_patches_do():
    model, _ = vision_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(pixel_values=images(), output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
    torch.testing.assert_close(cls_maps(model, images()).flatten(1), wanted)
    with hap.patch(model, "prompt_cam", classes=5):
        added = cls_maps(model, images())
        assert added.shape == (3, 4, 4) and (added.sum((1, 2)) < 1).all()
    with hap.patch(model, "kk_attention"):
        assert not torch.allclose(cls_maps(model, images()).flatten(1), wanted)
    assert not hap.active(model)


def test_task_pairs_dense_with_patched_and_groups_by_scene():
    model, pixels = vision_model()
    result = evaluation.run(
        Localization(test=8), model, pixels, patches={"same": "neighborhood:window=[4,4]"}
    )
    dense, same = (v.scores for v in result.variants)
    assert np.allclose(dense["energy"], same["energy"], atol=1e-6) and dense["box_area"] == same["box_area"]
    assert all(0 < e < 1 for e in dense["energy"]) and set(dense["pointing"]) <= {0.0, 1.0}
    assert set(result.variants[0].by_group["pointing"]) <= set(scenes.GROUPS)


def test_prompt_cam_maps_are_asked_for_the_true_class():
    model, pixels = vision_model()
    with pytest.raises(hap.PatchError, match="carries no prompt_cam"):
        evaluation.run(Localization(test=4, map="prompt_cam"), model, pixels)
    with (
        hap.patch(model, "prompt_cam", classes=3),
        pytest.raises(ValueError, match="has 3 classes, the scenes have"),
    ):
        evaluation.run(Localization(test=4, map="prompt_cam"), model, pixels)
    with hap.patch(model, "prompt_cam", classes=len(scenes.GROUPS)):
        task = Localization(test=6, map="prompt_cam", batch=4)
        found = evaluation.run(task, model, pixels)["dense"].scores
        from hf_attn_patch.patches.vision.prompt_cam import class_maps

        item = task.items(model, pixels, 0)[4]
        heat = class_maps(model, item.pixels[None]).maps[0, :, item.label].mean(0)
        assert found["energy"][4] == pytest.approx(
            on_boxes(heat, item.boxes, scenes.SIZE)["energy"], abs=1e-6
        )


def picture_of(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64" and len(uri) <= 20_000
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_page_shows_what_is_under_the_peak_beside_the_map_without_prompts(tmp_path):
    model, pixels = vision_model()
    dense = vision_model()[0]
    with hap.patch(model, "prompt_cam", classes=len(scenes.GROUPS)):
        task = Localization(test=14, map="prompt_cam")
        result = evaluation.run(task, model, pixels, out=tmp_path)
        items = task.items(model, pixels, 0)
        with without_prompts(model):
            assert torch.equal(cls_maps(model, images()), cls_maps(dense, images()))
        assert not torch.equal(cls_maps(model, images()), cls_maps(dense, images()))
    found = result["dense"]
    for item, answer, hit in zip(items, found.answers, found.scores["pointing"]):
        verdict, name = answer.split(": ")
        assert verdict == ("hit" if hit else "miss")
        assert (name in {o.name for o in item.objects if o.wanted}) == bool(hit)
    shown = result.attachments
    titles = [
        "boxes: objects of the group", "prompt_cam of the true group, ring: its peak", "cls, without prompts",
    ]  # fmt: skip
    assert len(shown) == PICTURED and all(list(row) == titles for row in shown)
    html = render(jsonable(result.to_dict()), shown)
    assert html.count("data:image/png") == 3 * PICTURED
    one = [picture_of(uri) for uri in shown[0].values()]
    assert all(x.shape == (SIDE, SIDE, 3) for x in one) and not any(
        np.array_equal(a, b) for a, b in ((one[0], one[1]), (one[1], one[2]))
    )


def test_ring_is_where_the_pointing_game_looks():
    heat = torch.zeros(8, 8)
    heat[1, 6] = 2.0
    x, y = peak(heat, 112)
    assert (x // 14, y // 14) == (6, 1) and on_boxes(heat, [(x, y, x + 1, y + 1)], 112)["pointing"] == 1
    image = Image.new("RGB", (112, 112), (90, 120, 90))
    plain, ringed = picture_of(drawn(image, [])), picture_of(drawn(image, [], heat))
    red = ringed[..., 0] - ringed[..., 2]  # inferno: dark at its least value, yellow at its largest
    assert np.unravel_index(red.argmax(), red.shape)[0] // 20 == 1
    assert np.unravel_index(red.argmax(), red.shape)[1] // 20 == 6
    assert (plain == plain[0, 0]).all()


def test_boxes_of_a_picture_are_scaled_with_it():
    found = picture_of(drawn(Image.new("RGB", (112, 112), (90, 120, 90)), [(28, 56, 84, 112)]))
    black = np.argwhere((found < 40).all(-1))
    assert black.min(0).tolist() == [80, 40] and black.max(0).tolist() == [159, 119]


@pytest.mark.parametrize("options", [{"map": "x"}, {"test": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="localization: test="):
        Localization(**options)
