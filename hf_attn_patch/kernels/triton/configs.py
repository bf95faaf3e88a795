"""Block sizes, warps and stages per (kernel, architecture, head dimension, dtype): a small table, not an autotuner.

The rows are design points from ahead-of-time compilation (no spills, shared memory fits, see docs/kernels.md). A
file of measured rows, written by `tune`, takes precedence.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import interpreted, recording_active, target_of


@dataclass(frozen=True)
class Config:
    """Tokens per block of queries and of keys, and Triton's `num_warps` and `num_stages`."""

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


# kernel -> architecture ("" = any other) -> rows (largest head dimension, largest item size in bytes, Config)
TABLE: dict[str, dict[str, list[tuple[int, int, Config]]]] = {}  # filled by `rows` in each kernel file
INTERPRETER = Config(32, 32, 1, 1)

_forced: dict[str, Config] = {}
_as_shipped = False


def rows(kernel: str, **architectures: list[tuple[int, int, Config]]) -> None:
    """Declare the table of a kernel; `other` stands for every architecture that is not named."""
    TABLE[kernel] = {"" if name == "other" else name: table for name, table in architectures.items()}


def config(kernel: str, device: torch.device, dim: int, dtype: torch.dtype) -> Config:
    """Configuration of a kernel for heads of dimension `dim` (the larger of D and Dv)."""
    if kernel in _forced:
        return _forced[kernel]
    if interpreted() and not recording_active():
        return INTERPRETER
    target = target_of(device).name
    tuned = None if _as_shipped else _tuned().get(f"{kernel}/{target}/{dim}/{dtype.itemsize}")
    if tuned is not None:
        return tuned
    table = TABLE[kernel]
    for largest, size, found in table.get(target) or table[""]:
        if dim <= largest and dtype.itemsize <= size:
            return found
    raise ValueError(f"{kernel}: no configuration for head dimension {dim} in {dtype}")


@contextlib.contextmanager
def forced(kernel: str, chosen: Config) -> Iterator[None]:
    """Use `chosen` for `kernel` (tests and tuning)."""
    before = _forced.get(kernel)
    _forced[kernel] = chosen
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextlib.contextmanager
def as_shipped() -> Iterator[None]:
    """Ignore measured rows: the tables alone decide (ahead-of-time compilation, which documents them)."""
    global _as_shipped
    before, _as_shipped = _as_shipped, True
    try:
        yield
    finally:
        _as_shipped = before


# -- measured rows ------------------------------------------------------------------------------------------------


def tuned_path() -> Path:
    """Where measured configurations of this GPU live (HF_ATTN_PATCH_CACHE, default ~/.cache/hf_attn_patch)."""
    return _path(os.environ.get("HF_ATTN_PATCH_CACHE"))


@functools.cache
def _path(root: str | None) -> Path:
    folder = Path(root) if root else Path.home() / ".cache" / "hf_attn_patch"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    return folder / "kernels" / f"{name.replace(' ', '-').replace('/', '-')}.json"


@functools.cache
def _read(path: Path) -> dict[str, Config]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {key: Config(**row) for key, row in found.items()}


def _tuned() -> dict[str, Config]:
    return _read(tuned_path())


def remember(kernel: str, device: torch.device, dim: int, dtype: torch.dtype, chosen: Config) -> Path:
    """Write a measured configuration to the cache file; later calls (and processes) use it."""
    path = tuned_path()
    found = {**_tuned(), f"{kernel}/{target_of(device).name}/{dim}/{dtype.itemsize}": chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: asdict(row) for key, row in sorted(found.items())}, indent=1))
    _read.cache_clear()
    return path
