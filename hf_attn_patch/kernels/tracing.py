"""What a traced forward (torch.compile, torch.export) may know: shapes and rules, never the values of tensors.

What depends on shapes and hashable rules only is computed outside of the trace and enters it as a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..call.rules import Rule


def described(x: Any) -> Any:
    """A rule as nested tuples (class, field values ...). An object made while torch.compile traces reaches a constant
    function with the *defaults* of its class, not with its values (torch 2.13)."""
    if isinstance(x, Rule):
        kind: Any = type(x)
        return (kind, *[described(getattr(x, name)) for name in kind.__dataclass_fields__])
    return tuple(described(y) for y in x) if isinstance(x, tuple) else x


def rebuilt(x: Any) -> Any:
    """The rule that `described` took apart."""
    if not isinstance(x, tuple):
        return x
    parts = [rebuilt(y) for y in x]
    return parts[0](*parts[1:]) if parts and isinstance(parts[0], type) else tuple(parts)


def known(number: Any) -> bool:
    """Whether a length is a plain number here: that of a static cache is a tensor while it is traced."""
    return not isinstance(number, Tensor)


def ranges_of(
    rule: Rule, runs: tuple[tuple[int, int], ...], end: int, causal: bool, window: int | None, left: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """`merged` for rows without padding, as a constant of the trace."""
    return _ranges(described(rule), runs, end, causal, window, left)


@torch.compiler.assume_constant_result
def _ranges(description: Any, runs: Any, end: int, causal: bool, window: int | None, left: int) -> Any:
    with _disable_current_modes():  # torch.export traces by modes, and numbers are wanted
        rule = rebuilt(description)
        first, last = torch.tensor([a for a, _ in runs]), torch.tensor([b for _, b in runs])
        return tuple(tuple(run) for run in merged(rule, [0], first, last, end, causal, window, left))


def merged(
    rule: Rule,
    starts: Any,
    first: Tensor,
    last: Tensor,
    end: int,
    causal: bool,
    window: int | None,
    left: int = 0,
) -> list[list[tuple[int, int]]]:
    """Per run of query columns [first, last), int64 [n], the sorted disjoint ranges of key columns in [left, end) that
    some head of a static rule may read, whose positions count from one of the columns `starts`."""
    hi = (last if causal else torch.full_like(last, end)).clamp(max=end)
    lo = (first - window + 1 if window is not None else torch.zeros_like(first)).clamp(min=left)
    ranges = []
    for start in starts:
        for head in range(rule.heads):
            maybe, _ = rule.key_ranges(head, first - start, last - start, end - start)
            for a, b in maybe:
                ranges.append(torch.stack([torch.maximum(a + start, lo), torch.minimum(b + start, hi)], -1))
    found = []
    for per_run in torch.stack(ranges, 1).tolist():
        joined: list[tuple[int, int]] = []
        for a, b in sorted((a, b) for a, b in per_run if b > a):
            if joined and a <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
            else:
                joined.append((a, b))
        found.append(joined)
    return found
