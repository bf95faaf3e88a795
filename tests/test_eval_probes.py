"""Tasks that train a head on the features of each variant, the classifier task, and the cache of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval import feature_cache
from hf_attn_patch.eval.classify import Classify, class_numbers
from hf_attn_patch.eval.feature_cache import encoded, key
from hf_attn_patch.eval.features import encode
from hf_attn_patch.eval.labelled import Labelled, labelled
from hf_attn_patch.eval.probes import AttentiveProbe, LinearProbe, item_scores
from hf_attn_patch.testbed import scenes
from hf_attn_patch.testbed.pixels import Pixels
from tests.eval_models import vision_model

DIGITS = {"data": "testbed:digits", "train": 200, "test": 60, "batch": 50}
NEUTRAL, LOCAL = "neighborhood:window=[4,4]", "neighborhood:window=[1,1]"


def classifier(**config):
    """A random ViT with ten classes for the digits' 8 x 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8
    )
    model = ViTForImageClassification(
        ViTConfig(**sizes, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.3, **config)
    )
    return model.eval(), Pixels(size=8, mean=(0.5,), std=(0.5,))


# -- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [LinearProbe(**DIGITS), AttentiveProbe(**DIGITS, steps=60, lr=1e-2, options={"queries": 4})]
)
def test_probe_reads_digits_from_random_features_and_pairs_dense_with_patched(task):
    model, pixels = vision_model()
    result = evaluation.run(task, model, pixels, patches={"same": NEUTRAL, "local": LOCAL})
    dense, same, local = (v.scores["accuracy"] for v in result.variants)
    assert np.mean(dense) > 0.4  # chance is 0.1
    assert dense == same and dense != local  # every variant has a head of its own, from its own features
    assert set(result.variants[0].by_group["accuracy"]) <= {str(n) for n in range(10)}
    assert not hap.active(model)


def test_probe_gives_the_same_number_twice_and_another_for_another_seed():
    model, pixels = vision_model()
    task = AttentiveProbe(**DIGITS, steps=30)
    first, again, other = (
        evaluation.run(task, model, pixels, seed=seed)["dense"].scores["accuracy"] for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_probe_of_scenes_scores_groups_or_rankings_of_objects():
    model, pixels = vision_model()
    some = {"train": 24, "test": 6}
    one = evaluation.run(LinearProbe(**some), model, pixels)
    assert one.metrics[0].name == "accuracy" and set(one.variants[0].by_group["accuracy"]) <= set(
        scenes.GROUPS
    )
    several = evaluation.run(AttentiveProbe(**some, labels="objects", steps=5), model, pixels)
    ranked = several["dense"].scores["ranking_precision"]
    assert len(ranked) == 6 and all(0 < r <= 1 for r in ranked)


def test_ranking_precision_is_one_when_all_labels_are_on_top():
    truth = Labelled(None, [[0, 2], [0, 2]], ["a", "b", "c", "d"])
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    assert item_scores(logits, truth) == pytest.approx([1.0, (1 + 2 / 3) / 2])


def test_prefix_gives_the_head_one_token_more():
    cls, patches = torch.zeros(2, 4), torch.ones(2, 9, 4)
    assert AttentiveProbe(prefix=True).reads(cls, patches).shape == (2, 10, 4)
    assert AttentiveProbe().reads(cls, patches).shape == (2, 9, 4)
    assert LinearProbe(token="both").reads(cls, patches).tolist() == [[0.0] * 4 + [1.0] * 4] * 2


# -- data -------------------------------------------------------------------------------------------------------------


def test_test_digits_are_those_the_testbeds_model_was_not_trained_on():
    from hf_attn_patch.testbed import digits_vit

    train, test = labelled("t", "testbed:digits", 50, 360, seed=3)
    held_out = {p.numpy().tobytes() for p in digits_vit.digits("test")[0]}
    values = digits_vit.preprocess(test.images)["pixel_values"]
    assert len({p.numpy().tobytes() for p in values} & held_out) == len(held_out)
    assert train.images.shape == (50, 3, 8, 8) and 0 <= train.images.min() and train.images.max() <= 1
    assert sorted(test.labels) == sorted(digits_vit.digits("test")[1].tolist())


def test_scenes_know_groups_objects_and_boxes():
    _, test = labelled("t", "testbed:scenes", 0, 4, seed=0, labels="objects")
    rows = scenes.build("test", 4, seed=0)
    for row, labels, boxes in zip(rows, test.labels, test.boxes):
        assert {test.names[n] for n in labels} == {o["name"] for o in row["objects"]}
        assert [list(box[:4]) for box in boxes] == [o["box"] for o in row["objects"]]
    assert test.targets().sum(1).tolist() == [len(labels) for labels in test.labels]


def pictures(folder, classes, count):
    from PIL import Image

    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 12), color=(80 * number, 9 * i, 0)).save(folder / name / f"{i}.png")


def test_folders_are_classes_and_no_image_is_in_both_halves(tmp_path):
    pictures(tmp_path, ["cat", "dog"], 6)
    train, test = labelled("t", str(tmp_path), 8, 4, seed=0)
    assert train.names == test.names == ["cat", "dog"] and len(train) == 8 and len(test) == 4
    colours = [{im.getpixel((0, 0)) for im in part.images} for part in (train, test)]
    assert len(colours[0]) == 8 and not colours[0] & colours[1]
    assert all(im.getpixel((0, 0))[0] == 80 * n for im, n in zip(test.images, test.labels))
    with pytest.raises(ValueError, match="13 images asked for, .* has 12"):
        labelled("t", str(tmp_path), 9, 4, seed=0)


def test_folders_with_splits_keep_them_and_refuse_classes_without_training_images(tmp_path):
    pictures(tmp_path / "train", ["cat"], 3)
    pictures(tmp_path / "val", ["cat", "dog"], 3)
    with pytest.raises(ValueError, match="no training image of dog"):
        labelled("t", str(tmp_path), 3, 6, seed=0)
    _, test = labelled("t", str(tmp_path), 0, 6, seed=0)
    assert sorted(test.names) == ["cat", "dog"] and len(test) == 6


# -- classify ---------------------------------------------------------------------------------------------------------


def test_classify_is_the_accuracy_of_the_models_own_head():
    model, pixels = classifier()
    task = Classify(test=80, batch=33)
    result = evaluation.run(task, model, pixels, patches={"same": NEUTRAL, "local": LOCAL})
    items = task.items(model, pixels, 0)
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([p for p, _, _ in items])).logits
    truth = torch.tensor([number for _, number, _ in items])
    dense, same, local = (v.scores for v in result.variants)
    assert dense["top1"] == (logits.argmax(-1) == truth).float().tolist() == same["top1"]
    assert dense["top5"] == (logits.topk(5).indices == truth[:, None]).any(-1).float().tolist()
    assert (dense["top1"], dense["top5"]) != (local["top1"], local["top5"])


def test_a_model_inside_peft_is_classified_and_read_like_the_model():
    peft = pytest.importorskip("peft")
    model, pixels = classifier()
    values = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))  # interpolated positions
    plain = (
        evaluation.run(Classify(test=20, size=12), model, pixels)["dense"].scores,
        encode(model, values, 2),
    )
    inside = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # starts as the model
    found = (
        evaluation.run(Classify(test=20, size=12), inside, pixels)["dense"].scores,
        encode(inside, values, 2),
    )
    assert found[0] == plain[0] and all(torch.equal(a, b) for a, b in zip(found[1], plain[1]))


def test_classes_are_matched_by_name_before_number():
    model, _ = classifier(id2label={i: n for i, n in enumerate(["tench, tinca", "dog", *"abcdefgh"])})
    assert class_numbers(model, ["dog", "Tinca"], {0, 1}) == {0: 1, 1: 0}
    with pytest.raises(ValueError, match="the model has no class horse; it has 10: tench"):
        class_numbers(model, ["dog", "horse"], {0, 1})
    assert class_numbers(classifier()[0], ["zero", "one"], {0, 1}) == {0: 0, 1: 1}  # LABEL_0, LABEL_1, …


def test_classes_of_a_patch_are_classified_by_number():
    model, pixels = vision_model()
    with hap.patch(model, "prompt_cam", classes=10):
        task = Classify(test=12, batch=5)
        found = evaluation.run(task, model, pixels)["dense"].scores["top1"]
        values, truth = zip(*[(p, n) for p, n, _ in task.items(model, pixels, 0)])
        with torch.no_grad():
            guesses = model(pixel_values=torch.stack(values)).logits.argmax(-1).tolist()
        assert found == [float(a == b) for a, b in zip(guesses, truth)]
    with (
        hap.patch(model, "prompt_cam", classes=4),
        pytest.raises(ValueError, match="the patch was trained for 4"),
    ):
        evaluation.run(task, model, pixels)


# -- cache ------------------------------------------------------------------------------------------------------------


def test_features_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    model, _ = vision_model()
    pixels = torch.rand(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    first = encoded(model, pixels, 2, str(tmp_path))
    monkeypatch.setattr(feature_cache, "encode", lambda *_: pytest.fail("encoded again"))
    second = encoded(model, pixels, 3, str(tmp_path))
    for a, b, c in zip(first, second, encode(model, pixels, 2)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_key_changes_with_weights_patch_options_layers_and_pixels_and_only_with_them():
    model, _ = vision_model()
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    keys = [key(model, pixels)]
    for options in ({"window": (1, 1)}, {"window": (3, 3)}, {"window": (1, 1), "layers": [0]}):
        with hap.patch(model, "neighborhood", **options) as handle:
            keys.append(key(model, pixels))
            with handle.disabled():
                assert key(model, pixels) == keys[0]
    assert key(model, pixels) == keys[0]
    keys.append(key(model, pixels + 1e-6))
    keys.append(key(model, pixels.reshape(2, 3, 28, 112)))
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    keys.append(key(model, pixels))
    assert len(set(keys)) == len(keys)


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "unknown option 'querys'; options: queries, reduce": lambda: AttentiveProbe(options={"querys": 3}),
    "no head is called 'eq'": lambda: AttentiveProbe(head="eq"),
    "lr=0": lambda: AttentiveProbe(lr=0),
    "token='x'": lambda: LinearProbe(token="x"),
    "train=1 must be at least 2": lambda: LinearProbe(train=1),
    "labels=objects needs data=testbed:scenes": lambda: run(LinearProbe(data="testbed:digits", labels="objects")),
    "1500 train images asked for, testbed:digits has 1437": lambda: run(LinearProbe(data="testbed:digits", train=1500)),
    "test=0": lambda: Classify(test=0),
    "Dinov2Model has no classifier": lambda: run(Classify(test=3)),
    "is no file or folder": lambda: run(LinearProbe(data="nobody/nothing-here")),
}  # fmt: skip


def run(task):
    model, pixels = vision_model()
    return evaluation.run(task, model, pixels)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_a_reason(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_tasks_are_known_and_take_options_as_text():
    task = evaluation.parse_task_spec(
        'attentive_probe:head=acmil,options={"branches":3,"hide":0},labels=objects'
    )
    assert task.options == {"branches": 3, "hide": 0} and task.metrics[0].name == "ranking_precision"
    assert {"linear_probe", "attentive_probe", "classify"} <= set(evaluation.available())
