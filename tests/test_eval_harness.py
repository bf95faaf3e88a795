"""`eval.run` on live models: pairing, undo, errors before work, and the record."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval import Metric, SpecError, Task
from hf_attn_patch.eval.harness import resolve
from hf_attn_patch.eval.perplexity import Perplexity
from hf_attn_patch.patches.sparse.streaming import Streaming
from tests.eval_models import language_model, vision_model

TEXT = Perplexity(tokens=160, context=160, chunk=20)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


@dataclass
class Spy(Task):
    """Records when it is asked for items, and fails when told to."""

    fail: bool = False
    name = "spy"
    metrics = (Metric("score", "", True),)

    def items(self, model, processor, seed):
        self.asked = True
        return [1, 2, 3]

    def score(self, model, processor, items, reference, tick):
        if self.fail and hap.active(model):
            raise RuntimeError("broken task")
        return {"score": [float(i) for i in items]}


def test_dense_and_patched_on_the_same_items():
    model, tokenizer = language_model()
    result = evaluation.run(TEXT, model, tokenizer, patches=["streaming:sinks=1,window=8"])
    dense, patched = result.variants
    assert [v.label for v in result] == ["dense", "streaming(sinks=1, window=8)"]
    assert len(dense.scores["perplexity"]) == len(patched.scores["perplexity"]) == result.items == 8
    assert dense.difference == {} and dense.sites == []
    difference = patched.difference["perplexity"]
    assert difference.value == pytest.approx(
        patched.aggregates["perplexity"] - dense.aggregates["perplexity"]
    )
    assert difference.low <= difference.value <= difference.high and difference.value != 0
    assert [s["layer"] for s in patched.sites] == [0, 1] and patched.sites[0]["executor"]


def test_scores_are_those_of_the_patch_applied_by_hand():
    model, tokenizer = language_model()
    result = evaluation.run(TEXT, model, tokenizer, patches=["streaming:sinks=1,window=8"])
    with hap.patched(model, "streaming", sinks=1, window=8):
        by_hand = evaluation.run(TEXT, model, tokenizer)
    assert result.variants[1].scores == by_hand["dense"].scores


def test_a_neutral_patch_changes_nothing_that_matters():
    model, tokenizer = language_model()
    result = evaluation.run(TEXT, model, tokenizer, patches=["streaming:window=100000"])
    first, second = (v.scores["perplexity"] for v in result)
    assert np.allclose(first, second, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model, tokenizer = language_model()
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    before, attention = logits(model), model.config._attn_implementation
    evaluation.run(TEXT, model, tokenizer, patches=["streaming:window=8", "head_gate"][:1])
    assert torch.equal(logits(model), before) and not hap.active(model)
    assert model.config._attn_implementation == attention
    assert [m.training for m in model.modules()] == modes


def test_a_task_that_fails_half_way_leaves_no_patch():
    model, _ = language_model()
    before = logits(model)
    with pytest.raises(RuntimeError, match="broken task"):
        evaluation.run(Spy(fail=True), model, patches=["streaming"])
    assert not hap.active(model) and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "patches", [["streaming:window=0"], ["streaming:layers=9"], ["streaming", "neighborhood"], ["streming"]]
)
def test_refusals_come_before_any_work(patches):
    model, _ = language_model()
    spy = Spy()
    with pytest.raises(hap.PatchError):
        evaluation.run(spy, model, patches=patches)
    assert not hasattr(spy, "asked") and not hap.active(model)


def test_patches_in_every_form():
    model, tokenizer = language_model()
    forms = {
        "text": "streaming:window=8",
        "object": Streaming(window=8),
        "pair": ("streaming", {"window": 8}),
        "object with scope": (Streaming(window=8), {"layers": "0-1"}),
    }
    result = evaluation.run(TEXT, model, tokenizer, patches=forms)
    scores = [v.scores["perplexity"] for v in result][1:]
    assert all(s == scores[0] for s in scores)
    assert [v.label for v in result] == ["dense", *forms]


@pytest.mark.parametrize(
    "patches, words",
    [
        (["streaming", "streaming"], "two variants are called 'streaming'"),
        ({"dense": "streaming"}, "two variants are called 'dense'"),
        ([3], "3 is not a patch"),
    ],
)
def test_lists_of_patches_that_make_no_sense(patches, words):
    with pytest.raises(SpecError, match=words):
        resolve(patches)


def test_compare_with_a_patch_instead_of_dense():
    model, tokenizer = language_model()
    patches = {"a": "streaming:window=8", "b": "streaming:window=16"}
    result = evaluation.run(TEXT, model, tokenizer, patches=patches, compare="a")
    assert result.baseline.label == "a" and not result["a"].difference
    value = result["dense"].aggregates["perplexity"] - result["a"].aggregates["perplexity"]
    assert result["dense"].difference["perplexity"].value == pytest.approx(value)
    with pytest.raises(SpecError, match="none of the variants: dense, a"):
        evaluation.run(TEXT, model, tokenizer, patches={"a": "streaming"}, compare="c")


def test_an_active_patch_is_measured_and_named():
    model, tokenizer = language_model()
    with hap.patched(model, "streaming", window=8):
        result = evaluation.run(TEXT, model, tokenizer)
        assert len(hap.active(model)) == 1
    plain = evaluation.run(TEXT, model, tokenizer)
    assert "streaming" in result.notes[0].lower() and "dense included" in result.notes[0]
    assert result["dense"].scores != plain["dense"].scores and plain.notes == []


def test_limit_takes_the_first_items():
    model, tokenizer = language_model()
    whole, part = (evaluation.run(TEXT, model, tokenizer, limit=n) for n in (None, 3))
    assert part.items == 3 and part["dense"].scores["perplexity"] == whole["dense"].scores["perplexity"][:3]
    with pytest.raises(ValueError, match="limit=0"):
        evaluation.run(TEXT, model, tokenizer, limit=0)


def test_passkey_goes_through_the_patched_cache():
    model, tokenizer = language_model()
    result = evaluation.run(
        "passkey:lengths=[300],depths=[0.2,0.9],max_new_tokens=3",
        model,
        tokenizer,
        patches=["streaming:window=16"],
    )
    assert list(result["dense"].by_group["accuracy"]) == ["300"]
    assert len(result.variants[1].answers) == 2 and result.variants[1].answers != result["dense"].answers


def test_vision_tasks_on_a_patched_vit():
    model, pixels = vision_model()
    result = evaluation.run(
        "agreement:count=4",
        model,
        pixels,
        patches={"all": "neighborhood:window=4", "one": "neighborhood:window=1"},
    )
    assert result["dense"].aggregates["cls_cosine"] == pytest.approx(1)
    assert result["all"].aggregates["patch_cosine"] == pytest.approx(1, abs=1e-4)
    assert result["one"].aggregates["patch_cosine"] < 0.999


def test_the_record_says_everything_and_is_json(tmp_path):
    model, tokenizer = language_model()
    result = evaluation.run(
        TEXT,
        model,
        tokenizer,
        patches=["streaming:window=8"],
        seed=3,
        out=tmp_path / "deep" / "run",
        command="a command",
    )
    record = json.loads((tmp_path / "deep" / "run" / "result.json").read_text())
    assert record == json.loads(result.to_json())
    assert record["schema_version"] == 1
    assert record["task"] == {
        "name": "perplexity",
        "config": {"tokens": 160, "context": 160, "stride": None, "chunk": 20, "text": None, "answers": None},
    }
    assert record["seed"] == 3 and record["command"] == "a command" and record["compare"] == "dense"
    assert record["model"]["class"] == "LlamaForCausalLM" and record["model"]["dtype"] == "float32"
    environment = record["environment"]
    assert {"python", "platform", "cpu_count", "git", "hf_attn_patch"} <= set(environment)
    assert environment["packages"]["torch"] and environment["packages"]["transformers"]
    dense, patched = record["variants"]
    assert dense["patch"] is None and patched["patch"] == {"name": "streaming", "options": {"window": 8}}
    assert set(patched["difference"]["perplexity"]) == {"value", "low", "high", "significant"}
    assert {"path", "layer", "part", "executor", "reason", "density"} == set(patched["sites"][0])
    assert 0 < patched["sites"][0]["density"] < 1


def test_numbers_json_does_not_have_become_null():
    from hf_attn_patch.eval.result import jsonable

    assert jsonable({"a": float("nan"), "b": [np.float32(1.5), np.int64(2)], "c": float("inf")}) == {
        "a": None,
        "b": [1.5, 2],
        "c": None,
    }


def test_printing_shows_numbers_and_intervals():
    model, tokenizer = language_model()
    result = evaluation.run(TEXT, model, tokenizer, patches=["streaming:window=8"])
    text = str(result)
    assert (
        f"{result['dense'].aggregates['perplexity']:.2f}" in text
        and "streaming(window=8)" in text
        and "[" in text
    )


def test_a_task_with_too_few_scores_is_named():
    model, _ = language_model()

    class Short(Spy):
        def score(self, *args):
            return {"score": [1.0]}

    with pytest.raises(ValueError, match="gave no 3 numbers for score"):
        evaluation.run(Short(), model)


def test_labels_with_brackets_are_printed_as_they_are():
    model, tokenizer = language_model()
    result = evaluation.run(TEXT, model, tokenizer, patches={"gate [bold]x[/bold]": "streaming:window=8"})
    assert "gate [bold]x[/bold]" in str(result)
