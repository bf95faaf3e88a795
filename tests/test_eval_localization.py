"""`localization`: pointing and energy of maps that are known, boxes of scenes, CLS and Prompt-CAM maps of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.labelled import labelled
from hf_attn_patch.eval.localization import Localization, class_boxes, cls_maps, on_boxes
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

        values, labels, boxes, side, _ = task.items(model, pixels, 0)[4]
        heat = class_maps(model, values[None]).maps[0, :, labels].mean(0)
        assert found["energy"][4] == pytest.approx(on_boxes(heat, boxes, side)["energy"], abs=1e-6)


@pytest.mark.parametrize("options", [{"map": "x"}, {"test": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="localization: test="):
        Localization(**options)
