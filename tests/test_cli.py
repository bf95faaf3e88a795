"""The command line: what it prints, how it fails, how fast it starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_attn_patch.cli import is_ours, main
from hf_attn_patch.cli.app import app
from hf_attn_patch.cli.models import load_model

METHODS = ("streaming", "moa", "head_gate", "neighborhood", "var")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def fails(capsys, *arguments: str) -> str:
    """What stands on stderr; the exit code must be 2 and no traceback may be shown."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in out + err
    return " ".join(err.split())


@pytest.fixture
def tiny(monkeypatch):
    """``testbed:…`` gives the two-layer models of these tests."""
    from hf_attn_patch import testbed
    from tests.eval_models import language_model, vision_model

    monkeypatch.setattr(
        testbed, "load", lambda name, dtype=None: vision_model() if name == "dinov2s" else language_model()
    )


def test_list_names_every_method():
    text = invoke("list")
    assert all(name in text for name in METHODS)
    entries = json.loads(invoke("list", "--json"))
    assert {e["name"] for e in entries} >= set(METHODS) and all(e["summary"] for e in entries)


def test_info_shows_formula_options_and_paper():
    text = invoke("info", "streaming")
    assert "sinks" in text and "256" in text and "2309.17453" in text and "Formula" in text
    record = json.loads(invoke("info", "streaming", "--json"))
    assert [o["name"] for o in record["options"]] == ["sinks", "window"] and record["arxiv"] == "2309.17453"


def test_sites_of_a_tiny_model():
    assert "model.layers.1.self_attn" in invoke("sites", "tiny:llama")
    record = json.loads(invoke("sites", "tiny:llama", "--json"))
    assert len(record["sites"]) == 2 and record["sites"][0]["num_kv_heads"] == 2


def test_plan_changes_nothing_and_says_what_would_change():
    text = invoke("plan", "tiny:llama", "streaming", "-o", "sinks=2", "-o", "window=8", "--layers", "1")
    assert "1 sites change, 1 stay" in text and "window=8" in text
    record = json.loads(invoke("plan", "tiny:llama", "streaming:window=8", "-o", "sinks=2", "--json"))
    assert record["config"] == {"sinks": 2, "window": 8} and len(record["sites"]) == 2


def test_eval_prints_a_table_writes_the_record_or_json(tiny, tmp_path):
    task, model = "perplexity:tokens=120,context=120,chunk=20", ["--model", "testbed:smollm2"]
    arguments = ["eval", task, *model, "--patch", "streaming:sinks=1,window=8", "-p", "head_gate:gates=0.5"]
    text = invoke(*arguments[:-2], "--out", str(tmp_path))
    assert "streaming(sinks=1, window=8)" in text and "dense" in text
    assert json.loads((tmp_path / "result.json").read_text())["task"]["name"] == "perplexity"
    record = json.loads(invoke(*arguments[:-2], "--json", "--limit", "2", "--seed", "5"))
    assert record["items"] == 2 and record["seed"] == 5 and len(record["variants"]) == 2


def test_tasks_and_testbed_and_env_are_listed():
    assert {t["name"] for t in json.loads(invoke("tasks", "--json"))} >= {
        "perplexity",
        "passkey",
        "agreement",
        "knn",
    }
    assert "tokens=2048" in invoke("tasks")
    assert "smollm2" in invoke("testbed") and "dinov2s" in {
        r["name"] for r in json.loads(invoke("testbed", "--json"))
    }
    facts = json.loads(invoke("env", "--json"))
    assert facts["packages"]["torch"] and facts["python"] and facts["torch"]["threads"] >= 1
    assert "transformers" in invoke("env")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["info", "streming"], "no patch is called 'streming'. Did you mean 'streaming'?"),
        (["plan", "tiny:llama", "streaming", "-o", "windw=8"], "no option 'windw'. Did you mean 'window'?"),
        (["plan", "tiny:llama", "streaming", "-o", "window=x"], "window='x' is not an int"),
        (["plan", "tiny:llama", "streaming", "-o", "window=0"], "window=0"),
        (["plan", "tiny:llama", "streaming:layers=0", "--layers", "1"], "layers is given twice"),
        (["plan", "tiny:llama", "streaming", "--layers", "7"], "layer 7 does not exist"),
        (["plan", "tiny:llama", "streaming", "--impl", "cuda"], "impl='cuda'"),
        (["plan", "tiny:no_such_family", "streaming"], "no_such_family"),
        (["sites", "testbed:smolm2"], "Did you mean 'smollm2'?"),
        (["sites", "./not-a-folder"], "no such folder"),
        (["sites", "not-a-hub-id"], "cannot be loaded"),
        (["eval", "perplexty", "-m", "tiny:llama"], "Did you mean 'perplexity'?"),
        (["eval", "perplexity:token=3", "-m", "tiny:llama"], "no option 'token'. Did you mean 'tokens'?"),
        (["eval", "perplexity", "-m", "tiny:llama"], "needs the tokenizer"),
        (["eval", "perplexity", "-m", "tiny:llama", "--dtype", "int8"], "dtype='int8'"),
        (["eval", "perplexity", "-m", "tiny:llama", "-p", "streaming:window"], "is not key=value"),
        (["demo", "--only", "audio"], "only='audio' is not one of language, vision"),
        (["testbed", "bert"], "no item is called 'bert'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_way_out(capsys, arguments, words):
    text = fails(capsys, *arguments)
    assert text.startswith("error: ") and words in text


def test_debug_shows_where_an_error_comes_from():
    from hf_attn_patch.errors import UnknownPatchError

    with pytest.raises(UnknownPatchError):
        main(["info", "streming", "--debug"])


def test_errors_of_others_are_never_hidden():
    try:
        int("x")
    except ValueError as error:
        assert not is_ours(error)
    with pytest.raises(ValueError, match="dtype") as caught:
        load_model("tiny:llama", "int8")
    assert is_ours(caught.value)


def test_local_folders_load_with_their_head(tmp_path):
    from tests.eval_models import language_model, vision_model

    language_model()[0].save_pretrained(tmp_path / "llama")
    vision_model()[0].save_pretrained(tmp_path / "vit")
    assert type(load_model(str(tmp_path / "llama"))[0]).__name__ == "LlamaForCausalLM"
    assert type(load_model(str(tmp_path / "vit"))[0]).__name__ == "Dinov2Model"


def test_a_checkpoint_with_a_classifier_keeps_it(tmp_path):
    import torch
    from transformers import ViTForImageClassification

    from hf_attn_patch.testbed.tiny import tiny_model

    with_head = ViTForImageClassification(tiny_model("vit").config)
    with_head.save_pretrained(tmp_path)
    found, _ = load_model(str(tmp_path))
    assert type(found) is ViTForImageClassification
    assert torch.equal(found.classifier.weight, with_head.classifier.weight)


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["testbed"], ["eval", "--help"]])
def test_commands_that_only_talk_do_not_import_torch(arguments):
    code = (
        "import sys, time; from hf_attn_patch.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = [m for m in ('torch', 'transformers', 'triton', 'numpy') if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "hf_attn_patch", "list"], capture_output=True, text=True, check=True
    )
    assert "streaming" in done.stdout


def test_demo_runs_end_to_end_on_tiny_models(tiny, tmp_path, monkeypatch, capsys):
    from hf_attn_patch.eval.demo import common, language

    small = common.Size(200, (300,), (0.2, 0.9), 192, 1, 4, 12, 6, 4, 0)
    monkeypatch.setattr(common.Size, "quick", classmethod(lambda cls: small))
    plan = {"alphas": [[64.0, 64.0], [64.0, 0.0]], "betas": [[0.0, 0.0], [0.0, 1.0]]}
    patches = {
        "streaming, 4 sinks": ("streaming", {"sinks": 4, "window": 32}),
        "streaming, no sinks": ("streaming", {"sinks": 0, "window": 32}),
        "moa, per-head plan": ("moa", {"plan": plan}),
    }
    monkeypatch.setattr(language, "choices", lambda model, tokenizer, folder: patches)
    from hf_attn_patch.eval.demo import vision

    windows = {
        "neighborhood 7 × 7": ("neighborhood", {"window": 2}),
        "neighborhood 11 × 11": ("neighborhood", {"window": 3}),
    }
    monkeypatch.setattr(vision, "choices", lambda: windows)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--out", str(tmp_path / "run")])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "undone" in text and "NOT undone" not in text and "neighborhood 7 × 7" in text
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [m["key"] for m in record["models"]] == ["smollm2", "dinov2s"] and record["schema_version"] == 1
    for model in record["models"]:
        assert model["undo"]["max_abs_difference"] == 0.0 and model["undo"]["undone"]
        for part in model["parts"]:
            assert all(row["ratios"]["density"] <= 1 for row in part["rows"])
    rows = {r["label"]: r["values"] for r in record["models"][0]["parts"][0]["rows"]}
    assert rows["streaming, 4 sinks"]["kv_bytes"] * 192 == pytest.approx(rows["dense"]["kv_bytes"] * 36)
    page = (tmp_path / "run" / "index.html").read_text()
    assert "SmolLM2" in page and "DINOv2" in page and "Undone without a trace" in page
