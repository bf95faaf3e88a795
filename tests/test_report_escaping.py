"""Nothing that a page shows is markup, whoever wrote it: labels, options, answers, names of models and files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pytest

from hf_attn_patch import eval as evaluation
from hf_attn_patch.report import evaluation as eval_page
from hf_attn_patch.report import heads, render, svg
from hf_attn_patch.report.page import ReportError
from tests.eval_models import language_model
from tests.test_eval_page import PASSKEY
from tests.test_report import record

EVIL = "\"><script>alert(1)</script>'<img src=x onerror=alert(1)>"
KEPT = {"unit", "better", "key", "css"}  # words of the program, not of a stranger


class Reader(HTMLParser):
    """Tags and attributes a browser would see."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def assert_harmless(html):
    reader = Reader()
    reader.feed(html)
    assert "script" not in {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not [a for a in attributes if a.startswith("on")], (tag, attributes)
        assert str(attributes.get("src", "data:image/")).startswith("data:image/"), (tag, attributes)
        assert not re.match(r"\s*javascript:", str(attributes.get("href", ""))), (tag, attributes)
    assert "alert(1)" in html  # it is there, as text


def poisoned(data: Any, key: str = "") -> Any:
    """`data` with markup in every text, labels in every place the same."""
    if isinstance(data, dict):
        return {k: poisoned(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [poisoned(v, key) for v in data]
    return data + EVIL if isinstance(data, str) and key not in KEPT else data


def test_the_demo_page():
    data = poisoned(record())
    for model in data["models"]:
        for part in model["parts"]:
            part["pictures"] = {part["rows"][1]["label"]: next(iter(part["pictures"].values()))}
            part["drawn"] = ["speed"]
            for row in part["rows"]:
                row["method"] = row["method"]
    assert_harmless(render(data))


def test_the_eval_page():
    model, tokenizer = language_model()
    data = evaluation.run(
        PASSKEY, model, tokenizer, patches={EVIL: ("streaming", {"sinks": 1, "window": 9})}, command=EVIL
    ).to_dict()
    data["task"]["config"][EVIL] = EVIL
    data["facts"] = [{**f, "expected": [EVIL], "asked": [EVIL], EVIL: EVIL} for f in data["facts"]]
    for variant in data["variants"]:
        variant["answers"] = [EVIL] * len(variant["answers"])
    pictures = [{EVIL: f"<svg><text>{EVIL}</text></svg>", "image": "data:image/png;base64,AAAA"}]
    html = eval_page.render(data, pictures)
    assert_harmless(html)
    with pytest.raises(ReportError, match="attachment"):
        eval_page.render(data, [{"image": "javascript:alert(1)"}])


def test_the_page_of_heads():
    from hf_attn_patch.inspection.heads import HeadMaps

    fields = {f: None for f in HeadMaps.__dataclass_fields__}
    maps = HeadMaps(**{**fields, **_maps()})
    html = heads.render(maps, np.zeros((8, 8, 3), np.uint8), name=EVIL, source=EVIL, command=EVIL)
    assert_harmless(html)


def _maps():
    return {
        "maps": np.random.default_rng(0).random((1, 2, 4, 4)),
        "nmi": np.array([[0.1, 0.2]]),
        "distance": np.array([[1.0, 2.0]]),
        "layers": [0],
        "model": EVIL,
        "grid": (4, 4),
        "of": "cls",
    }


def test_pictures_escape_their_texts():
    bar = svg.Bar(EVIL, 1.0, EVIL, "--c0", EVIL)
    pictures = [
        svg.bars([bar], EVIL),
        svg.heat_map([[0.5]], EVIL, color="--c0", cell_notes=[[EVIL]], x_label=EVIL, y_label=EVIL),
        svg.block_grid([[1]], EVIL, "--c0", EVIL),
        svg.patch_grid([[0.5]], [[True]], (0, 0), EVIL, "--c0", EVIL),
    ]
    for picture in pictures:
        assert_harmless(picture)


def test_no_template_switches_escaping_off():
    for file in resources.files("hf_attn_patch.report").iterdir():
        if file.name.endswith(".jinja"):
            assert not re.search(r"\|\s*safe|autoescape", file.read_text()), file.name
