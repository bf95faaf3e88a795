"""A benchmark case: who competes, what work is done, and the rows of the result; errors become rows too."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .timing import Clock, Times

TOLERANCE = (
    2e-2  # relative difference of two bf16 results of one function; the gate has tested the kernels properly
)


class NotAvailable(Exception):
    """A competitor cannot run here; the message says why."""


@dataclass
class Context:
    """Where cases run. tiny: sizes for Triton's interpreter."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tiny: bool = False
    clock: Clock = field(default_factory=lambda: Clock("cuda"))

    @property
    def on(self) -> torch.device:
        return torch.device(self.device)

    def heads(self, B: int, H: int, L: int, D: int) -> Tensor:
        """Random [B, H, L, D] as a model gives it: a view of [B, L, H, D]."""
        return torch.randn(B, L, H, D, device=self.device, dtype=self.dtype).transpose(1, 2)

    def qkv(self, B: int, H: int, Hkv: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        return self.heads(B, H, L, D), self.heads(B, Hkv, L, D), self.heads(B, Hkv, L, D)


@dataclass
class Prepared:
    """What a case runs.

    calls: by competitor, "ours" among them. missing: why a competitor does not take part.
    work: amount per call of each competitor, 1e12 operations or 1e9 bytes as `unit` says; `work["ours"]` stands for
        those not listed.
    same: competitors whose result must equal ours within `tolerance`; view: how to read a result.
    """

    calls: dict[str, Callable[[], Any]]
    missing: dict[str, str] = field(default_factory=dict)
    unit: str = "TFLOP/s"
    work: dict[str, float] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    view: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    extra: dict[str, Any] = field(default_factory=dict)
    memory: bool = False  # also measure the peak memory of every call

    def compete(self, name: str, make: Callable[[], Callable[[], Any]], same: bool = True) -> None:
        """Add a competitor, or the reason that it is missing."""
        try:
            call = make()
            call()
        except NotAvailable as error:
            self.missing[name] = str(error)
        except Exception as error:  # a competitor that breaks is no reason to drop the case
            self.missing[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        else:
            self.calls[name] = call
            self.same += (name,) if same else ()


@dataclass(frozen=True)
class Case:
    """group/name with sizes `at`; `prepare(context)` builds inputs and competitors."""

    group: str
    name: str
    at: dict[str, Any]
    prepare: Callable[[Context], Prepared]

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name} " + " ".join(f"{k}={v}" for k, v in self.at.items())


def row(case: Case, provider: str, status: str, **values: Any) -> dict[str, Any]:
    """One row of the result file. status: "ok", or "missing" (a competitor), "error", "not run" with a `why`."""
    return {"case": case.id, "group": case.group, "name": case.name, "at": case.at, "provider": provider,
            "status": status, **values}  # fmt: skip


def agree(prepared: Prepared) -> str | None:
    """Which competitor computes something else than ours, or None."""
    look = lambda name: prepared.view.get(name, lambda x: x)(prepared.calls[name]()).detach()
    ours = look("ours") if prepared.same else None
    for name in prepared.same:
        theirs = look(name)
        if theirs.shape != ours.shape:
            return f"{name} returns {list(theirs.shape)}, ours {list(ours.shape)}"
        difference = float((theirs - ours).float().norm() / theirs.float().norm().clamp(min=1e-30))
        if not difference <= prepared.tolerance:
            return f"ours and {name} differ by {difference:.3g} of the norm (allowed {prepared.tolerance})"
    return None


def run(case: Case, context: Context, warm: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of one case; an exception becomes one. warm: only compile everything, no times."""
    try:
        prepared = case.prepare(context)
        if (reason := agree(prepared)) is not None:
            yield row(case, "ours", "error", why=reason)
            return
        if warm:
            return
        times = context.clock.interleaved(prepared.calls)
        peaks = {n: context.clock.peak(c) for n, c in prepared.calls.items()} if prepared.memory else {}
        yield from rows_of(case, prepared, times, peaks)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error).strip()[:600]}"
        text += f" ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        yield row(case, "ours", "error", why=text)
        if is_fatal(error):
            raise
    finally:
        prepared = None  # type: ignore[assignment]
        gc.collect()
        if context.clock.gpu:
            torch.cuda.empty_cache()


def is_fatal(error: BaseException) -> bool:
    """True for errors after which this process cannot use the GPU any more."""
    text = str(error)
    return any(s in text for s in ("illegal memory access", "device-side assert", "unspecified launch failure",
                                   "misaligned address", "illegal instruction"))  # fmt: skip


def rows_of(
    case: Case, prepared: Prepared, times: dict[str, Times], peaks: dict[str, int | None]
) -> Iterator[dict[str, Any]]:
    """A row per competitor; the row of ours holds the ratios theirs / ours (above 1: we are faster)."""
    for name, time in times.items():
        work = prepared.work.get(name, prepared.work.get("ours"))
        values: dict[str, Any] = {"ms": time.json(), "unit": prepared.unit}
        values["rate"] = None if work is None else work / (time.p50 * 1e-3)
        if peaks.get(name) is not None:
            values["peak_mib"] = peaks[name] / 2**20
        if name == "ours":
            values["versus"] = {other: t.p50 / time.p50 for other, t in times.items() if other != name}
            values["extra"] = prepared.extra
        yield row(case, name, "ok", **values)
    for name, reason in prepared.missing.items():
        yield row(case, name, "missing", why=reason)
