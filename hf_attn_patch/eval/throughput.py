"""`throughput`: prefill and decode speed, time to first token, memory and KV bytes, measured in turns per length.

Dense and patched take turns on each item (dense, a, b, dense, a, b, …), because a shared machine drifts by more than
most patches change. Nothing is derived: the cache is asked for the bytes it holds after the last token, and the memory
is the largest that the process (CPU, Linux) or the device (CUDA) held during the item beyond what it held before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .generation import check_lengths
from .measurements import _wait, cache_nbytes, prose_ids
from .task import Metric, Scores, Task, Tick

MIB = float(1 << 20)
PEAK = Metric("peak memory", "MiB", False, digits=1)


@dataclass(frozen=True)
class Run:
    """One measurement. ids: int64 [batch, length]."""

    length: int
    ids: Any


@dataclass
class Throughput(Task):
    """Speed and memory of a language model.

    Attributes:
        lengths: prompt lengths in tokens. new_tokens: tokens decoded after the prompt, one by one. repeats:
        measurements per length. batch_size: rows per forward, all alike; tokens per second count all rows.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    new_tokens: int = 32
    repeats: int = 3
    batch_size: int = 1

    name: ClassVar[str] = "throughput"
    summary: ClassVar[str] = "speed of prefill and decode, first token, memory, KV bytes"
    in_turns: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("prefill", "tokens/s", True, digits=1),
        Metric("decode", "tokens/s", True, digits=1),
        Metric("first token", "ms", False, digits=1),
        Metric("kv cache", "MiB", False, digits=2),
    )

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"throughput: lengths={list(self.lengths)} must be at least 2 tokens each")
        small = {k: v for k in ("new_tokens", "repeats", "batch_size") if (v := getattr(self, k)) < 1}
        if small:
            raise ValueError(f"throughput: {small} must be at least 1")

    def items(self, model: Any, processor: Any, seed: int) -> list[Run]:
        check_lengths(self.name, model, processor, self.lengths, self.new_tokens)
        with peak_memory(model) as peak:
            pass
        if peak.known:
            self.metrics = (*type(self).metrics, PEAK)  # type: ignore[misc]
        ids = prose_ids(processor, max(self.lengths))
        rows = {n: ids[:, :n].expand(self.batch_size, -1).to(model.device) for n in self.lengths}
        return [Run(n, rows[n]) for _ in range(self.repeats) for n in self.lengths]

    def batches(self, items: list[Run]) -> list[list[int]]:
        return [[i] for i in range(len(items))]

    def groups(self, items: list[Run]) -> list[str]:
        return [str(item.length) for item in items]

    def facts(self, items: list[Run]) -> list[dict[str, Any]]:
        return [{"length": item.length, "rows": self.batch_size} for item in items]

    def score(self, model: Any, processor: Any, items: list[Run], reference: Any, tick: Tick) -> Scores:
        scores: Scores = {m.name: [] for m in self.metrics}
        for item in items:
            answer(
                model, item.ids[:, :64], 2
            )  # the first call of a kernel or a thread pool is no measurement
            with peak_memory(model) as peak:
                tokens, first, rest, cache = answer(model, item.ids, self.new_tokens)
            rows = item.ids.shape[0]
            scores["prefill"].append(rows * item.length / first)
            scores["decode"].append(rows * (tokens.shape[1] - 1) / rest if rest else float("nan"))
            scores["first token"].append(1000 * first)
            scores["kv cache"].append(cache_nbytes(cache) / MIB)
            if PEAK.name in scores:
                scores[PEAK.name].append(peak.bytes / MIB)
            tick(1)
        return scores


def answer(model: Any, ids: Any, new: int) -> tuple[Any, float, float, Any]:
    """Greedy decoding without generate's overhead: ids int64 [B, L] -> (tokens [B, new], seconds to the first token,
    seconds of the other new - 1, the cache). End-of-text does not stop it: every run does the same work."""
    import torch

    with torch.inference_mode():
        _wait(model)
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1:].argmax(-1)]
        _wait(model)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new - 1):
            out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1:].argmax(-1))
        _wait(model)
        rest = time.perf_counter() - start if new > 1 else 0.0
    return torch.cat(tokens, 1), first, rest, out.past_key_values


@dataclass
class Peak:
    """bytes: held at most, beyond what was held at the start. known: whether this machine can tell."""

    bytes: float = float("nan")
    known: bool = False


@contextmanager
def peak_memory(model: Any) -> Iterator[Peak]:
    """Measures what runs inside: torch's allocator on CUDA, the resident memory of the process on Linux."""
    import torch

    peak = Peak()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        yield peak
        peak.bytes, peak.known = float(torch.cuda.max_memory_allocated(model.device) - before), True
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is held now
        start = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes, peak.known = float(max(_resident("VmHWM") - start, 0)), True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
