"""What patching costs and saves in a whole model: SmolLM2-135M, forward on a CPU.

    python benchmarks/bench_model.py --threads 1 --out benchmarks/results/model-cpu.csv

- overhead: the model as loaded against the same model routed through our dispatch with no patch on any site.
- removed: after patch and remove, the objects that run a forward are the ones from before; there is nothing to time.
- prefill: dense against `streaming` (sinks 4, window 256) at 1k to 8k tokens, and the bytes their caches hold.

Providers take turns, so that a busy machine slows both alike. The ratio is the median of the ratios of neighbouring
runs, its spread their 20 % and 80 % quantiles. No number is printed before the outputs are right: bit-equal for
dispatch and removal, equal to the reference executor for streaming.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_attention import Report

import hf_attn_patch as hap
from hf_attn_patch import testbed
from hf_attn_patch.eval import measurements
from hf_attn_patch.eval.demo.undo import UndoProof
from hf_attn_patch.install import dispatch

STREAMING = {"sinks": 4, "window": 256}


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ratios(a: list[float], b: list[float]) -> list[float]:
    """b / a, neighbour by neighbour."""
    return [y / x for x, y in zip(a, b)]


def bench_overhead(model: Any, tokenizer: Any, report: Report, rounds: int) -> None:
    """Dispatch without a patch, at 1024 tokens and at one token on a filled cache (the worst case)."""
    ids = measurements.prose_ids(tokenizer, 1024)
    plain = model(ids).logits
    with dispatch.dispatched(model):
        if not torch.equal(model(ids).logits, plain):
            raise SystemExit(
                "overhead: logits under dispatch differ from the plain model, no number is given"
            )
    cache = model(ids, use_cache=True).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    for name, run, count in (
        ("prefill_1024", lambda: model(ids, use_cache=False, logits_to_keep=1), rounds),
        ("decode_1", step, rounds * 8),
    ):

        def under_dispatch(run: Callable[[], Any] = run) -> float:
            with dispatch.dispatched(model):  # attaching is not what is timed
                return seconds(run)

        run()
        a, b = [], []
        for i in range(count):
            if i % 2 == 0:
                a.append(seconds(run))
                b.append(under_dispatch())
            else:
                b.append(under_dispatch())
                a.append(seconds(run))
        x = ("tokens", 1024 if name.startswith("prefill") else 1)
        report.add(f"overhead_{name}", "plain", "time", "s", x, a, load=os.getloadavg()[0])
        report.add(f"overhead_{name}", "dispatch", "time", "s", x, b, load=os.getloadavg()[0])
        best = min(b) / min(a)
        report.add(
            f"overhead_{name}", "dispatch", "ratio", "x", x, ratios(a, b), best_of_all=best, rounds=count
        )


def bench_removed(model: Any, tokenizer: Any, report: Report) -> None:
    """Patch, remove: what would run is identical, object by object."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    def objects() -> list[Any]:
        attention = functions.get_interface(model.config._attn_implementation, None)
        forwards = [type(m).forward for m in model.modules()]
        children = [dict(m._modules) for m in model.modules()]
        return [attention, forwards, children, [m.__dict__.get("forward") for m in model.modules()]]

    proof, before = UndoProof(model, {"input_ids": measurements.prose_ids(tokenizer, 512)}), objects()
    found = proof.check(("streaming", STREAMING))
    same = all(x is y or x == y for x, y in zip(before, objects()))
    if not (found["undone"] and same):
        raise SystemExit(f"removed: the model is not what it was: {found}")
    for metric in ("max_abs_difference", "hooks_left"):
        report.add(
            "removed", "removed", metric, "", ("tokens", 512), [float(found[metric])], same_objects=same
        )


def bench_prefill(model: Any, tokenizer: Any, report: Report, rounds: int, lengths: list[int]) -> None:
    """Prefill speed and cache bytes, dense and streaming."""
    ids = measurements.prose_ids(tokenizer, max(lengths))
    outputs = []
    for impl in ("auto", "reference"):
        with hap.patched(model, "streaming", **STREAMING, impl=impl):
            outputs.append(model(ids[:, :777]).logits.double())
    worst = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    if worst > 1e-4:
        raise SystemExit(
            f"prefill: streaming differs from the reference executor by {worst:.2g}, no number is given"
        )
    for length in lengths:
        held: dict[str, int] = {}
        a: list[float] = []
        b: list[float] = []
        for _ in range(rounds):
            took, cache = measurements.prefill(model, ids[:, :length])
            held["dense"] = measurements.cache_nbytes(cache)
            a.append(took)
            with hap.patched(model, "streaming", **STREAMING):
                took, cache = measurements.prefill(model, ids[:, :length])
                held["streaming"] = measurements.cache_nbytes(cache)
            b.append(took)
        x = ("tokens", length)
        for provider, times in (("dense", a), ("streaming", b)):
            load = os.getloadavg()[0]
            report.add("prefill", provider, "speed", "tokens/s", x, [length / t for t in times], load=load)
            report.add("prefill", provider, "kv_cache", "bytes", x, [float(held[provider])])
        report.add("prefill", "streaming", "speedup", "x", x, ratios(b, a), **STREAMING)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--rounds", type=int, default=30, help="of the overhead; prefill takes a tenth, at least 3"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--only", choices=["overhead", "removed", "prefill"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = testbed.load("smollm2")
    report = Report()
    with torch.inference_mode():
        if arguments.only in (None, "removed"):
            bench_removed(model, tokenizer, report)
        if arguments.only in (None, "overhead"):
            bench_overhead(model, tokenizer, report, arguments.rounds)
        if arguments.only in (None, "prefill"):
            bench_prefill(model, tokenizer, report, max(3, arguments.rounds // 10), arguments.lengths)
    over = [r for r in report.rows if r["metric"] == "ratio" and "prefill" in r["name"]]
    if over:
        print(
            f"dispatch without a patch: {statistics.median(r['y_50'] for r in over) - 1:+.2%} (target at most +1 %)"
        )
    if arguments.out is not None:
        report.write(arguments.out)


if __name__ == "__main__":
    main()
