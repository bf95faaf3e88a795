"""`hap.calibrate`: from model and data to a plan that a patch takes; interrupted, refused, from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.calibration import calibrator, influence
from hf_attn_patch.calibration.calibrator import CalibrationError
from hf_attn_patch.calibration.data import needle, records, samples
from hf_attn_patch.calibration.moa import MoaCalibrator, shape_of
from hf_attn_patch.errors import CompositionError
from hf_attn_patch.model.head_sets import read as read_head_set
from tests.eval_models import language_model

SMALL = dict(
    lengths=(256, 512),
    samples=(2, 2),
    validate_samples=2,
    validate_plans=2,
    intervals=2,
    block=32,
    density=0.5,
)


@pytest.fixture(scope="module")
def small():
    return language_model()


@pytest.fixture(scope="module")
def found(small):
    model, tokenizer = small
    return hap.calibrate(model, "moa", tokenizer=tokenizer, **SMALL)


def test_a_plan_fits_its_model_keeps_its_bound_and_patches_it(small, found):
    model, tokenizer = small
    assert np.shape(found.plan["alphas"]) == shape_of(model, "test") == (2, 2)
    for length, density in found.report["density"].items():
        assert 0.45 - 1e-6 <= density <= 0.5 + 1e-6, length
    ids = needle(tokenizer, 500, 0.5, 0).ids[None]
    with hap.patched(model, "moa", **found.options, block=32, smallest=32, sinks=32, length=512) as handle:
        model(ids)
        assert handle.report().density < 0.9, "of the causal half; a cache keeps half of all tokens"


def test_the_spans_that_run_are_those_that_were_searched(found):
    """Mean share of a cache of 512 tokens, by the runtime's own rounding."""
    from hf_attn_patch.patches.sparse.moa import span_size

    plan = found.plan
    spans = [
        span_size(a, b, 512, block=32, smallest=32)
        for row in zip(plan["alphas"], plan["betas"])
        for a, b in zip(*row)
    ]
    assert np.mean(spans) / 512 == pytest.approx(found.report["density"]["512"], abs=1e-9)


def test_the_model_is_left_as_it_was(small):
    model, tokenizer = small
    model.train()
    before = [p.requires_grad for p in model.parameters()]
    keys = list(model.state_dict())
    hap.calibrate(model, "head_scores", tokenizer=tokenizer, objective="gradient", lengths=(256,), samples=2)
    assert model.training and [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert list(model.state_dict()) == keys and hap.active(model) == []
    model.eval()


def test_an_interrupted_calibration_goes_on_where_it_stopped(small, found, tmp_path, monkeypatch):
    model, tokenizer = small
    real, calls = influence.profile, []

    def breaks(model, chosen, block, answer_rows):
        calls.append(chosen)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, chosen, block, answer_rows)

    monkeypatch.setattr(influence, "profile", breaks)
    with pytest.raises(KeyboardInterrupt):
        hap.calibrate(model, "moa", tokenizer=tokenizer, out=tmp_path / "plan.json", **SMALL)
    assert hap.active(model) == [] and not (tmp_path / "plan.json").exists()
    again = hap.calibrate(model, "moa", tokenizer=tokenizer, out=tmp_path / "plan.json", **SMALL)
    assert len(calls) == 5, "three finished samples are not profiled again, the fourth is"
    assert again.plan == found.plan
    assert json.loads((tmp_path / "plan.json").read_text()) == found.plan
    assert (tmp_path / "plan.plan.svg").read_text().startswith("<?xml")
    assert hap.plan(model, "moa", plan=str(tmp_path / "plan.json"))


def test_pieces_of_another_calibration_are_refused(small, tmp_path):
    model, tokenizer = small
    options = dict(objective="gradient", lengths=(256,), samples=1)
    hap.calibrate(model, "head_scores", tokenizer=tokenizer, out=tmp_path / "h.json", **options)
    with pytest.raises(CalibrationError, match=r"another calibration \(different: options\). Delete it"):
        hap.calibrate(
            model, "head_scores", tokenizer=tokenizer, out=tmp_path / "h.json", **{**options, "samples": 2}
        )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mao", {}, "nothing calibrates 'mao'. Did you mean 'moa'"),
        ("moa", {"densty": 0.5}, "no option 'densty'. Did you mean 'density'"),
        ("moa", {"density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
        ("moa", {"lengths": (512, 256)}, "ascending"),
        ("moa", {"samples": (1,)}, "one count >= 1 per length"),
        ("moa", {**SMALL, "density": 0.02}, "no choice of rules meets the density bounds.*the rules reach"),
        ("head_scores", {"objective": "beauty"}, "objective='beauty' must be one of retrieval"),
    ],
)
def test_bad_input_says_what_was_found_and_the_way_out(small, name, options, message):
    model, tokenizer = small
    with pytest.raises(CalibrationError, match=message):
        hap.calibrate(model, name, tokenizer=tokenizer, **options)
    assert hap.active(model) == []


def test_a_patched_model_is_not_calibrated(small):
    model, tokenizer = small
    with hap.patched(model, "streaming", window=8), pytest.raises(CompositionError, match="Remove it first"):
        hap.calibrate(model, "moa", tokenizer=tokenizer, **SMALL)


def test_data_without_answers_are_refused_or_answered_by_the_model(small, tmp_path):
    model, tokenizer = small
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a" * 200 + str(i)}) for i in range(3)))
    with pytest.raises(CalibrationError, match="a record has no answer.*answers=model"):
        samples(file, model, tokenizer, 256, 2, answers="given")
    got = samples(file, model, tokenizer, 256, 2, answers="model", new=8)
    with torch.no_grad():
        for sample in got:
            said = model(sample.ids[None]).logits[0, sample.start - 1 : -1].argmax(-1)
            assert torch.equal(said, sample.ids[sample.start :]), "answers are the model's own, greedy"


@pytest.mark.parametrize(
    "text, message",
    [("{", "line 1: not JSON"), ('{"question": "x"}', "no prompt and no text"), ("", "no record")],
)
def test_files_that_are_no_data(tmp_path, text, message):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        records(file)


def test_a_loss_that_is_nan_stops_and_says_which_layer(small):
    model, tokenizer = small
    sample = needle(tokenizer, 256, 0.5, 0)

    def poison(grad):
        return grad * float("nan")

    real = influence.answer_loss

    def broken(model, sample):
        handle = model.model.layers[1].register_forward_hook(
            lambda m, a, out: (out.register_hook(poison), out)[1]
        )
        try:
            return real(model, sample)
        finally:
            handle.remove()

    influence.answer_loss = broken
    try:
        with calibrator.as_it_is(model), pytest.raises(ValueError, match="gradient of layer 0 is not finite"):
            influence.profile(model, [sample])
    finally:
        influence.answer_loss = real
    assert hap.active(model) == []


@pytest.mark.parametrize("kind, heads", [("q", 4), ("kv", 2)])
def test_head_scores_are_a_head_set_that_methods_read(small, kind, heads):
    model, tokenizer = small
    made = hap.calibrate(
        model, "head_scores", tokenizer=tokenizer, objective="gradient", kind=kind, lengths=(256,), samples=2
    )
    chosen = read_head_set(made.plan, "test")
    scores = [h.score for h in chosen.heads]
    assert len(chosen.heads) == 2 * heads and scores == sorted(scores, reverse=True)
    assert {h.kind for h in chosen.heads} == {kind} and chosen.objectives == ("gradient",)
    with hap.patched(model, "retrieval_mask", **made.options, top=1) as handle:
        assert handle


def test_the_gradient_score_is_the_derivative_by_a_gate_on_the_head(small):
    _, tokenizer = small
    double = language_model()[0].double()
    made = hap.calibrate(
        double,
        "head_scores",
        tokenizer=tokenizer,
        objective="gradient",
        lengths=(256,),
        samples=1,
        answers="given",
    )
    sample = samples(None, double, tokenizer, 256, 1, answers="given")[0]
    best, step = made.plan["heads"][0], 1e-2  # RMSNorm computes in float32: smaller steps drown
    losses = []
    for gate in (1 - step, 1 + step):
        with hap.patched(double, "head_gate", layers=[best["layer"]], heads=[best["head"]], gate=gate):
            losses.append(float(influence.answer_loss(double, sample).detach()))
    assert abs(losses[1] - losses[0]) / (2 * step) == pytest.approx(best["score"], rel=1e-2)


def test_the_window_loss_is_that_of_closing_one_kv_head(small):
    model, tokenizer = small
    options = dict(objective="window_loss", kind="kv", lengths=(512,), samples=1, answers="given")
    made = hap.calibrate(model, "head_scores", tokenizer=tokenizer, **options)
    sample = samples(None, model, tokenizer, 512, 1, answers="given")[0]
    best = made.plan["heads"][0]
    with torch.no_grad():
        dense = float(influence.answer_loss(model, sample))
        group = [2 * best["head"], 2 * best["head"] + 1]
        with hap.patched(model, "streaming", layers=[best["layer"]], heads=group, sinks=4, window=256):
            closed = float(influence.answer_loss(model, sample))
    assert best["score"] == pytest.approx(closed - dense, rel=1e-3) and best["score"] > 0


def test_the_command_line_writes_plan_report_and_pictures(tmp_path, capsys, small, monkeypatch):
    from hf_attn_patch import cli
    from hf_attn_patch.cli import models

    monkeypatch.setattr(models, "load_model", lambda name, dtype, takes: small)
    spec = "moa:lengths=[256,512],samples=[1,1],validate_samples=2,validate_plans=1,intervals=1,block=32"
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["calibrate", spec, "--model", "x", "-o", str(tmp_path / "p.json"), "--option", "density=0.4"]
        )
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert "density" in text and "--patch moa:plan=" in text
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert report["bound"] == 0.4 and max(report["density"].values()) <= 0.4 + 1e-6
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", "moa", "--model", "x", "--data", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err


def test_moa_names_a_plan_of_another_model(small, found):
    model, _ = small
    other = {**found.plan, "model": "some/other-model"}
    model.config._name_or_path = "me/this-model"
    try:
        with (
            pytest.warns(UserWarning, match="plan was made for some/other-model"),
            hap.patched(model, "moa", plan=other),
        ):
            pass
    finally:
        model.config._name_or_path = ""


def test_calibrators_are_listed_without_importing_them():
    assert {"moa", "head_scores"} <= set(calibrator.available())
    assert issubclass(calibrator.get("moa"), MoaCalibrator)
