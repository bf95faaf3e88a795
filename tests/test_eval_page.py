"""`hf-attn-patch eval --out`: the page, the needle map, and the options that all tasks share."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hf_attn_patch import eval as evaluation
from hf_attn_patch.cli.evaluate import make_task
from hf_attn_patch.eval.passkey import Passkey
from hf_attn_patch.eval.ruler import Ruler
from hf_attn_patch.eval.specs import SpecError
from hf_attn_patch.report import evaluation as page
from hf_attn_patch.report.needle_map import needle_map
from tests.eval_models import language_model
from tests.test_cli import fails, invoke, tiny  # noqa: F401

PASSKEY = Passkey(lengths=(300, 400), depths=(0.2, 0.8), max_new_tokens=3)


def test_eval_writes_a_page_and_says_where(tiny, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    text = invoke(
        "eval", "passkey:depths=[0.2,0.8],max_new_tokens=3", "-m", "testbed:smollm2", "--lengths", "300,400",
        "--batch-size", "2", "--limit", "3", "-p", "streaming:sinks=1,window=16", "--out", str(folder),
    )  # fmt: skip
    assert str(folder / "result.json") in text.replace("\n", "") and "index.html" in text
    record = json.loads((folder / "result.json").read_text())
    assert record["items"] == 3 and record["task"]["config"]["lengths"] == [300, 400]
    assert record["task"]["config"]["batch_size"] == 2
    html = (folder / "index.html").read_text()
    for words in (
        "dense beside patched",
        "streaming(sinks=1, window=16)",
        "Needle map",
        "Answers side by side",
        "By group",
    ):
        assert words in html
    assert (
        record["facts"][0]["expected"][0] in html
        and "<script" not in html
        and "http" not in html.split("<svg")[0]
    )


def test_answers_of_a_model_are_text_and_never_markup():
    model, tokenizer = language_model()
    record = evaluation.run(PASSKEY, model, tokenizer, command="x < y").to_dict()
    record["variants"][0]["answers"][0] = "<script>alert(1)</script>"
    html = page.render(record)
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html and "x &lt; y" in html


def test_the_needle_map_has_a_cell_per_depth_and_length_with_its_mean():
    record = {
        "metrics": [{"name": "accuracy", "unit": "share"}],
        "facts": [{"length": n, "depth": d} for n in (100, 200) for d in (0.0, 1.0) for _ in range(2)],
        "variants": [
            {"label": "dense", "scores": {"accuracy": [1.0] * 8}},
            {"label": "p", "scores": {"accuracy": [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]}},
        ],
    }
    maps = needle_map(record)[""]
    assert list(maps) == ["dense", "p"]
    cell = lambda svg: dict(re.findall(r"<title>(\d+ tokens, depth \d+%): (\d+)%", svg))
    assert set(cell(maps["dense"]).values()) == {"100"}
    assert cell(maps["p"]) == {
        "100 tokens, depth 0%": "50", "100 tokens, depth 100%": "100",
        "200 tokens, depth 0%": "0", "200 tokens, depth 100%": "50",
    }  # fmt: skip


def test_ruler_has_a_map_per_needle_subtask_and_none_for_the_rest():
    model, tokenizer = language_model()
    task = Ruler(lengths=(950,), subtasks=("niah_single", "niah_multiquery"), samples=2, max_new_tokens=2)
    result = evaluation.run(task, model, tokenizer)
    assert list(needle_map(result.to_dict())) == ["niah_single"]
    assert list(result["dense"].by_group["recall"]) == ["niah_single 950", "niah_multiquery 950"]


def test_a_perplexity_has_no_needle_map_and_still_a_page():
    model, tokenizer = language_model()
    record = evaluation.run(
        "perplexity:tokens=120,context=120", model, tokenizer, patches=["streaming:window=8"]
    ).to_dict()
    assert needle_map(record) == {}
    html = page.render(record)
    assert "Needle map" not in html and "Answers side by side" not in html and "perplexity, ppl ↓" in html


def test_many_groups_are_a_table_of_their_own():
    model, tokenizer = language_model()
    result = evaluation.run(Passkey(tuple(range(300, 370, 10)), (0.5,), 2), model, tokenizer)
    lines = str(result).splitlines()
    assert sum(bool(re.match(r"│ 3\d0 ", line)) for line in lines) == 7


def test_options_of_the_command_line_are_fields_of_the_task():
    assert make_task("passkey:max_new_tokens=3", "100,200", 4) == Passkey(
        (100, 200), max_new_tokens=3, batch_size=4
    )
    assert make_task("passkey", "[100]") == make_task("passkey", "100") == Passkey((100,))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("perplexity", "100", None), "--lengths: perplexity has no lengths. Its options: tokens, context"),
        (("knn", None, 3), "--batch-size: knn has no batch_size"),
        (("passkey:lengths=[100]", "200", None), "lengths is given twice"),
        (("passkey", "ten", None), "lengths='.ten.' is not"),
    ],
)
def test_options_a_task_does_not_have_are_refused(arguments, words):
    with pytest.raises(SpecError, match=words):
        make_task(*arguments)


def test_another_run_in_the_folder_is_one_line_on_the_command_line(tiny, tmp_path, capsys):  # noqa: F811
    command = [
        "eval",
        "passkey:depths=0.5",
        "--lengths",
        "300",
        "-m",
        "testbed:smollm2",
        "--out",
        str(tmp_path),
    ]
    invoke(*command)
    text = fails(capsys, *command, "--seed", "1")
    assert "items of another run" in text and "seed: 0 there, 1 asked" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_one_line(tiny, capsys, device):  # noqa: F811
    text = fails(capsys, "eval", "perplexity", "-m", "testbed:smollm2", "--device", device)
    assert f"--device {device}: " in text and "Leave it out" in text


def test_a_missing_jinja2_is_said_before_the_run(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    text = fails(capsys, "eval", "perplexity", "-m", "testbed:smollm2", "--out", str(tmp_path))
    assert "pip install 'hf_attn_patch[eval]'" in text and not (tmp_path / "items.jsonl").exists()
