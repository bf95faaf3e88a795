"""Compile recorded launches for GPUs that are not here, and read registers, spills and shared memory from the result.

A design tool first (`python -m hf_attn_patch.kernels.triton.aot --module classes --target sm90`), a test second: every
kernel, in every configuration that its launcher can choose, compiles for every target, fits its shared memory and does
not spill.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .launch import TARGETS, Launch, Target, interpreted, recording

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass
class Case:
    """Something a user can ask for: `run` calls the kernels' Python code on meta tensors, under `recording`.

    label: unique within the kernel file. default: part of the quick suite in `make test` (the rest is `make aot`).
    """

    label: str
    run: Callable[[], Any]
    default: bool = False


def sizes() -> Iterator[tuple[str, torch.dtype, int, bool]]:
    """(name of a dtype, dtype, head dimension, whether to compile options too) for the cases of a kernel file.

    fp16, which compiles like bf16, has 64 and 128 only, options bf16 at 64 and 128."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for dim in (16, 40, 64, 80, 96, 128, 192, 256):
            usual = dim in (64, 128)
            if usual or dtype != torch.float16:
                yield name, dtype, dim, usual and dtype == torch.bfloat16


@dataclass
class Compiled:
    """Resources of one kernel on one target.

    registers: per thread. spills: bytes of local memory per thread (CUDA: stack frame) or spilled VGPRs * 4 (AMD).
    shared: bytes per program. assembly: PTX or AMDGCN text. dots: the kernel asks for a product of matrices of 16 bits
    or fewer (fp32 products are not for tensor cores).
    """

    kernel: str
    target: Target
    registers: int
    spills: int
    shared: int
    assembly: str
    dots: bool = False

    @property
    def fits(self) -> bool:
        return self.shared <= self.target.shared

    @property
    def tensor_cores(self) -> bool:
        """True if the machine code multiplies matrices with the instructions made for it."""
        return re.search(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", self.assembly) is not None

    @property
    def local_depot(self) -> bool:
        """True if PTX declares an array in local memory (an indexed one that registers cannot hold)."""
        return "__local_depot" in self.assembly


def source_of(launch: Launch) -> Any:
    """`triton.compiler.ASTSource` of a launch, specialised as the JIT would: pointers aligned to 16 bytes, integers
    equal to 1 and None as constants, multiples of 16 marked."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constexprs)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constexprs:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"argument {name} of {launch.name} is a {type(value).__name__}")
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile one recorded launch for `target`.

    Raises:
        Exception: whatever the compiler raises; the launch does not compile.
    """
    from triton.backends.compiler import GPUTarget

    built = triton.compile(
        source_of(launch),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    if target.backend == "cuda":
        registers, spills = cubin_resources(built.asm["cubin"])
        text = built.asm["ptx"]
    else:
        text = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    dots = re.search(r"tt\.dot .*: tensor<[0-9x]*(bf16|f16|i8)", built.asm["ttir"]) is not None
    return Compiled(launch.name, target, registers, spills, built.metadata.shared, text, dots)


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread) of the one kernel in a cubin; Triton ships the tool."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


# -- the whole matrix -----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One kernel of one case on one target; `error` instead of numbers if it does not compile."""

    module: str
    case: str
    default: bool
    target: str
    kernel: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    fits: bool = False
    dots: bool = False
    tensor_cores: bool = False
    local_depot: bool = False
    error: str = ""


def modules_with_cases() -> list[str]:
    """Kernel files that define `aot_cases`, sorted; found by reading them, nothing is imported."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(r"^def aot_cases\(", file.read_text(), re.M)]


def cases_of(module: str) -> list[Case]:
    """The cases of kernel file `module`.

    Raises:
        ValueError: two cases have the same label.
    """
    cases: list[Case] = importlib.import_module(f"{__package__}.{module}").aot_cases()
    labels = [case.label for case in cases]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{module}: more than one case is called {', '.join(twice)}")
    return cases


def compile_case(module: str, label: str, target: str) -> list[Row]:
    """Compile every launch of one case for one target."""
    case = next(case for case in cases_of(module) if case.label == label)
    rows: list[Row] = []
    kernel = ""
    try:
        with configs.as_shipped(), recording(target) as record:
            case.run()
        if not record.launches:
            raise RuntimeError("the case launches no kernel")
        for launch in record.launches:
            kernel = launch.name
            built = compile_launch(launch, TARGETS[target])
            numbers = (built.registers, built.spills, built.shared, built.fits)
            flags = (built.dots, built.tensor_cores, built.local_depot)
            rows.append(Row(module, label, case.default, target, kernel, *numbers, *flags))
    except Exception as error:  # one broken case must not hide the others
        text = f"{type(error).__name__}: {error}".strip()
        rows.append(Row(module, label, case.default, target, kernel, error=text[:2000]))
    return rows


def compile_matrix(
    modules: Sequence[str], targets: Sequence[str], default_only: bool = False, jobs: int = 1
) -> Iterator[Row]:
    """Rows of all cases of `modules` on `targets`, in that order, whatever `jobs` (processes) is."""
    tasks = [
        (module, case.label, target)
        for module in modules
        for case in cases_of(module)
        if case.default or not default_only
        for target in targets
    ]
    if jobs <= 1:
        for task in tasks:
            yield from compile_case(*task)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, *zip(*tasks), chunksize=4) if tasks else ():
            yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a case does not compile or does not fit."""
    parser = argparse.ArgumentParser(
        prog="hf_attn_patch.kernels.triton.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--module", action="append", choices=modules_with_cases(), help="kernel file (repeatable; all)"
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="architecture (repeatable; all)"
    )
    parser.add_argument("--default", action="store_true", help="only the cases of the quick suite")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error(
            "TRITON_INTERPRET=1 is set: the interpreter does not compile; run with TRITON_INTERPRET=0"
        )
    use_cache()
    rows = []
    for row in compile_matrix(
        options.module or modules_with_cases(), options.target or list(TARGETS), options.default, options.jobs
    ):
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    return int(any(row.error or not row.fits for row in rows))


def line(row: Row) -> str:
    """A row as one line of text."""
    head = f"{row.target:7} {row.module}: {row.case} {row.kernel}"
    if row.error:
        return f"{head}  ERROR {row.error.splitlines()[0]}"
    return (
        f"{head}  {row.registers} registers, {row.spills} B spilled, {row.shared / 1024:.1f} KiB shared"
        + ("" if row.fits else "  DOES NOT FIT")
        + ("  NO TENSOR CORES" if row.dots and not row.tensor_cores else "")
    )


def use_cache() -> None:
    """Keep compiled kernels under HF_ATTN_PATCH_CACHE, so that a second run only looks them up."""
    root = Path(os.environ.get("HF_ATTN_PATCH_CACHE", Path.home() / ".cache" / "hf_attn_patch"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(root / "aot"))


if __name__ == "__main__":
    from hf_attn_patch.kernels.triton import aot

    sys.exit(aot.main())
