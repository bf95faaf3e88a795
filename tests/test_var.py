"""`var`: its presets, its sink dimensions, what it refuses (how it edits: test_golden, test_context)."""

from __future__ import annotations

import json

import pytest

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import ConfigError, ModelMismatchError
from hf_attn_patch.patches.grounding.sink_dims import SINK_DIMS, SOURCES
from hf_attn_patch.patches.grounding.var import PRESETS, Preset

from .small import close, differ, inputs_of, model_of, output, refused, untouched

TINY = {"dims": [0, 3], "tau": 1.2, "min_mass": 0.01, "first_layer": 0}  # a random model has no true sinks


def build(**options):
    return registry.build("var", options)


@pytest.mark.parametrize("name, rho, move, skip_last", [
    ("code", 0.5, 0.4, False), ("paper", 0.5, 0.6, True),
    ("paper_vqa", 0.2, 0.6, True), ("paper_vision", 0.1, 0.6, True),
])  # fmt: skip
def test_presets_are_the_released_code_and_the_paper(name, rho, move, skip_last):
    assert build(dims=[0], preset=name).chosen == Preset(rho, move, skip_last)


def test_what_is_set_wins_over_the_preset():
    assert build(dims=[0]).chosen == PRESETS["code"]
    chosen = build(dims=[0], preset="paper", rho=0.9, move=0.0, skip_last=False).chosen
    assert chosen == Preset(0.9, 0.0, False)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_is_the_same_edit_as_its_values(preset):
    model = model_of("llava")
    inputs, values = inputs_of(model), PRESETS[preset]
    with hap.patched(model, "var", **TINY, preset=preset):
        named = output(model, inputs)
    layers = [0] if values.skip_last else [0, 1]
    with hap.patched(model, "var", **TINY, rho=values.rho, move=values.move, layers=layers):
        close(named, output(model, inputs))


def test_code_and_paper_differ():
    model = model_of("llava")
    found = []
    for preset in ("code", "paper"):
        with hap.patched(model, "var", **{**TINY, "rho": 0.9}, preset=preset):
            found.append(output(model, inputs_of(model)))
    assert differ(*found)


def test_the_table_names_dimensions_and_where_each_is_from():
    assert build(dims="llama-2-7b")._dims == (1415, 2533) and build(dims="llama-2-13b")._dims == (2100, 4743)
    assert set(SOURCES) == set(SINK_DIMS)
    assert all(dims and source.startswith(("READ", "UNVERIFIED")) for dims, source in SOURCES.values())


def test_a_calibration_is_kept_with_an_adapter_not_its_path(tmp_path):
    file = tmp_path / "dims.json"
    file.write_text(json.dumps({"model": "", "hidden_size": 64, "dims": [0, 3]}))
    model = model_of("llava")
    with hap.patched(model, "var", **{**TINY, "dims": str(file)}) as handle:
        expected = output(model, inputs_of(model))
        handle.save(tmp_path / "adapter")
    file.unlink()
    loaded = hap.load(model, tmp_path / "adapter")
    close(output(model, inputs_of(model)), expected)
    loaded.remove()
    with hap.patched(model, "var", **TINY):
        close(output(model, inputs_of(model)), expected)


@pytest.mark.parametrize("dims, words", [
    ({"dims": []}, ["found no sink dimension", "another method"]), ({"heads": []}, ["no list of numbers"]),
    ({"dims": [0.5]}, ["no list of numbers"]),
    ("no-such-model", ["'no-such-model'", "llama-2-7b", "calibrate sink_dims"]),
    ({"dims": [-1]}, [">= 0"]),
], ids=str)  # fmt: skip
def test_without_a_sink_dimension_var_is_refused(dims, words):
    with refused(ConfigError, "var", *words):
        build(dims=dims)


@pytest.mark.parametrize("text, words", [("{", ["not valid JSON"]), ("[1]", ["holds list"])])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with refused(ConfigError, "var", "x.json", *words):
        build(dims=str(tmp_path / "x.json"))


def test_dimensions_of_another_model_are_refused_or_noted(monkeypatch):
    model = model_of("llava")
    with (
        untouched(model),
        refused(ModelMismatchError, "hidden states of 4096", "has 64", "calibrate sink_dims"),
    ):
        hap.patch(model, "var", dims={"dims": [0], "hidden_size": 4096}, tau=2.0)
    monkeypatch.setattr(model.config, "_name_or_path", "org/this-model")
    plan = hap.plan(model, "var", **{**TINY, "dims": {"dims": [0], "hidden_size": 64, "model": "org/other"}})
    assert plan.warnings == ["the sink dimensions were calibrated for other, this model is this-model"]


def test_models_without_image_keys_are_refused_before_anything_changes():
    for family, words in (
        ("llama", ["names no image token"]),
        ("mllama", ["cross-attention", "placeholder"]),
    ):
        model = model_of(family)
        with untouched(model), refused(ModelMismatchError, "var", *words):
            hap.patch(model, "var", dims=[0], tau=2.0)


def test_a_threshold_that_no_token_can_reach_is_noted():
    notes = hap.plan(model_of("llava"), "var", **{**TINY, "tau": 20.0}).warnings
    assert notes == ["tau=20 is out of reach: with 64 channels no ratio exceeds 8, so nothing will be edited"]
    assert hap.plan(model_of("llava"), "var", **{**TINY, "tau": 7.9}).warnings == []


def test_a_range_without_the_last_layer_that_is_empty_is_noted():
    notes = hap.plan(model_of("llava"), "var", **{**TINY, "first_layer": 1}, preset="paper").warnings
    assert notes == [
        "first_layer=1, but the model has 2 layers, the last one left alone: nothing will be edited"
    ]
