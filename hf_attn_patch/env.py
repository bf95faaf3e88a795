"""Environment report: the facts that a bug report or a number needs beside it.

python -m hf_attn_patch env
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

PACKAGES = (
    "torch", "transformers", "triton", "safetensors", "numpy", "peft", "accelerate", "scikit-learn", "datasets",
    "jinja2", "matplotlib", "rich", "typer",
)  # fmt: skip
VARIABLES = (
    "HF_HUB_OFFLINE", "HF_HOME", "HF_ATTN_PATCH_CACHE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE",
)  # fmt: skip


def environment(devices: bool = True) -> dict[str, Any]:
    """Versions, machine and settings, ready for JSON.

    Args:
        devices: also ask torch for its devices and threads (imports torch).
    """
    facts: dict[str, Any] = {
        "hf_attn_patch": __version__,
        "git": git_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if devices:
        facts["torch"] = _torch_facts()
    return facts


def git_hash() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` if tracked files differ; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if changed else "")


def command_line() -> str:
    """The command that started this process, as it can be typed again."""
    import shlex

    first = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    if first == "__main__.py":
        first = f"python -m {Path(sys.argv[0]).parent.name}"
    return " ".join([first, *(shlex.quote(a) for a in sys.argv[1:])])


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Physical memory, or None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (what, value) rows; packages that are absent say so."""
    rows = [(k, str(v)) for k, v in facts.items() if not isinstance(v, dict) and v is not None]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    rows += [(f"torch {k.replace('_', ' ')}", str(v)) for k, v in facts.get("torch", {}).items()]
    rows += [(f"${k}", v) for k, v in facts["variables"].items()]
    return rows


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory_gib(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [],
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts["devices"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
