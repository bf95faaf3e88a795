"""Error budgets instead of hand-picked tolerances.

The truth is the reference executor in float64. An executor in dtype X may be off by twice what plain torch (the
reference in X) is off, plus one rounding band of X at the size of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.ragged import KVGroup, RaggedKV
from hf_attn_patch.kernels import attention


def cast(x: Any, dtype: torch.dtype, device: str | None = None) -> Any:
    """Copy of a program (or part of one) with every floating tensor in `dtype`, and all of it on `device` if given."""
    if isinstance(x, Tensor):
        return x.detach().to(device, dtype if x.is_floating_point() else None)
    if isinstance(x, RaggedKV):
        return RaggedKV([cast(g, dtype, device) for g in x.groups], x.seen)
    if isinstance(x, KVGroup):
        columns = cast(x.columns, dtype, device)
        return KVGroup(x.heads, cast(x.key, dtype, device), cast(x.value, dtype, device), columns, x.whole)
    if isinstance(x, list):
        return [cast(y, dtype, device) for y in x]
    if is_dataclass(x) and not isinstance(x, type) and type(x).__name__ not in ("SinkWindow",):
        changed = {
            f.name: cast(getattr(x, f.name), dtype, device)
            for f in fields(x)
            if f.init and f.name != "_native"
        }
        if device is not None and isinstance(x, Mask):
            changed["device"] = device
        return replace(x, **changed)
    return x


def device_of(impl: str) -> str:
    """Where an executor is tested: Triton on the GPU if there is one (else in its interpreter), the others on a CPU."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def rounded(program: Program, dtype: torch.dtype) -> Program:
    """The program whose inputs are exactly representable in `dtype`, in float64: both sides start from it."""
    return cast(cast(program, dtype), torch.float64)


def outputs(program: Program, impl: str, gradients: bool) -> list[Tensor]:
    """Output, and gradients of query, key and value for a fixed cotangent, as float64."""
    leaves: list[Tensor] = []
    if gradients:
        program = replace(
            program,
            **{n: getattr(program, n).clone().requires_grad_(True) for n in ("query", "key", "value")},
        )
        leaves = [program.query, program.key, program.value]
    out = attention(program, impl).output
    result = [out]
    if gradients:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        weight = weight.to(out.device)
        result += torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=True)
        result = [torch.zeros(1) if r is None else r for r in result]
    return [r.detach().double().cpu() for r in result]


def assert_within_budget(
    program: Program, impl: str = "torch", dtype: torch.dtype = torch.float32, gradients: bool = False
) -> None:
    """Fail if `impl` in `dtype` is further from the float64 truth than the budget allows, or not finite."""
    truth = outputs(rounded(program, dtype), "reference", gradients)
    baseline = outputs(cast(program, dtype), "reference", gradients)
    got = outputs(cast(program, dtype, device_of(impl)), impl, gradients)
    names = ("output", "dq", "dk", "dv")
    check_budget(names, truth, baseline, got, dtype, f"{impl} in {dtype}\n{program}")


def check_budget(
    names: Sequence[str],
    truth: Sequence[Tensor],
    baseline: Sequence[Tensor],
    got: Sequence[Tensor],
    dtype: torch.dtype,
    what: str = "",
) -> None:
    """The rule itself: error of `got` <= 2x the error of `baseline` (plain torch in `dtype`) + one rounding band.

    Names that start with "d" are gradients: a backward pass rebuilds probabilities from rounded scores and
    log-sum-exp, so its band is four times as wide.
    """
    for name, t, b, g in zip(names, truth, baseline, got):
        t, b, g = (x.detach().double().cpu() for x in (t, b, g))
        assert g.shape == t.shape or g.numel() == 1, (
            f"{name}: shape {list(g.shape)}, expected {list(t.shape)}"
        )
        assert torch.isfinite(g).all(), f"{name}: not finite"
        band = torch.finfo(dtype).eps * max(float(t.abs().max()), 1e-3)
        if name.startswith("d"):
            band *= 4
        if dtype == torch.float64:  # here the truth itself is one of many equally rounded answers
            band *= 64
        allowed = 2 * float((b - t).abs().max()) + band
        error = float((g - t).abs().max())
        assert error <= allowed, f"{name}: error {error:.3g} exceeds budget {allowed:.3g}: {what}"
