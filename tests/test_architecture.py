"""The house as it is drawn in ARCHITECTURE.md: imports point down only, files stay of one idea, old names answer."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_attn_patch"
# room -> rooms it may import. What is not listed is above the public calls (`api`) and may use everything below and
# its neighbours there (evaluation, calibration, training, inspection, decoding, cost, ... on one floor, cli on top).
BELOW = {
    "errors": set(),
    "env": set(),
    "options": {"errors"},
    "plugins": {"errors"},
    "method": {"errors"},
    "registry": {"errors", "options", "method", "plugins"},
    "model": {"errors", "options"},
    "call": {"errors"},
    "kernels": {"errors", "call"},
    "cache": {"errors", "call"},
    "forward": {"errors", "call", "model"},
    "patches": {"errors", "options", "registry", "model", "call", "kernels", "forward"},
    "install": {"errors", "options", "registry", "model", "call", "kernels", "cache", "forward"},
    "api": {"errors", "registry", "model", "install"},
}
ALLOWED = {("registry", "patches")}  # the table of built-in methods: text that imports none of them
LONGEST = 350
# older files that are still longer than they should be: they may shrink, not grow
LONG = {
    "calibration/moa.py": 378,
    "eval/cab/leaks.py": 385,
    "kernels/layout.py": 416,
    "kernels/triton/classes.py": 584,
    "kernels/triton/decode.py": 619,
    "kernels/triton/layout_attention.py": 402,
    "kernels/triton/layout_backward.py": 356,
    "kernels/triton/ragged_queries.py": 720,
    "kernels/triton/window_backward.py": 420,
}


def sources():
    return [f for f in PACKAGE.rglob("*.py") if "_old_names" not in f.parts]


def room_of(names):
    """First part of a dotted name below the package; "" for the package itself (its version)."""
    first = names[0] if names else ""
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() else ""


def imports(file):
    """(room, line) of everything a file imports from the package at run time, inside functions too."""
    tree = ast.parse(file.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    here = list(file.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                names = alias.name.split(".")
                if names[0] == "hf_attn_patch":
                    yield room_of(names[1:]), node.lineno
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = here[: len(here) - node.level] + (node.module.split(".") if node.module else [])
        elif node.module and node.module.split(".")[0] == "hf_attn_patch":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            yield room_of(base or [alias.name]), node.lineno


@pytest.mark.parametrize("room", sorted(BELOW))
def test_imports_of_a_room_point_down(room):
    files = [f for f in sources() if room_of(f.relative_to(PACKAGE).with_suffix("").parts) == room]
    assert files
    up = [
        f"{file.relative_to(PACKAGE)}:{line} -> {target}"
        for file in files
        for target, line in imports(file)
        if target not in BELOW[room] | {room, ""} and (room, target) not in ALLOWED
    ]
    assert not up


def test_the_floors_have_no_circle():
    done, left = set(), dict(BELOW)
    while left:
        ready = {room for room, below in left.items() if below <= done}
        assert ready, f"these rooms wait for each other: {sorted(left)}"
        done |= ready
        left = {room: below for room, below in left.items() if room not in ready}


def test_the_test_sees_an_arrow_that_points_up(tmp_path, monkeypatch):
    file = PACKAGE / "call" / "mask.py"
    text = file.read_text() + "\n\ndef late():\n    from ..install import stack\n\n    return stack\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: text)
    assert "install" in {room for room, _ in imports(file)}


def test_files_are_short():
    lengths = {str(f.relative_to(PACKAGE)): len(f.read_text().splitlines()) for f in sources()}
    long = {name: n for name, n in lengths.items() if n > LONG.get(name, LONGEST)}
    assert not long
    assert not {name for name in LONG if lengths.get(name, 0) <= LONGEST}, (
        "these are short enough now: unlist them"
    )


OLD = [f.stem for f in sorted((PACKAGE / "_old_names").glob("*.py"))]


@pytest.mark.parametrize("name", OLD)
def test_modules_answer_to_their_old_names(name):
    module = importlib.import_module(f"hf_attn_patch.{name}")
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public) is not None
    assert any(not n.startswith("_") for n in vars(module))


def test_importing_the_package_imports_neither_transformers_nor_triton():
    code = "import sys, hf_attn_patch; print(sorted({'transformers', 'triton', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
