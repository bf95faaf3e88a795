"""What the documents claim is what the package does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import hf_attn_patch as hap
from hf_attn_patch import registry

ROOT = Path(__file__).parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_lists_every_method_as_the_registry_does():
    text = (ROOT / "README.md").read_text()
    assert script("readme").methods() in text, "run: python scripts/readme.py"


def test_readme_first_screen_has_the_measured_table():
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- demo:begin -->\n(.*?)<!-- demo:end -->", text, re.S)[1]
    assert "SmolLM2-135M" in table and "DINOv2-S" in table and "make demo" in table
    assert "is **0.0** (while patched" in table


@pytest.mark.parametrize("name", list(hap.available()))
def test_method_docstring_says_source_formula_neutral_value_and_differences(name):
    doc = registry.get(name).__doc__
    for word in ("Source:", "Formula:", "Neutral value:", "Differs"):
        assert word in doc, f"{name} does not say {word}"
    assert "arXiv" in doc
    assert any(word in doc for word in ("READ", "RAN", "UNVERIFIED")), (
        f"{name} does not say what was verified"
    )


def test_public_names_exist_and_are_documented():
    for name in hap.__all__:
        thing = getattr(hap, name)
        assert isinstance(thing, str) or thing.__doc__, name


def test_relative_links_of_the_documents_lead_somewhere():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} links to {target}"


def test_coverage_page_has_no_family_that_differs():
    text = (ROOT / "docs" / "coverage.md").read_text()
    summary = re.search(r"\*\*(\d+) families: (\d+) built, (\d+) identical, (\d+) different", text)
    assert int(summary[3]) >= 250 and int(summary[4]) == 0
