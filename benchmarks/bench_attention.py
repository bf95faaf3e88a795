"""Speed and memory of sparse attention on a CPU, against dense SDPA and compiled FlexAttention.

    python benchmarks/bench_attention.py --out benchmarks/results/attention-cpu.csv

Providers of one case are interleaved (one call of each per round), so that a busy machine slows all of them alike;
compare medians of one run only. No number is printed before every provider of the case has given the right answer.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import Neighborhood, Rule, SinkWindow
from hf_attn_patch.kernels import attention, plain
from hf_attn_patch.kernels.layout import layout_for
from hf_attn_patch.kernels.plan import plan_of

FIELDS = ["name", "provider", "mode", "metric", "unit", "x_name", "x_value", "y_20", "y_50", "y_80",
          "extra_config", "machine", "torch", "timestamp", "git", "command"]  # fmt: skip


def machine() -> str:
    """CPU model and threads."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {torch.get_num_threads()} threads"


class Report:
    """Rows of the csv."""

    def __init__(self) -> None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        self.common = {
            "machine": machine(),
            "torch": torch.__version__,
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "git": git.stdout.strip(),
            "command": shlex.join(["python", *sys.argv]),
        }
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        provider: str,
        metric: str,
        unit: str,
        x: tuple[str, Any],
        values: list[float],
        **extra: Any,
    ) -> None:
        ordered = sorted(values)
        at = lambda share: ordered[round(share * (len(ordered) - 1))]
        row = dict(
            name=name, provider=provider, mode="forward", metric=metric, unit=unit, x_name=x[0], x_value=x[1]
        )
        row |= dict(
            y_20=at(0.2), y_50=statistics.median(ordered), y_80=at(0.8), extra_config=json.dumps(extra)
        )
        self.rows.append(row | self.common)
        print(f"  {name:34s} {provider:18s} {metric:12s} {row['y_50']:10.4g} {unit}", flush=True)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)


def program_of(
    rule: Rule | None, L: int, H: int, Hkv: int, D: int, dtype: torch.dtype, causal: bool
) -> Program:
    g = torch.Generator().manual_seed(0)
    rand = lambda heads: torch.randn(1, heads, L, D, generator=g).to(dtype)
    mask = Mask(1, L, L, causal=causal)
    return Program(rand(H), rand(Hkv), rand(Hkv), mask, D**-0.5, rules=[] if rule is None else [rule])


def flex_provider(program: Program) -> tuple[Callable[[], torch.Tensor], float]:
    """(compiled FlexAttention on the same visibility, seconds to build the mask and compile)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule, L, causal = program.rule, program.q_len, program.mask.causal
    assert rule is not None

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        allowed = rule.visible(torch.zeros((), dtype=torch.long), q, k)
        return allowed & (k <= q) if causal else allowed

    torch._dynamo.reset()  # else the recompile limit of earlier cases silently leaves the unfused implementation
    begin = time.perf_counter()
    blocks = create_block_mask(seen, None, None, L, L, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    gqa = program.num_heads != program.num_kv_heads

    def call() -> torch.Tensor:
        return compiled(
            program.query, program.key, program.value, block_mask=blocks, scale=program.scale, enable_gqa=gqa
        )

    with torch.no_grad(), warnings.catch_warnings():  # as it is timed: another grad mode compiles again
        warnings.simplefilter("error", UserWarning)
        call()
    return call, time.perf_counter() - begin


def check(
    name: str, provider: str, program: Program, got: torch.Tensor, rows: torch.Tensor, dense: bool = False
) -> None:
    """The gate (`dense`: without the rule): some rows against float64; error at most twice that of plain torch in
    this dtype plus a band (a wide one: six rows are too few to know what plain torch is off)."""

    def few(dtype: torch.dtype) -> torch.Tensor:
        out = []
        group = program.num_heads // program.num_kv_heads
        for row in rows.tolist():
            q, k = torch.tensor([row]), torch.arange(program.mask.kv_len)
            allowed = k >= 0 if dense else program.rule.visible(torch.zeros((), dtype=torch.long), q, k)
            allowed = allowed & (k <= q) if program.mask.causal else allowed
            q_row = program.query[0, :, row].to(dtype).unflatten(0, (-1, group))
            scores = (q_row @ program.key[0].to(dtype).mT * program.scale).masked_fill(
                ~allowed, float("-inf")
            )
            out.append((scores.softmax(-1) @ program.value[0].to(dtype)).flatten(0, 1))
        return torch.stack(out, 1)

    truth, mine = few(torch.float64), got[0][:, rows].double()
    budget = (
        2 * (few(got.dtype).double() - truth).abs().max() + 4 * torch.finfo(got.dtype).eps * truth.abs().max()
    )
    error = (mine - truth).abs().max()
    if not error <= budget:
        raise SystemExit(f"{name}: {provider} is wrong (error {error:.3g}, budget {budget:.3g}); no numbers")


def race(
    report: Report, name: str, program: Program, x: tuple[str, Any], rounds: int, flex: bool, **extra: Any
) -> None:
    """Time the torch executor, dense SDPA and compiled FlexAttention on one program, interleaved."""
    print(f"{name}")
    L, rule, dtype = program.q_len, program.rule, program.query.dtype
    layout_for.cache_clear(), plain.best_layout.cache_clear()
    begin = time.perf_counter()
    layout = plain.best_layout(rule, L, L, 0, program.mask.causal, None)
    plan_of(layout)
    built = time.perf_counter() - begin
    elements, blocks = layout.density()
    extra |= dict(dtype=str(dtype), H=program.num_heads, Hkv=program.num_kv_heads, D=program.query.shape[3],
                  element_density=elements, block_density=blocks,
                  load=os.getloadavg()[0], block=[layout.block_q, layout.block_k])  # fmt: skip
    providers: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: attention(program, impl="torch").output,
        "sdpa_dense": lambda: F.scaled_dot_product_attention(
            program.query,
            program.key,
            program.value,
            is_causal=program.mask.causal,
            scale=program.scale,
            enable_gqa=program.num_heads != program.num_kv_heads,
        ),
    }
    if flex:
        try:
            providers["flex_compiled"], compile_time = flex_provider(program)
            report.add(name, "flex_compiled", "compile", "s", x, [compile_time], **extra)
        except Exception as error:  # a missing C++ compiler, an unsupported dtype: report, do not stop
            print(f"  compiled FlexAttention is not available: {type(error).__name__}: {str(error)[:200]}")
    report.add(name, "torch", "layout_build", "s", x, [built], **extra)
    rows = torch.tensor(sorted({0, 1, L // 7, L // 2 + 3, L - 65, L - 1}))
    for provider in providers:
        with torch.no_grad():
            check(name, provider, program, providers[provider](), rows, dense=provider == "sdpa_dense")
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    with torch.no_grad():
        for round_ in range(rounds + 2):
            for provider, call in providers.items():
                begin = time.perf_counter()
                call()
                if round_ >= 2:
                    times[provider].append(1e3 * (time.perf_counter() - begin))
    for provider in providers:
        report.add(name, provider, "time", "ms", x, times[provider], **extra)
    for provider in providers:
        if provider != "torch":
            ratio = statistics.median(times[provider]) / statistics.median(times["torch"])
            report.add(name, f"torch/{provider}", "speedup", "x", x, [ratio], **extra)


def resident() -> int:
    """Resident bytes of this process now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def memory(report: Report, lengths: list[int]) -> None:
    """Peak resident memory above the inputs, two rows with left padding, over the length."""
    print("memory")
    for L in lengths:
        program = program_of(SinkWindow(64, 512), L, 9, 3, 64, torch.float32, True)
        padding = torch.ones(2, L, dtype=torch.bool)
        padding[1, : L // 3] = False
        for name in ("query", "key", "value"):
            setattr(program, name, getattr(program, name).expand(2, -1, -1, -1).contiguous())
        program.mask = Mask(2, L, L, causal=True, padding=padding)
        attention(program, impl="torch")  # layouts and masks are cached and not counted
        before, peak, stop = resident(), 0, threading.Event()

        def watch(stop: threading.Event = stop) -> None:
            nonlocal peak
            while not stop.is_set():
                peak = max(peak, resident())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        attention(program, impl="torch")
        stop.set()
        watcher.join()
        io = 4 * sum(getattr(program, n).numel() for n in ("query", "key", "value"))
        report.add("memory left-padded B=2", "torch", "peak_extra", "MiB", ("L", L), [(peak - before) / 2**20],
                   inputs_mib=io / 2**20, dense_scores_mib=2 * 9 * L * L * 4 / 2**20)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention-cpu.csv"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the language cases")
    parser.add_argument(
        "--no-flex", action="store_true", help="skip FlexAttention (its compilation takes a minute)"
    )
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report()
    print(report.common["machine"], "torch", torch.__version__)
    window = lambda dtype, **o: program_of(SinkWindow(64, 512), arguments.length, 9, 3, 64, dtype, True)
    grid = lambda stride: Neighborhood((64, 64), (16, 16), (stride, stride), (1, 1), (False, False))
    image = lambda stride, dtype, H=6: program_of(grid(stride), 4096, H, H, 64, dtype, False)
    cases = {
        f"sink_window_{name}": (window, dtype, ("L", arguments.length))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    } | {
        f"neighborhood2d_{kind}_{name}": (lambda d, s=stride: image(s, d), dtype, ("grid", "64x64"))
        for kind, stride in (("blocked", 16), ("sliding", 1))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for kind, stride in (("blocked", 16), ("sliding", 1)):
        make = lambda d, s=stride: image(s, d, 1)
        cases[f"neighborhood2d_{kind}_fp32_1head"] = (make, torch.float32, ("grid", "64x64"))
    for name, (make, dtype, x) in cases.items():
        if arguments.only in name:
            race(report, name, make(dtype), x, arguments.rounds, not arguments.no_flex)
    if arguments.only in "memory":
        memory(report, [8192, 16384, 32768])
    report.write(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
