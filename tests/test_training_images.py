"""`finetune` on images: prompts of a frozen ViT learn, are saved as patch adapters, and come back."""

from __future__ import annotations

import json

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import training
from hf_attn_patch.eval.labelled import labelled
from hf_attn_patch.training.finetune import finetune
from hf_attn_patch.training.images import image_examples
from tests.eval_models import vision_model
from tests.test_eval_probes import classifier

DIGITS = "testbed:digits"
PATCHES = {
    "prompt_cam": {"classes": 10},
    "tcpa": {"classes": 10, "prompts": 4, "topk": 2},
}


@pytest.mark.parametrize("name", PATCHES)
def test_prompts_learn_digits_and_come_back_from_their_adapter(name, tmp_path):
    model, pixels = vision_model()
    frozen = {n: p.clone() for n, p in model.state_dict().items()}
    recipe = training.Recipe(steps=60, lr=2e-2, batch=16, images=128, log_every=5)
    trained = finetune(model, pixels, DIGITS, tmp_path / "out", [(name, PATCHES[name])], recipe)
    losses = [entry["loss"] for entry in trained.log if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trained.parameters["trained"] == trained.parameters["patch"] > 0
    assert "960 images" in str(trained)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["patches"][0]["name"] == name
    _, test = labelled("t", DIGITS, 0, 20, seed=0)
    values = pixels(list(test.images))["pixel_values"]
    with torch.no_grad():
        wanted = model(pixel_values=values).logits
    hap.unpatch(model)
    assert all(torch.equal(p, frozen[n]) for n, p in model.state_dict().items())
    fresh, _ = vision_model()
    fresh = training.load(fresh, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(fresh(pixel_values=values).logits, wanted)


def test_prompts_without_a_head_train_with_the_classifier_of_the_model_and_lora_beside_them(tmp_path):
    model, pixels = classifier()
    recipe = training.Recipe(
        steps=4, batch=8, images=32, log_every=2, lora=training.Lora(targets=("q_proj", "v_proj"))
    )
    trained = finetune(model, pixels, DIGITS, tmp_path / "out", [("tcpa", {"prompts": 3, "topk": 2})], recipe)
    assert trained.parameters["trained"] > trained.parameters["patch"] > 0
    assert "tcpa.pull" in trained.log[0]


def test_examples_are_seeded_and_of_the_size_asked_for():
    model, pixels = vision_model()
    first, again, other = (image_examples(model, pixels, DIGITS, 6, 28, seed) for seed in (0, 0, 1))
    assert first[0]["pixel_values"].shape == (3, 28, 28)
    assert [r["labels"] for r in first] == [r["labels"] for r in again]
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])


BAD = {
    "the data have 10 classes, prompt_cam has 3": ([("prompt_cam", {"classes": 3})], {}),
    "the data have 10 classes, Dinov2Model has none": ([("tcpa", {})], {}),
    "2000 train images asked for, testbed:digits has 1437": (
        [("prompt_cam", {"classes": 10})],
        {"images": 2000},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused_before_training(message, tmp_path):
    model, pixels = vision_model()
    patches, recipe = BAD[message]
    with pytest.raises(hap.PatchError, match=message):
        finetune(
            model, pixels, DIGITS, tmp_path / "out", patches, training.Recipe(**({"images": 64} | recipe))
        )
    assert not hap.active(model)


def test_a_vision_model_without_a_processor_is_refused(tmp_path):
    with pytest.raises(hap.PatchError, match="needs the image processor"):
        finetune(vision_model()[0], None, DIGITS, tmp_path / "out", [("prompt_cam", {"classes": 10})])
