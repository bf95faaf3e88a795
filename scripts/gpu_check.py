"""Correctness gate and measurements on one GPU, within a hard time budget.

    PYTHONPATH=. python scripts/gpu_check.py                 # or: make gpu-check
    PYTHONPATH=. python scripts/gpu_check.py --quick-gate    # a named subset of the kernel tests
    PYTHONPATH=. python scripts/gpu_check.py --tune --save   # launch configurations instead of benchmarks

Kernel tests first; if one fails, no number is taken. Results go to benchmarks/results/ (and $OUT): see
benchmarks/gpu/README.md. Exit status: 0 done, 1 the gate is red, 2 no GPU, 3 gate open but no number could be taken.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks.gpu import gate as gates  # noqa: E402
from benchmarks.gpu import report, targets  # noqa: E402
from benchmarks.gpu.watch import Worker, measure  # noqa: E402

GATE_SHARE = 0.5  # of the budget


def environment() -> dict[str, Any]:
    """Versions, commit, and the GPU with its driver."""
    from hf_attn_patch.env import environment as describe

    facts = describe()
    p = torch.cuda.get_device_properties(0)
    facts["gpu"] = {"name": p.name, "sm": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                    "memory_gib": round(p.total_memory / 2**30, 1), "driver": driver()}  # fmt: skip
    facts["dirty"] = None if facts["git"] is None else facts["git"].endswith("-dirty")
    return facts


def driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split(
            "\n"
        )[0]
    except (OSError, subprocess.SubprocessError):
        return None


def keep_logs(folder: Path) -> None:
    """The ends of all logs as one file under $OUT, from where few files come back."""
    if os.environ.get("OUT"):
        parts = [
            f"== {p.name}\n{p.read_text(errors='replace')[-200_000:]}" for p in sorted(folder.glob("*.log"))
        ]
        (Path(os.environ["OUT"]) / "gpu-check.log").write_text("\n".join(parts))


def run_tuning(save: bool, deadline: float) -> list[dict[str, Any]]:
    """Print candidates of every kernel; with `save` the best are written where `configs` reads them."""
    from benchmarks.gpu.case import Context
    from benchmarks.gpu.timing import Clock
    from benchmarks.gpu.tune import KERNELS, best, tune
    from hf_attn_patch.kernels.triton import configs

    context = Context("cuda", torch.bfloat16, clock=Clock("cuda", seconds=0.4))
    everything = []
    jobs = max(1, (os.cpu_count() or 4) - 2)
    print(f"compiling candidates, {jobs} processes", flush=True)
    until = time.monotonic() + 0.6 * (deadline - time.time())
    compilers = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.tune", str(i), str(jobs)], cwd=ROOT,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL, start_new_session=True)
        for i in range(jobs)
    ]  # fmt: skip
    for compiler in compilers:
        gates.finish(compiler, until)
    jobs = max(1, (os.cpu_count() or 4) - 2)
    print(f"compiling candidates, {jobs} processes", flush=True)
    half = time.monotonic() + 0.6 * (deadline - time.time())
    compilers = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.tune", str(i), str(jobs)], cwd=ROOT,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL, start_new_session=True)
        for i in range(jobs)
    ]  # fmt: skip
    for compiler in compilers:
        gates.finish(compiler, half)
    for dim in (64, 128):
        for kernel in KERNELS:
            lines = []
            for line in tune(context, kernel, dim):
                lines.append(line)
                number = f"{line['ms']:.3f} ms" if "ms" in line else line["why"]
                print(
                    f"{kernel:12s} D={dim:3d} {line['config']}{' (table)' if line['own'] else ''}: {number}",
                    flush=True,
                )
                if time.time() > deadline:
                    print("time is up; what follows was not run")
                    break
            chosen = best(lines)
            print(f"{kernel} D={dim}: " + ("keep the table" if chosen is None else f"fastest {chosen}"))
            if chosen is not None and save:
                print("written to", configs.remember(kernel, context.on, dim, context.dtype, chosen))
            everything += [{**line, "config": asdict(line["config"])} for line in lines]
            if time.time() > deadline:
                return everything
    return everything


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="hard budget of the whole call")
    parser.add_argument("--quick-gate", action="store_true", help="only a named subset of the kernel tests")
    parser.add_argument(
        "--no-warm", action="store_true", help="do not compile benchmarks while the gate runs"
    )
    parser.add_argument(
        "--tune", action="store_true", help="time launch configurations instead of benchmarks"
    )
    parser.add_argument("--save", action="store_true", help="with --tune: remember the fastest")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no GPU here (torch.cuda.is_available() is False); nothing was run.",
            file=sys.stderr,
        )
        return 2
    begin = time.time()
    deadline = begin + given.minutes * 60 - 8  # for writing and drawing
    stages: list[dict[str, Any]] = []

    def stage(name: str, since: float) -> None:
        stages.append({"stage": name, "seconds": round(time.time() - since, 1)})

    facts = environment()
    versions = {n: facts["packages"].get(n) for n in ("torch", "triton", "transformers")}
    print("GPU", facts["gpu"], "\n", versions, "git", facts["git"], flush=True)
    result: dict[str, Any] = {
        "schema": report.SCHEMA, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["gpu_check.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "environment": facts,
        "gate": "red", "gate_report": {}, "stages": stages, "ceilings": {}, "rows": [], "targets": [],
    }  # fmt: skip
    stage("environment", begin)
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    folders = [given.out, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]

    since, cores = time.time(), os.cpu_count() or 4
    # FlexAttention and our kernels of the benchmarks compile while the tests do: it is the same cores' idle time
    warm = [] if given.no_warm or given.tune else [
        Worker(folder, 100 + i, deadline, set(), "--warm", "--part", f"{i}/2") for i in range(2)
    ]  # fmt: skip
    try:
        seconds = (deadline - time.time()) * GATE_SHARE
        gate = gates.run(folder, seconds, given.quick_gate, max(1, cores - len(warm)))
    finally:
        for worker in warm:
            worker.end()
    stage("gate", since)
    result["gate"], result["gate_report"] = gate.status, asdict(gate)
    print(f"gate: {gate.status} ({gate.how}): {gate.passed} passed, {len(gate.failed)} failed, {gate.skipped} skipped "
          f"of {gate.collected} in {gate.seconds:.0f} s. {gate.note}", flush=True)  # fmt: skip
    if not gate.open:
        for name, text in list(gate.failed.items())[:30]:
            print(f"FAILED {name}\n    " + "\n    ".join(text.splitlines()[-6:]))
        print("No speed was measured. Written:", *report.write(result, *folders))
        keep_logs(folder)
        return 1

    since = time.time()
    if given.tune:
        result["tuning"] = run_tuning(given.save, deadline)
        stage("tuning", since)
        print("Written:", *report.write(result, *folders))
        return 0
    rows = measure(folder, deadline)
    stage("benchmarks", since)
    result |= {"rows": rows, "ceilings": targets.ceilings_of(rows), "targets": targets.evaluate(rows)}
    paths = report.write(result, *folders)
    keep_logs(folder)
    broken = [r for r in rows if r["status"] in ("error", "not run")]
    print("\n".join(["", *report.table(broken)]), "\nceilings:", result["ceilings"], "\ntargets:")
    print("\n".join(targets.lines(result["targets"])))
    for path in paths:
        try:
            problem = report.plot(result, path.with_suffix(".png"))
        except Exception as error:  # a picture is no reason to lose the numbers
            problem = f"{type(error).__name__}: {error}"
        print(f"no plot: {problem}" if problem else f"plot: {path.with_suffix('.png')}")
    print(f"gate {gate.status}; {time.time() - begin:.0f} s; written:", *paths)
    return 0 if any(r["status"] == "ok" for r in rows) else 3


if __name__ == "__main__":
    sys.exit(main())
