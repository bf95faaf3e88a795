"""Peak figures of GPUs: dense matrix products, memory, exponentials. What a kernel can never beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """One GPU. flops: dense matrix products per second by dtype (tensor cores, no 2:4 sparsity; float32: TF32).

    bytes_per_s: of its memory. exps_per_s: exponentials, ``multiprocessors * per clock * boost clock``; None = no
    figure we could source, so exponentials are left out of its roofline. source: where the numbers are from.
    """

    name: str
    flops: dict[str, float]
    bytes_per_s: float
    exps_per_s: float | None
    source: str


def _halves(flops: float, single: float) -> dict[str, float]:
    return {"bfloat16": flops, "float16": flops, "float32": single}


# 16 results per clock and multiprocessor: CUDA C++ Programming Guide, throughput of native arithmetic instructions,
# compute capability 8.0 and 9.0 (UNVERIFIED here: the page was not at hand)
_A100, _H100 = 108 * 16 * 1.41e9, 132 * 16 * 1.83e9

GPUS: dict[str, Gpu] = {
    "A100": Gpu("A100", _halves(312e12, 156e12), 2.039e12, _A100, "NVIDIA A100 80GB SXM data sheet; UNVERIFIED"),
    "H100": Gpu(
        "H100", _halves(989.4e12, 494.7e12), 3.35e12, _H100,
        "NVIDIA H100 SXM5 (Hopper white paper), READ in glennklockwood.com/garden/processors/h100",
    ),
    "H200": Gpu(
        "H200", _halves(989.4e12, 494.7e12), 4.8e12, _H100,
        "NVIDIA H200 SXM data sheet (the H100's chip), READ second-hand in itkb.uw.cz, 2026-06-22",
    ),
    "MI300X": Gpu(
        "MI300X", _halves(1307.4e12, 653.7e12), 5.3e12, None,
        "AMD Instinct MI300X data sheet; flops UNVERIFIED, memory READ in aiwiki.ai (amd_instinct_mi300x)",
    ),
}  # fmt: skip


def gpus(names: Iterable[str]) -> list[Gpu]:
    """GPUs by name, upper or lower case.

    Raises:
        ConfigError: unknown name.
    """
    found = []
    for name in names:
        if name.upper() not in GPUS:
            hint = did_you_mean(name.upper(), GPUS)
            raise ConfigError(f"GPU {name!r} is unknown{hint}; there are figures of {', '.join(GPUS)}")
        found.append(GPUS[name.upper()])
    return found
