"""Every kernel compiles for four GPU architectures, fits them and keeps to registers; nothing here needs a GPU.

The cases marked `default` run here, all of them in `scripts/kernels.py`. Compilation happens in a process of its own,
because this one runs Triton's interpreter; compiled kernels are cached between runs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn_patch.kernels.triton import aot, launch

FOLDER = Path(aot.__file__).parent
ROOT = FOLDER.parents[2]
MODULES = aot.modules_with_cases()

# (kernel file, target, case, kernel) -> (bytes per thread, why they are accepted); an entry that got better must go
KNOWN_SPILLS: dict[tuple[str, str, str, str], tuple[int, str]] = {}

# (kernel file, target, case, kernel) of products of 16-bit matrices without tensor-core instructions -> why
KNOWN_SCALAR: dict[tuple[str, str, str, str], str] = {}


@functools.cache
def compiled(module: str) -> list[dict]:
    """Rows of the default cases of a kernel file on all targets: one process, shared by the tests of the file."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", aot.__name__, "--module", module, "--default", "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.stdout, f"{module}: the compiler process failed\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def rows_of(module: str, target: str) -> list[dict]:
    rows = [row for row in compiled(module) if row["target"] == target]
    assert rows, f"{module} has no default case"
    broken = [f"{row['case']} {row['kernel']}: {row['error']}" for row in rows if row["error"]]
    assert not broken, "does not compile:\n" + "\n".join(broken)
    return rows


def key(row: dict) -> tuple[str, str, str, str]:
    return row["module"], row["target"], row["case"], row["kernel"]


def worst(rows: list[dict], measure: str) -> dict[tuple[str, str, str, str], int]:
    """Largest `measure` per key that is not 0 (a case may launch one kernel several times)."""
    found: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        found[key(row)] = max(found.get(key(row), 0), row[measure])
    return {name: value for name, value in found.items() if value}


each = pytest.mark.parametrize(
    "module, target", [(m, t) for m in MODULES for t in launch.TARGETS], ids=lambda part: part
)


@each
def test_kernels_compile_and_fit_shared_memory(module, target):
    too_big = [
        f"{row['case']} {row['kernel']}: {row['shared'] / 1024:.1f} KiB of "
        f"{launch.TARGETS[target].shared // 1024}"
        for row in rows_of(module, target)
        if not row["fits"]
    ]
    assert not too_big, "\n".join(too_big)


@each
def test_kernels_keep_to_registers_except_where_listed(module, target):
    spills = worst(rows_of(module, target), "spills")
    known = {k: size for k, (size, _) in KNOWN_SPILLS.items() if k[:2] == (module, target)}
    assert spills == known, "left: what the compiler spills, right: KNOWN_SPILLS (update stale entries)"
    depots = worst(rows_of(module, target), "local_depot")
    assert set(depots) <= set(known), "arrays in local memory that KNOWN_SPILLS does not list"


@each
def test_products_of_small_types_use_tensor_cores(module, target):
    scalar = {key(row) for row in rows_of(module, target) if row["dots"] and not row["tensor_cores"]}
    assert scalar == {k for k in KNOWN_SCALAR if k[:2] == (module, target)}


def test_lists_of_exceptions_name_files_and_targets_that_exist():
    for module, target, *_ in [*KNOWN_SPILLS, *KNOWN_SCALAR]:
        assert module in MODULES and target in launch.TARGETS


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.py")))
def test_sources_use_no_block_pointers(file):
    # Triton 3.9 has no block pointers any more, and 3.6 only warns
    found = re.findall(r"\b(?:make_block_ptr|tl\.advance)\b", (FOLDER / file).read_text())
    assert not found


def test_every_kernel_that_is_launched_has_a_default_case():
    named = {
        name.lstrip("_")
        for path in FOLDER.glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+),", path.read_text())
    }
    recorded = set()
    for module in MODULES:
        for case in aot.cases_of(module):  # raises if two cases have one label
            if case.default:
                with launch.recording("sm90") as record:
                    case.run()
                recorded |= {found.name for found in record.launches}
    assert named and named <= recorded, sorted(named - recorded)


@pytest.mark.parametrize("module", MODULES)
def test_documentation_has_every_case(module):
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert f"\n## {module}\n" in text, "run `make aot`"
    section = text.split(f"\n## {module}\n")[1].split("\n## ")[0]
    missing = [
        case.label
        for case in aot.cases_of(module)
        if f"\n| {case.label}{'*' if case.default else ''} |" not in section
    ]
    assert not missing, "run `make aot`"


def test_documentation_explains_every_spill_and_has_no_broken_case():
    text = (ROOT / "docs" / "kernels.md").read_text()
    for problem in ("Not explained yet", "does not compile", "too large"):
        assert problem not in text.replace("does not compile. `scalar`", "")
