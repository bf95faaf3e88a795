"""How Triton kernels are launched: on a GPU, in the interpreter, or *recorded* for ahead-of-time compilation.

Every kernel of this package goes through `launch`. While `recording` is active nothing runs: the launch is noted with
the types of its arguments, so that `aot` compiles exactly what a GPU would be asked to run, for any target, on a
machine that has none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    name: ``sm80`` … ``gfx942``. backend: ``cuda`` or ``hip``. arch: what `triton.compile` wants. warp: its threads.
    shared: bytes of shared memory (LDS) one program may use.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int


# shared memory per block: CUDA C programming guide, table of compute capabilities; CDNA3 ISA (LDS of 64 KiB)
TARGETS = {
    t.name: t
    for t in (
        Target("sm80", "cuda", 80, 32, 163 * 1024),
        Target("sm90", "cuda", 90, 32, 227 * 1024),
        Target("sm100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_available(device: torch.device) -> str | None:
    """Reason kernels cannot run on tensors of `device`, or None."""
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return None
    if device.type == "meta" and _recording is not None:
        return None
    way_out = "; set TRITON_INTERPRET=1 to run them, slowly, on a CPU" if device.type == "cpu" else ""
    return f"Triton kernels need a CUDA or ROCm GPU, the tensors are on {device.type}{way_out}"


@dataclass
class Launch:
    """One recorded launch: kernel, positional arguments (tensors, numbers, None) by name, constexprs, options."""

    kernel: Any
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")


@dataclass
class Recording:
    """What happened under `recording`."""

    target: Target
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[Recording]:
    """Note launches for `target` instead of running them; tensors may live on the ``meta`` device.

    Raises:
        KeyError: unknown target.
    """
    global _recording
    before, _recording = _recording, Recording(TARGETS[target])
    try:
        yield _recording
    finally:
        _recording = before


def recording_active() -> bool:
    """True inside `recording`."""
    return _recording is not None


def target_of(device: torch.device) -> Target:
    """The architecture kernels on `device` run on (the nearest known one); the interpreter counts as sm80."""
    if _recording is not None:
        return _recording.target
    if device.type != "cuda":
        return TARGETS["sm80"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return TARGETS["sm80" if major < 9 else "sm90" if major == 9 else "sm100"]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid`. Positional arguments are the kernel's run-time arguments in order (tensors, ints,
    floats, None for an absent tensor), keywords its ``tl.constexpr`` ones. An empty grid does nothing."""
    if _recording is not None:
        names = kernel.arg_names[: len(arguments)]
        _recording.launches.append(
            Launch(kernel, dict(zip(names, arguments)), constexprs, num_warps, num_stages)
        )
        return
    if 0 in grid:
        return
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constexprs)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least` (tensor cores want 16)."""
    return max(least, triton.next_power_of_2(n))


def split_dim(dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two (the second 0 if one is enough), so that 72, 80, 96, 160, 192 do not pay
    for 128 or 256: 80 -> (64, 16), 96 -> (64, 32), 72 -> (64, 16), 40 -> (32, 16), 64 -> (64, 0)."""
    whole = power_of_two(dim)
    if whole == dim or whole <= 16:
        return whole, 0
    first = whole // 2
    second = power_of_two(dim - first)
    return (first, second) if first + second < whole else (whole, 0)
