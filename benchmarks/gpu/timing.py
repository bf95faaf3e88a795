"""Timing on a GPU: all competitors in one loop, a cold L2, device time by events; perf_counter on a CPU (for tests)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

LEAST_RUNS = 10
MOST_RUNS = 50


@dataclass(frozen=True)
class Times:
    """Quantiles of the run times of one call, milliseconds, and how many runs there were."""

    p20: float
    p50: float
    p80: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Times:
        """From at least one time in milliseconds."""
        ordered = sorted(values)
        at = lambda share: ordered[round(share * (len(ordered) - 1))]
        return cls(at(0.2), statistics.median(ordered), at(0.8), len(ordered))

    def json(self) -> dict[str, float]:
        return asdict(self)


class Clock:
    """Times calls on `device`.

    Before every run 256 MiB (or twice the L2, if that is more) are overwritten, and the GPU spins until the host has
    queued the call: what is timed is the device, not how fast Python launches. A call that waits for the device itself
    (a data-dependent shape) is timed with that wait.
    """

    def __init__(self, device: str, seconds: float = 3.0, least: int = LEAST_RUNS):
        self.device, self.seconds, self.least = device, seconds, least
        self.gpu = torch.device(device).type == "cuda"
        self._flush: torch.Tensor | None = None

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def _cold(self) -> None:
        if self._flush is None:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
            self._flush = torch.empty(max(256 << 20, 2 * cache), dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def once(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(seconds until the call returns, seconds until the device is done)."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        self.synchronize()
        return queued, time.perf_counter() - begin

    def interleaved(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Times]:
        """Times of every call; one run of each per round, in an order that rotates."""
        queue, whole = {}, 0.0
        for name, call in calls.items():
            call()
            queue[name], done = self.once(call)
            whole += done
        rounds = int(min(max(self.seconds / max(whole, 1e-6), self.least), max(MOST_RUNS, self.least)))
        names = list(calls)
        found: dict[str, list[Any]] = {name: [] for name in names}
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(self._run(calls[name], queue[name]))
        self.synchronize()
        return {
            name: Times.of([x if isinstance(x, float) else x[0].elapsed_time(x[1]) for x in values])
            for name, values in found.items()
        }

    def _run(self, call: Callable[[], Any], queue: float) -> Any:
        if not self.gpu:
            return self.once(call)[1] * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cold()
        if hasattr(torch.cuda, "_sleep"):  # at about 2 GHz, twice as long as the host needs, 20 ms at most
            torch.cuda._sleep(int(min(2 * queue + 1e-4, 2e-2) * 2e9))
        begin.record()
        call()
        end.record()
        return begin, end

    def host(self, call: Callable[[], Any], runs: int = 5) -> Times:
        """Wall time of work that the host does or waits for (building a layout)."""
        call()
        return Times.of([self.once(call)[1] * 1e3 for _ in range(runs)])

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes allocated during `call` beyond what was allocated before; None where nobody counts (a CPU)."""
        if not self.gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before
