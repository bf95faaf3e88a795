"""Attention time of one prefill, summed over the layers of SmolLM2-135M: a plan, a window, dense. One CPU thread.

    python benchmarks/bench_plan.py --length 8192 --out benchmarks/results/plan-attention.md

Random queries, keys and values of the model's shape (9 heads, 3 KV heads, D = 64); dense is SDPA with is_causal. Layers
take turns, and the time is that of the thread, so a busy machine slows all alike. No number is printed before one
layer of each agrees with `reference` at 512 tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from hf_attn_patch.call.mask import Mask  # noqa: E402
from hf_attn_patch.call.program import Program  # noqa: E402
from hf_attn_patch.call.rules import Rule, SinkWindow  # noqa: E402
from hf_attn_patch.kernels import attention  # noqa: E402
from hf_attn_patch.patches.sparse.moa import MoA  # noqa: E402

HEADS, KV_HEADS, DIM = 9, 3, 64


def program(length: int, rule: Rule, seed: int = 0) -> Program:
    """A causal call of the model's shape that reads by `rule`."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(1, length, heads, DIM, generator=gen).transpose(1, 2)
    q, k, v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    made = Program(q, k, v, Mask.of(None, q, k, causal=True), DIM**-0.5)
    made.restrict(rule)
    return made


def rules_of(spec: str, length: int) -> list[Rule]:
    """Rule of every layer: a plan file, or sinks+window."""
    if spec.endswith(".json"):
        plan = MoA(plan=spec, length=length)
        plan.validate()
        found: list[Rule] = []
        for layer in range(len(plan._table)):
            sinks, window = zip(*plan._spans(layer, KV_HEADS, length))
            found.append(SinkWindow(sinks, tuple(max(w, 1) for w in window)))
        return found
    sinks, window = map(int, spec.split("+"))
    return [SinkWindow(sinks, window)] * 30


def seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--what",
        nargs="+",
        default=["benchmarks/plans/smollm2-moa-50.json", "benchmarks/plans/smollm2-moa-30.json", "64+512"],
    )
    parser.add_argument("--every", type=int, default=3, help="measure every n-th layer")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rules = {what: rules_of(what, options.length) for what in options.what}
    for what in options.what:
        call = program(512, rules_of(what, 512)[7])
        error = (attention(call, "torch").output - attention(call, "reference").output).abs().max()
        if error > 1e-5:
            raise SystemExit(f"{what}: {float(error):.2g} off the reference, no number is given")
    times = {"dense": 0.0, **dict.fromkeys(rules, 0.0)}
    with torch.inference_mode():
        for layer in range(0, 30, options.every):
            calls = {what: program(options.length, found[layer]) for what, found in rules.items()}
            q, k, v = (getattr(next(iter(calls.values())), n) for n in ("query", "key", "value"))
            times["dense"] += seconds(
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
            for what, call in calls.items():
                if layer == 0:
                    attention(call, "torch")  # builds what is kept between calls
                times[what] += seconds(lambda call=call: attention(call, "torch"))
    layers = len(range(0, 30, options.every))
    lines = [
        f"Attention of {layers} layers at {options.length} tokens, one thread.",
        "",
        "| reads | seconds | dense / it |",
        "|---|---:|---:|",
    ]
    lines += [f"| {what} | {t:.2f} | {times['dense'] / t:.2f} |" for what, t in times.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        Path(options.out).write_text(text)


if __name__ == "__main__":
    main()
