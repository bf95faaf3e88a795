"""Runs a chosen part of the suite with other versions of transformers, torch and triton, and writes docs/versions.md.

    python scripts/versions.py                          # every environment but those marked heavy (5 GB each)
    python scripts/versions.py --heavy                  # those too
    python scripts/versions.py --only transformers-5.10.1 --jobs 1

An environment is a venv under .versions/ that sees the packages of the running Python through a .pth file and has only
what differs of its own, so that most cost seconds and 130 MB. The running environment is never changed: pip does not
uninstall what lies outside of a venv. Results are kept in .versions/results, one file per environment; the table is
made of all that are there, so a run that was cut short goes on with --only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".versions"
RESULTS = FOLDER / "results"
PAGE = ROOT / "docs" / "versions.md"
TIMEOUT = 1200  # seconds a part of the suite may take in one environment

# part -> (what it holds, files or node ids)
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "api": (
        "patch, plan, undo, surveys",
        ("tests/test_api.py", "tests/test_survey.py", "tests/test_config_copies.py"),
    ),
    "masks": ("masks of transformers as data", ("tests/test_masks.py",)),
    "caches": ("span caches, generate", ("tests/test_cache.py",)),
    "facts": ("facts of a forward", ("tests/test_context.py",)),
    "adapters": ("save and load", ("tests/test_persistence.py",)),
    "conformance": (
        "contracts: 2 methods on 16 families, 6 on their own",
        ("tests/conformance/test_contracts.py",),
    ),
    "triton": (
        "kernels in Triton's interpreter; compiled for sm90 without a GPU",
        ("tests/triton/test_executor.py", "tests/triton/test_aot.py"),
    ),
}
SUITE = ("api", "masks", "caches", "facts", "adapters", "conformance")
CASES = (
    "head_gate-0-*,streaming-0-*,moa-0-llama,block_topk-0-llama,quest-0-llama,vaf-0-llava,neighborhood-0-dinov2,"
    "swin_window-0-dinov2"
)
# contracts that do not depend on a version, or run over the whole registry whatever is chosen; of triton a sample
LEFT_OUT = (
    "not test_composes and not test_neutral and not test_every_builtin and not test_unknown_option "
    "and not survives_json and not odd_lengths and not (test_aot and not (sm90 and shared_memory and decode))"
)


@dataclass(frozen=True)
class Environment:
    """What is installed over the running environment, and which parts run there."""

    name: str
    packages: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()  # exactly these, nothing that they ask for
    parts: tuple[str, ...] = SUITE
    heavy: str = ""  # what it costs, if that is much


# torch 2.6 for Linux is a CUDA build: torch and the libraries that it loads, without triton
CUDA_12_4 = (
    "cublas-cu12==12.4.5.8", "cuda-cupti-cu12==12.4.127", "cuda-nvrtc-cu12==12.4.127", "cuda-runtime-cu12==12.4.127",
    "cudnn-cu12==9.1.0.70", "cufft-cu12==11.2.1.3", "curand-cu12==10.3.5.147", "cusolver-cu12==11.6.1.9",
    "cusparse-cu12==12.3.1.170", "cusparselt-cu12==0.6.2", "nccl-cu12==2.21.5", "nvjitlink-cu12==12.4.127",
    "nvtx-cu12==12.4.127",
)  # fmt: skip
ENVIRONMENTS = (
    *(
        Environment(f"transformers-{version}", (f"transformers=={version}",))
        for version in ("5.10.1", "5.13.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")
    ),
    Environment(
        "torch-2.6.0",
        ("transformers==5.24.0", "sympy==1.13.1"),
        ("torch==2.6.0", *(f"nvidia-{name}" for name in CUDA_12_4)),
        heavy="2.8 GB to download, 4.4 GB of disk",
    ),
    Environment(
        "torch-2.14.1",
        ("torch==2.14.1", "transformers==5.24.0"),
        heavy="5.4 GB of disk, most of it CUDA libraries",
    ),
    Environment(
        "triton-3.6.0", ("triton==3.6.0", "numpy==2.3.5"), parts=("triton",)
    ),  # its interpreter: numpy < 2.4
    Environment("triton-3.9.0", ("triton==3.9.0",), parts=("triton",)),
)

VERSIONS = """
import json, platform, torch, transformers, numpy
try: import triton; found = triton.__version__
except ImportError: found = "-"
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                  "transformers": transformers.__version__, "triton": found}))
"""


def python_of(environment: Environment) -> Path:
    return FOLDER / environment.name / "bin" / "python"


def make(environment: Environment) -> None:
    """The venv, with what differs installed; at once where it is there already."""
    python, home = python_of(environment), FOLDER / environment.name
    wanted = json.dumps([environment.packages, environment.without_dependencies])
    stamp = home / ".packages"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], check=True)
    site = Path(_output(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    if environment.without_dependencies:
        subprocess.run([*pip, "--no-deps", *environment.without_dependencies], check=True)
    if environment.packages:
        subprocess.run([*pip, *environment.packages], check=True)
    stamp.write_text(wanted)


def _output(python: Path, code: str) -> str:
    done = subprocess.run(
        [str(python), "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def run(environment: Environment, jobs: int) -> dict[str, Any]:
    """Runs the parts of one environment in one pytest process; the result as it is kept."""
    report = RESULTS / f"{environment.name}.xml"
    report.unlink(missing_ok=True)
    files = [file for part in environment.parts for file in PARTS[part][1]]
    command = [
        str(python_of(environment)), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", LEFT_OUT,
        "-n", str(jobs), "--dist", "worksteal", f"--junitxml={report}", *files,
    ]  # fmt: skip
    settings = {
        **os.environ, "PYTHONPATH": str(ROOT), "HAP_CONFORMANCE": CASES, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    started = time.perf_counter()
    with (RESULTS / f"{environment.name}.log").open("w") as log:
        try:
            subprocess.run(command, cwd=ROOT, env=settings, stdout=log, stderr=log, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
    return {
        "name": environment.name,
        "versions": json.loads(_output(python_of(environment), VERSIONS)),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started),
        "parts": read(report, environment.parts) if report.exists() else {},
    }


def read(report: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Passed, skipped and failed tests per part, and the first line of each failure."""
    home = {file.removesuffix(".py").replace("/", "."): part for part in parts for file in PARTS[part][1]}
    found: dict[str, dict[str, Any]] = {
        part: {"passed": 0, "skipped": 0, "failed": {}, "not_there": {}} for part in parts
    }
    for case in xml.parse(report).iter("testcase"):
        module = case.get("classname") or case.get("name", "")
        part = next((home[name] for name in home if module.startswith(name)), parts[0])
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skipped, test = case.find("skipped"), f"{module.rpartition('.')[2]}::{case.get('name')}"
        if problem is not None:
            said = (problem.get("message") or "").strip().splitlines() or [""]
            found[part]["failed"][test] = said[0][:200]
        elif skipped is not None:
            found[part]["skipped"] += 1
            if "transformers" in (skipped.get("message") or ""):  # a version cannot do it, patched or not
                found[part]["not_there"][test] = skipped.get("message")
        else:
            found[part]["passed"] += 1
    return found


def table(results: list[dict[str, Any]], notes: str) -> str:
    """The page: a row per environment, then what failed."""
    parts = list(PARTS)
    lines = [
        "# Versions",
        "",
        "A chosen part of the suite, with other versions of the libraries it stands on. Written by",
        "",
        "    make versions    # scripts/versions.py --heavy: also torch 2.6.0 and 2.14.1 (4.4 and 5.4 GB)",
        "",
        "Each cell: tests passed / failed. A row is one environment (CPU, one thread per process).",
        "",
        "| environment | transformers | torch | triton | numpy | "
        + " | ".join(parts)
        + " | seconds | date |",
        "|---|---|---|---|---|" + "---:|" * (len(parts) + 1) + "---|",
    ]
    for result in results:
        versions, cells = result["versions"], []
        for part in parts:
            one = result["parts"].get(part)
            if one is None:
                cells.append("")
            else:
                failed = len(one["failed"])
                cells.append(f"{one['passed']} / **{failed}**" if failed else f"{one['passed']} / 0")
        names = " | ".join(str(versions[name]) for name in ("transformers", "torch", "triton", "numpy"))
        lines.append(
            f"| {result['name']} | {names} | "
            + " | ".join(cells)
            + f" | {result['seconds']} | {result['date']} |"
        )
    lines += ["", "Parts:", ""]
    lines += [f"- **{part}**: {what} (`{'`, `'.join(files)}`)" for part, (what, files) in PARTS.items()]
    lines += ["", f"Conformance cases: `{CASES}`. Left out: `{LEFT_OUT}`."]
    lines += ["", "## What failed", "", *(_grouped(results, "failed") or ["Nothing."])]
    lines += ["", "## What a version cannot do without a patch either (skipped)", ""]
    lines += _grouped(results, "not_there") or ["Nothing."]
    return "\n".join([*lines, "", notes.strip(), ""])


def _grouped(results: list[dict[str, Any]], kind: str) -> list[str]:
    """One line per test and what it said, with the environments."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for one in result["parts"].values():
            for test, said in one.get(kind, {}).items():
                said = re.sub(r"transformers \d\S+ fails", "it fails", re.sub("[|<>]", " ", said))
                found.setdefault(test, {}).setdefault(said, []).append(result["name"])
    return [
        f"- `{test}`: " + "; ".join(f"{said} ({', '.join(names)})" for said, names in told.items())
        for test, told in sorted(found.items())
    ]


def notes_of(page: Path) -> str:
    """What people wrote below the generated part stays."""
    text = page.read_text() if page.exists() else ""
    return text[text.index("## Notes") :] if "## Notes" in text else "## Notes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[e.name for e in ENVIRONMENTS], default=[])
    parser.add_argument("--heavy", action="store_true", help="also environments of several GB")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--table", action="store_true", help="only write the page from the results that are there"
    )
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for environment in ENVIRONMENTS:
        chosen = environment.name in asked.only if asked.only else asked.heavy or not environment.heavy
        if asked.table or not chosen:
            continue
        began = time.perf_counter()
        cost = f" ({environment.heavy})" if environment.heavy else ""
        print(f"{environment.name}: making the environment{cost}", flush=True)
        make(environment)
        print(f"{environment.name}: ready after {time.perf_counter() - began:.0f} s, running", flush=True)
        result = run(environment, asked.jobs)
        (RESULTS / f"{environment.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        counts = {p: (one["passed"], len(one["failed"])) for p, one in result["parts"].items()}
        print(
            f"{environment.name}: {result['seconds']} s, passed and failed: {counts or 'no report'}",
            flush=True,
        )
    kept = [RESULTS / f"{e.name}.json" for e in ENVIRONMENTS]
    results = [json.loads(path.read_text()) for path in kept if path.exists()]
    for result in results:
        report = RESULTS / f"{result['name']}.xml"
        result["parts"] = read(report, tuple(result["parts"])) if report.exists() else result["parts"]
    PAGE.write_text(table(results, notes_of(PAGE)))
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(results)} environments")


if __name__ == "__main__":
    main()
