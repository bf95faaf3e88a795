"""Half precision: every attention call must stay within twice the error of plain torch in that dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.program import Program
from hf_attn_patch.install import stack
from hf_attn_patch.kernels import attention

from ..kernels.budget import cast, check_budget, outputs, rounded
from .base import Bench, Pairs, Wrong, setting


class Calls:
    """The attention calls of a block, recorded."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def __enter__(self) -> Calls:
        self.before = stack.attention

        def record(program: Program, impl: str) -> Any:
            result = self.before(program, impl)
            self.programs.append(program)
            if not torch.isfinite(result.output).all():
                raise Wrong(f"not finite: {program}")
            return result

        stack.attention = record
        return self

    def __exit__(self, *error: Any) -> None:
        stack.attention = self.before


def low(bench: Bench, dtype: torch.dtype, casts: bool) -> Pairs:
    """One forward (and a decoded token) in `dtype`: by autocast, or because the patched model is cast."""
    model = bench.fresh().float()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in bench.inputs(left_pad=0).items()}
    with bench.patched(model), Calls() as calls:
        plain = bench.forward(model, inputs)
        if casts:
            model.to(dtype)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        calls.programs.clear()
        with torch.autocast("cpu", dtype, enabled=not casts):
            output = bench.forward(model, inputs)
            if bench.decoder:
                bench.generate(model, inputs, 3)
    if not torch.isfinite(output).all():
        raise Wrong("outputs are not finite")
    seen = {p.query.dtype for p in calls.programs}
    if casts and seen - {dtype}:
        raise Wrong(f"attention ran in {seen}")
    for number, program in enumerate(calls.programs):
        try:
            in_budget(program, dtype, autocast=not casts)
        except AssertionError as error:
            raise Wrong(f"call {number}: {error}") from None
    # the comparison with the dense control shows whether the method did anything
    yield "a forward in float32", plain, plain


def in_budget(program: Program, dtype: torch.dtype, autocast: bool) -> None:
    """`program` as it ran: the error against float64 is at most twice that of plain torch in `dtype`."""
    truth = outputs(rounded(program, dtype), "reference", False)
    plain = outputs(cast(program, dtype), "reference", False)
    with torch.autocast("cpu", dtype, enabled=autocast):
        got: Tensor = attention(program, "torch").output
    check_budget(("output",), truth, plain, [got], dtype, f"torch in {dtype}")


for _dtype, _name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
    setting(
        f"autocast {_name}", "torch.autocast around forwards; every call within 2x the error of plain torch"
    )(lambda bench, dtype=_dtype: low(bench, dtype, casts=False))
    setting(
        f"model cast to {_name} after patching",
        ".half() / .to(bfloat16) of the patched model; the same budget",
    )(lambda bench, dtype=_dtype: low(bench, dtype, casts=True))


@setting(".to(float64) and back", "patched in float32, then cast to float64; equals patched in float64")
def widened(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs()
    with bench.patched(model):
        want = bench.forward(model, inputs)
    other = bench.fresh()
    kept = {name: p.clone() for name, p in other.named_parameters()}
    other.float()
    with bench.patched(other):
        other.double()
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in kept:
                    p.copy_(kept[name])
        rounded = bench.forward(other, inputs)
    # tensors that a method drew were rounded to float32 once: compare with the same rounding
    with bench.patched(model) as handle:
        if handle is not None:
            own = [p for n, p in [*model.named_parameters(), *model.named_buffers()] if "attn_patch" in n]
            for p in own:
                if p.is_floating_point():
                    p.data = p.data.float().double()
        want = bench.forward(model, inputs)
    yield "outputs", rounded, want
