"""What `scripts/coverage.py` says about one family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "scripts" / "coverage.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("coverage_script", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "family, generate, word",
    [
        ("llama", "equal", ""),
        ("t5gemma2", "refused", "encoder"),
        ("vit", "", "does not generate"),
    ],
)
def test_a_row_says_how_generate_goes(script, family, generate, word):
    row = script.examine(family)
    assert (row["state"], row["generate"]) == ("identical", generate) and word in row["generate_why"]


def test_a_failure_of_the_span_cache_is_seen(script, monkeypatch):
    from hf_attn_patch.cache import SpanLayer

    update = SpanLayer.update

    def wrong(self, key, value, *args, **kwargs):
        return update(self, key * 1.01, value, *args, **kwargs)

    monkeypatch.setattr(SpanLayer, "update", wrong)
    row = script.examine("llama")
    assert row["generate"] == "different" and "auto and keep" in row["generate_why"]
    assert script.generated([row])["different"] == 1


def test_the_page_has_a_column_for_it(script):
    rows = [{**script.examine("llama"), "seconds": 1.0}]
    page = script.markdown(rows, 1.0, "coverage.py llama")
    assert "| llama | LlamaForCausalLM | 2 / 2 | yes | equal |  |" in page
    assert "| equal | 1 |" in page and "1 families: 1 built, 1 identical, 0 different" in page
