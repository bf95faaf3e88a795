"""Efficiency length: from how many tokens on is a patched attention cheaper than the dense one?

Formula (CAB, arXiv 2210.07661, Shark-NLP/CAB scripts/efficiency_length): the baseline's cost is fitted by a quadratic
``a n^2 + b n + c`` over all lengths, the candidate's by a line ``d n + e`` (times without the shortest length, whose
cost is launches); the efficiency length is the larger root of ``a n^2 + (b - d) n + (c - e)``.

Measured: the attention module (projections included) of a one-layer transformers model with the widths of CAB's
setting, forward only, variants in turns, median of `repeats` after a warm-up. Masks, embeddings and what a patch does
outside the module are not in it.

Differs from the original: the device is waited for; the peak of memory is of each call and not of all before; the
baseline may be eager or sdpa; a root outside the measured lengths, or none, is said and not printed as a length. Each
curve's exponent (log-log slope) stands beside: a line through a quadratic cost has a root too, and it means nothing.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import PatchError
from ..measurements import _wait
from ..variants import applied
from .bodies import LEARNERS, Body, Shape, learner, random_inputs

if TYPE_CHECKING:
    from torch import nn

    from ..harness import Choice

KINDS = ("time", "memory")
MIB = float(1 << 20)


@dataclass(frozen=True)
class EfficiencyLength:
    """A fit. a, b, c: of the baseline; d, e: of the candidate; r2: of the candidate's line; exponents: of both curves.

    root: larger root, None = there is none. shortest, longest: the lengths that were measured.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    r2: float
    exponents: tuple[float, float]
    root: float | None
    shortest: int
    longest: int

    @property
    def length(self) -> int | None:
        """The efficiency length in tokens, None where the measured range has none."""
        if self.root is None or not self.shortest <= self.root <= self.longest:
            return None
        return round(self.root)

    def __str__(self) -> str:
        if self.length is not None:
            return str(self.length)
        if self.root is None:
            why = "cheaper at every length" if self.a > 0 else "the baseline does not bend upwards"
            return f"none in range (no root: {why})"
        side = "below" if self.root < self.shortest else "above"
        return f"none in range (root {self.root:.0f}, {side} {self.shortest}-{self.longest})"


def efficiency_length(
    lengths: Sequence[int], baseline: Sequence[float], candidate: Sequence[float], skip_first: bool = False
) -> EfficiencyLength:
    """Fit the costs at `lengths` (same unit) and intersect; skip_first: the line leaves out the first length.

    Raises:
        ValueError: fewer than three lengths, not ascending, or costs that are missing.
    """
    n, dense, other = (np.asarray(x, dtype=np.float64) for x in (lengths, baseline, candidate))
    if len(n) < 3 or (np.diff(n) <= 0).any() or not len(n) == len(dense) == len(other):
        raise ValueError(f"cab: lengths={list(lengths)} must be three or more, ascending, with a cost each")
    if not (np.isfinite(dense).all() and np.isfinite(other).all()):
        raise ValueError("cab: a cost is missing, so nothing can be fitted")
    a, b, c = np.polyfit(n, dense, 2)
    kept = slice(1, None) if skip_first else slice(None)
    d, e = np.polyfit(n[kept], other[kept], 1)
    spread = ((other[kept] - other[kept].mean()) ** 2).sum()
    error = ((other[kept] - (d * n[kept] + e)) ** 2).sum()
    r2 = float(1 - error / spread) if spread > 0 else 1.0
    slopes = (_exponent(n, dense), _exponent(n, other))
    root = _larger_root(float(a), float(b - d), float(c - e))
    return EfficiencyLength(
        a=float(a),
        b=float(b),
        c=float(c),
        d=float(d),
        e=float(e),
        r2=r2,
        exponents=slopes,
        root=root,
        shortest=int(n[0]),
        longest=int(n[-1]),
    )


def _larger_root(a: float, b: float, c: float) -> float | None:
    """Larger root of a n^2 + b n + c for a > 0. A baseline that bends down (a <= 0) never overtakes a line for good."""
    inside = b * b - 4 * a * c
    if a <= 0 or inside < 0:
        return None
    return (-b + math.sqrt(inside)) / (2 * a)


def _exponent(n: np.ndarray, cost: np.ndarray) -> float:
    """p of cost ~ n^p; nan where a cost is 0."""
    return float(np.polyfit(np.log(n), np.log(cost), 1)[0]) if (cost > 0).all() else float("nan")


@dataclass(frozen=True)
class Setting:
    """What is measured. lengths: tokens, ascending. rows: batch. baseline: ``eager`` or ``sdpa``."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    repeats: int = 5
    rows: int = 1
    width: int = 512
    heads: int = 8
    baseline: str = "eager"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.baseline not in ("eager", "sdpa"):
            raise ValueError(f"cab: baseline={self.baseline!r} is none of eager, sdpa")
        if len(self.lengths) < 3 or sorted(set(self.lengths)) != list(self.lengths) or self.lengths[0] < 8:
            raise ValueError(
                f"cab: lengths={list(self.lengths)} must be three or more, ascending, from 8 tokens on"
            )
        if self.repeats < 1 or self.rows < 1:
            raise ValueError(f"cab: repeats={self.repeats} and rows={self.rows} must be at least 1")


@dataclass
class Costs:
    """Costs of one variant on one body. time: ms per length (median); spread: interquartile range in ms; memory: MiB
    held at most inside the call. fits: kind -> fit against the baseline (empty for the baseline itself)."""

    row: str
    label: str
    state: str = "measured"
    reason: str = ""
    time: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    fits: dict[str, EfficiencyLength] = field(default_factory=dict)


def measure(
    body: Body,
    choices: Sequence[Choice],
    setting: Setting,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Costs]:
    """Costs of the baseline and of each choice on `body`; tick is called with the number of lengths done."""
    variants: list[tuple[Costs, Choice | None]] = [(Costs(body.row, setting.baseline), None)]
    variants += [(Costs(body.row, choice.label), choice) for choice in choices]
    for done, length in enumerate(setting.lengths, 1):
        shape = Shape(setting.width, setting.heads, 1, 32, length)
        model = learner(body, shape, setting.seed, setting.baseline).to(setting.device).eval()
        model.device = torch.device(setting.device)  # type: ignore[assignment]
        inputs = random_inputs(body, shape, setting.rows, setting.seed)
        inputs = {name: value.to(setting.device) for name, value in inputs.items()}
        found: dict[str, list[float]] = {costs.label: [] for costs, _ in variants}
        for turn in range(setting.repeats + 1):
            for costs, choice in variants:
                if costs.state != "measured":
                    continue
                try:
                    seconds = _call(model, body, choice, inputs, timed_one)
                    if turn:  # the first call of a kernel or a thread pool is no measurement
                        found[costs.label].append(seconds)
                    else:
                        costs.memory.append(_call(model, body, choice, inputs, peak_one) / MIB)
                except PatchError as error:
                    costs.state, costs.reason = "refused", f"at {length} tokens: {error}"
        for costs, _ in variants:
            if times := found[costs.label]:
                costs.time.append(1000 * statistics.median(times))
                costs.spread.append(1000 * float(np.subtract(*np.percentile(times, [75, 25]))))
        tick(done)
    base = variants[0][0]
    for costs, _ in variants[1:]:
        if costs.state == "measured":
            costs.fits = {
                kind: efficiency_length(
                    setting.lengths, getattr(base, kind), getattr(costs, kind), kind == "time"
                )
                for kind in KINDS
            }
    return [costs for costs, _ in variants]


def _call(
    model: Any, body: Body, choice: Choice | None, inputs: dict[str, Any], meter: Callable[..., Any]
) -> float:
    """What `meter` says of the attention modules of `body` in one forward, all of them together."""
    from ...model.sites import find_sites

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # a window that saves nothing at a short length is no news
        with applied(model, None if choice is None else body.place(choice)):
            modules = [s.module for s in find_sites(model) if body.part in s.parts]
            with meter(modules, model) as total:
                model(**inputs)
    return float(total[0])


@contextmanager
def around(modules: Sequence[nn.Module], before: Any, after: Any) -> Iterator[None]:
    """`before()` and `after()` around every forward of `modules`."""
    hooks = [m.register_forward_pre_hook(lambda *_: before()) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: after()) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def timed_one(modules: Sequence[nn.Module], model: Any) -> Iterator[list[float]]:
    """Seconds inside the modules, as [sum]."""
    total, start = [0.0], [0.0]

    def before() -> None:
        _wait(model)
        start[0] = time.perf_counter()

    def after() -> None:
        _wait(model)
        total[0] += time.perf_counter() - start[0]

    with around(modules, before, after):
        yield total


@contextmanager
def peak_one(modules: Sequence[nn.Module], model: Any) -> Iterator[list[float]]:
    """Bytes that torch's allocator holds at most inside a module beyond what it held before, as [largest]."""
    largest: list[float] = [0.0]
    if model.device.type == "cuda":
        held = [0]

        def before() -> None:
            torch.cuda.reset_peak_memory_stats(model.device)
            held[0] = torch.cuda.memory_allocated(model.device)

        def after() -> None:
            largest[0] = max(largest[0], float(torch.cuda.max_memory_allocated(model.device) - held[0]))

        with around(modules, before, after):
            yield largest
        return
    running: list[Any] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints two lines per profile otherwise

    def start() -> None:
        running.append(
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        )
        running[-1].start()

    def stop() -> None:
        running[-1].stop()
        largest[0] = max(largest[0], peak_of(running[-1].profiler.kineto_results.events()))

    with around(modules, start, stop):
        yield largest


def peak_of(events: Any) -> float:
    """Most bytes held at once, from a profile's allocations and releases in order of time."""
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return float(most)


def rows_of(patterns: Sequence[str]) -> list[Body]:
    """The bodies that are measured and trained for these patterns."""
    return [body for body in LEARNERS if body.pattern in patterns]
