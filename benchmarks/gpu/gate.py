"""The correctness gate: the kernel tests on this device, in parallel, before any number is taken.

With pytest-xdist one pytest run, without it one run per file, without pytest the built-in list of programs at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path("tests/triton")


@dataclass
class Gate:
    """Outcome of the gate.

    status: ``green`` (everything passed), ``quick`` (the quick subset passed, nothing failed, not everything ran),
        ``red`` (a test failed, or not even the subset ran).
    how: the command that ran. failed: test -> end of its report.
    """

    status: str
    how: str
    passed: int = 0
    skipped: int = 0
    collected: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, path: Path, how: str, ended: bool, files: int, seconds: float) -> Gate:
        """From the lines of `gate_plugin`; files: how many pytest runs share the tests (their collections add up)."""
        lines = (
            [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
        )
        results = {x["id"]: x for x in lines if "id" in x}
        collections = [x for x in lines if "collected" in x]
        add = (lambda key: sum(x[key] for x in collections)) if files > 1 else (
            lambda key: max((x[key] for x in collections), default=0))  # fmt: skip
        gate = cls("red", how, collected=add("collected"), seconds=round(seconds, 1))
        gate.passed = sum(x["outcome"] == "passed" for x in results.values())
        gate.skipped = sum(x["outcome"] == "skipped" for x in results.values())
        gate.failed = {k: x["text"] for k, x in results.items() if x["outcome"] == "failed"}
        done_quick = sum(x["quick"] and x["outcome"] != "failed" for x in results.values())
        everything = ended and gate.passed + gate.skipped >= gate.collected
        if gate.failed:
            gate.note = f"{len(gate.failed)} tests failed"
        elif not gate.passed:
            gate.note = "no test ran"
        elif everything:
            gate.status = "green"
        elif done_quick >= add("quick") > 0:
            gate.status = "quick"
            gate.note = f"time was up after {gate.passed} of {gate.collected} tests; all that ran passed"
        else:
            gate.note = (
                f"stopped after {gate.passed} of {gate.collected} tests, the quick subset not among them"
            )
        return gate

    @property
    def open(self) -> bool:
        """True if numbers may be taken."""
        return self.status in ("green", "quick")


def environment(path: Path, quick: bool) -> dict[str, str]:
    found = {
        # the gate is a pytest of its own, also when a pytest worker starts it
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "TRITON_INTERPRET": "0",
        "GPU_GATE_FILE": str(path),
        "GPU_GATE_QUICK": str(int(quick)),
    }
    return found | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def finish(process: subprocess.Popen, deadline: float) -> bool:
    """Wait for a process until `deadline` (time.monotonic), then end it and its children; True if it ended alone."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def run(
    folder: Path, seconds: float, quick: bool, workers: int, available: Callable[[str], Any] | None = None
) -> Gate:
    """Run the gate in at most `seconds`, logging under `folder`. available: finds a package (importlib's find_spec)."""
    available = available or importlib.util.find_spec
    begin = time.monotonic()
    path, log = folder / "gate.jsonl", folder / "gate.log"
    path.unlink(missing_ok=True)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.gpu.gate_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
    ]
    if not available("pytest"):
        commands = [[sys.executable, "-m", "benchmarks.gpu.gate", *(["--quick"] if quick else [])]]
        how = "built-in list of programs (pytest is not installed)"
    elif available("xdist"):
        commands = [[*pytest, str(TESTS), "--ignore", str(TESTS / "test_aot.py"), "-n", str(workers)]]
        how = f"pytest -n {workers}"
    else:
        files = sorted(p for p in (ROOT / TESTS).glob("test_*.py") if p.name != "test_aot.py")
        commands = [[*pytest, str(p)] for p in files]
        how = f"pytest, a process per file, {workers} at a time (pytest-xdist is not installed)"
    # tests of one file are one process here, so the long ones must not start last
    commands.sort(key=lambda c: -Path(c[-1]).stat().st_size if Path(c[-1]).is_file() else 0)

    def one(command: list[str]) -> bool:
        if time.monotonic() > begin + seconds:
            return False
        with log.open("a") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(path, quick), stdout=out,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            return finish(process, begin + seconds)

    with ThreadPoolExecutor(workers if len(commands) > 1 else 1) as pool:
        ended = all(list(pool.map(one, commands)))
    gate = Gate.of(
        path, how + (", quick subset" if quick else ""), ended, len(commands), time.monotonic() - begin
    )
    if quick and gate.status == "green":
        gate.status, gate.note = "quick", "only the quick subset was asked for"
    if gate.status == "red" and not gate.failed and log.exists():
        gate.note += "\n" + log.read_text()[-3000:]
    return gate


# -- without pytest ----------------------------------------------------------------------------------------


def programs(quick: bool) -> Iterator[tuple[str, Callable[[], Any], list[Any], bool]]:
    """(name, program, dtypes, with gradients) of the built-in list."""
    import torch

    from hf_attn_patch.call.program import MassEdit
    from hf_attn_patch.call.rules import SinkWindow
    from tests.kernels import cases

    single, all_dtypes = [torch.float32], [torch.float32, torch.float16, torch.bfloat16]
    given = {
        "opaque rule",
        "opaque rule, padded",
        "given bool",
        "given float",
        "hole in padding",
        "hole in padding, bidirectional",
    }
    for name, make in cases.all_masks().items():
        if name not in given:
            yield f"mask {name}", make, single, True
    for name, change in cases.all_edits().items():
        if name != "mean_abs":

            def edited(change: Callable = change) -> Any:
                program = cases.make(L=66)
                program.classify(cases.classes(program))
                return change(program)

            yield f"edit {name}", edited, single, "mass" not in name
    for dim in (16, 64, 128) if quick else (16, 40, 64, 72, 80, 96, 128, 160, 192, 256):

        def restricted(dim: int = dim) -> Any:
            program = cases.make(B=1, H=2, Hkv=1, L=130, D=dim)
            program.restrict(SinkWindow(4, 30))
            return program

        yield f"head dimension {dim}", restricted, all_dtypes, True
    for name, (rule, options) in () if quick else cases.all_rules().items():

        def ruled(rule: Any = rule, options: Any = options) -> Any:
            program = cases.make(**{"B": 1, **options})
            program.restrict(rule)
            return program

        yield f"rule {name}", ruled, single, False
    for length in (1, 7, 40):
        yield f"ragged cache {length}", lambda n=length: cases.ragged(n, [20, 50, 20]), all_dtypes, False

    def var() -> Any:
        from hf_attn_patch.patches.grounding.var import transfer

        program = cases.make(L=130)
        program.classify(cases.classes(program, 4))
        return cases.edit(program, mass_edits=[MassEdit(transfer(rho=0.6, min_mass=0.3, move=0.4), 4)])

    yield "mass transfer", var, all_dtypes, False


def built_in(quick: bool) -> None:
    """Run `programs` against the float64 reference, writing the lines that the plugin would."""
    from benchmarks.gpu.gate_plugin import write
    from tests.kernels.budget import assert_within_budget

    listed = [
        (f"{n} {str(d).removeprefix('torch.')}", make, d, g) for n, make, ds, g in programs(quick) for d in ds
    ]
    write(collected=len(listed), quick=len(listed))
    for name, make, dtype, gradients in listed:
        try:
            assert_within_budget(make(), "triton", dtype, gradients)
            write(id=name, outcome="passed", quick=True, text="")
        except Exception as error:
            write(id=name, outcome="failed", quick=True, text=f"{type(error).__name__}: {error}"[-3000:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    built_in(parser.parse_args().quick)
