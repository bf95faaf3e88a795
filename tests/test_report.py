"""The page of the demo: self-contained, honest, escaped."""

from __future__ import annotations

import re

import pytest

from hf_attn_patch.report import render, svg, write
from hf_attn_patch.report.page import format_ratio, format_value, verdict

COLUMN = {"key": "speed", "label": "tokens/s", "unit": "", "better": "higher", "digits": 1, "what": "a speed"}


def row(label: str, method: str | None, value: float, ratio: float) -> dict:
    return {"label": label, "call": f"call of {label}", "method": method, "options": {}, "executor": "torch",
            "reason": "first choice", "values": {"speed": value}, "ratios": {"speed": ratio}}  # fmt: skip


def record(undone: bool = True) -> dict:
    part = {
        "title": "a part",
        "columns": [COLUMN],
        "rows": [row("dense", None, 100.0, 1.0), row("<b>fast</b>", "streaming", 150.0, 1.5)],
        "intervals": {},
        "drawn": ["speed"],
        "notes": ["a note"],
        "pictures": {
            "<b>fast</b>": {
                "length": 128,
                "layers": [0, 1],
                "spans": [[12, 128], [12, 12]],
                "shown_layer": 0,
                "blocks": [[[1, 0], [2, 1]], [[1, 0], [0, 1]]],
                "grid": [2, 2],
                "prefix": 1,
                "image": [[0.0, 1.0], [0.5, 0.2]],
                "views": [{"query": [0, 1], "seen": [[1, 1], [0, 0]]}],
            }
        },
    }
    undo = {
        "outputs": "logits",
        "values": 1000,
        "while_patched": 3.0,
        "max_abs_difference": 0.0 if undone else 0.5,
        "same_state_dict_keys": True,
        "same_attention_implementation": True,
        "hooks_left": 0,
        "undone": undone,
    }
    model = {
        "key": "m",
        "title": "A model",
        "summary": "summary",
        "dtype": "float32",
        "dtype_reason": "why",
        "parts": [part],
        "undo": undo,
    }
    return {
        "started": "2026-01-02T03:04:05",
        "seconds": 60.0,
        "seed": 0,
        "quick": False,
        "models": [model],
        "tiles": [{"value": "1", "text": "a tile"}],
        "reproduce": ["hf-attn-patch demo"],
        "environment": {
            "cpu": "a CPU",
            "cpu_count": 2,
            "packages": {"torch": "2", "transformers": "5"},
            "variables": {},
        },
    }


def test_nothing_is_fetched_and_nothing_runs():
    page = render(record())
    assert "<script" not in page and "<link" not in page and "<img" not in page and "@import" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page) and "url(" not in page and " src=" not in page


def test_all_parts_are_there():
    page = render(record())
    for text in (
        "A model",
        "tokens/s",
        "150.0",
        "×1.50",
        "call of dense",
        "a note",
        "a tile",
        "hf-attn-patch demo",
        "a CPU",
    ):
        assert text in page
    assert page.count("<svg") >= 1 + 1 + 3 + 1  # bars, heat map, blocks of dense and two heads, neighbourhood
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_labels_are_escaped():
    page = render(record())
    assert "<b>fast</b>" not in page and "&lt;b&gt;fast&lt;/b&gt;" in page


def test_a_model_that_was_not_restored_is_called_so():
    page = render(record(undone=False))
    assert "NOT undone" in page and "Undone without a trace" not in page and "0.5" in page


def test_write_makes_the_file(tmp_path):
    path = write(record(), tmp_path / "index.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    "value, extra, text",
    [
        (0.5, {"unit": "%", "digits": 1}, "50.0 %"),
        (2 / 3, {"of": 3}, "2/3"),
        (1234.56, {"digits": 1}, "1\u202f234.6"),
    ],
)
def test_numbers_as_their_column_wants_them(value, extra, text):
    assert format_value(value, COLUMN | extra) == text


@pytest.mark.parametrize(
    "ratio, better, expected",
    [
        (1.5, "higher", "good"),
        (0.5, "higher", "bad"),
        (0.5, "lower", "good"),
        (1.5, "lower", "bad"),
        (1.01, "higher", ""),
        (3, "none", ""),
    ],
)
def test_better_and_worse_are_told_apart(ratio, better, expected):
    assert verdict(row("x", "m", 1.0, ratio), COLUMN | {"better": better}, {}) == expected


def test_an_interval_wins_over_a_ratio():
    interval = {"x": {"speed": {"value": 5.0, "low": 1.0, "high": 9.0}}}
    assert format_ratio(row("x", "m", 150.0, 1.5), COLUMN, interval) == "[+1.0, +9.0]"
    assert format_ratio(row("x", "m", 150.0, 1.5), COLUMN, {}) == "×1.50"


def test_a_difference_that_may_be_chance_is_neither_good_nor_bad():
    sure = {"value": -5.0, "low": -9.0, "high": -1.0, "significant": True}
    chance = {"value": -5.0, "low": -9.0, "high": 1.0, "significant": False}
    assert verdict(row("x", "m", 95.0, 0.95), COLUMN, {"x": {"speed": sure}}) == "bad"
    assert verdict(row("x", "m", 95.0, 0.95), COLUMN, {"x": {"speed": chance}}) == ""


def test_bars_are_proportional():
    text = svg.bars([svg.Bar("a", 10, "10", "--c0"), svg.Bar("b", 5, "5", "--c1")], "title")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)"[^>]*style="fill:var', text)]
    assert widths[0] == pytest.approx(2 * widths[1])


def test_runs_of_blocks_are_merged():
    text = svg.block_grid([[2, 2, 2, 0], [0, 1, 1, 2]], "title", "--c1")
    assert text.count("fill-opacity") == 3
