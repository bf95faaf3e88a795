"""Time on a CPU of attention on a token grid, against dense attention.

    python -m benchmarks.bench_grid --methods fixed --out benchmarks/results/grid-fixed-cpu.csv
    python -m benchmarks.bench_grid --methods chosen --out benchmarks/results/grid-choice-cpu.csv

`fixed`: windows, neighborhoods, discs, agents. `chosen`: methods that choose cells for every call; each reads about a
quarter of the keys. Choosing (`edit`) and attending are timed apart; layouts of fixed patterns are built before, as a
model builds them once for all layers. A provider is timed only after some of its rows have been compared with
float64 on the same choice; providers are interleaved, compare medians of one run only.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench_attention import Report
from benchmarks.grid_calls import GridCall, gate
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import ChosenCells
from hf_attn_patch.cost.tiles import tiles_of
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.vision.paro import packed


def paro_plan(side: int, heads: int, density: float) -> dict[str, Any]:
    """Random 64-token blocks, every other head by columns."""
    count, draw = side * side // 64, torch.Generator().manual_seed(0)
    masks = [packed(torch.rand(count, count, generator=draw) < density) for _ in range(heads)]
    layer = {"orders": ["hw", "wh"] * (heads // 2), "blocks": masks}
    return {"grid": [side, side], "block": 64, "layers": {"0": layer}}


Cases = dict[str, tuple[str, dict[str, Any]]]  # name -> (patch, options)


def fixed_cases(side: int) -> Cases:
    """Patterns that depend on the grid alone, with windows of a quarter of its side, and agents."""
    window = side // 4
    return {
        f"maxvit_block {window} x {window}": ("maxvit_block", {"window": window}),
        f"maxvit_grid {window} x {window}": ("maxvit_grid", {"size": window}),
        f"swin_window {window}, shifted": ("swin_window", {"window": window, "shift": window // 2}),
        f"halo block {window // 2}, halo {window // 4}": (
            "halo",
            {"block": window // 2, "halo": window // 4},
        ),
        f"neighborhood {window}, stride 1": ("neighborhood", {"window": window}),
        f"neighborhood {window}, stride {window // 2}": (
            "neighborhood",
            {"window": window, "stride": window // 2},
        ),
        f"clear radius {window // 2}": ("clear", {"radius": window / 2}),
        "agent 7 x 7": ("agent", {"agents": 7}),
    }


def chosen_cases(side: int, heads: int) -> Cases:
    """Each reads about a quarter of the keys."""
    tile = {"kinds": ["tile"], "tile": [8, 8]}
    quarter = (side // 8) ** 2 // 4
    return {
        "biformer 8 x 8 regions": ("biformer", {"regions": side // 8, "topk": quarter}),
        "vmoba topk, per query": ("vmoba", {**tile, "pool": "query", "topk": quarter}),
        "vmoba topk, per head": ("vmoba", {**tile, "pool": "head", "topk": quarter}),
        "vmoba threshold 0.25, per head": ("vmoba", {**tile, "pool": "head", "threshold": 0.25}),
        "sparsifiner single patches": ("sparsifiner", {"keep": 0.25, "grid": [side, side]}),
        "sparsifiner 8 x 8 squares": ("sparsifiner", {"keep": 0.25, "block": 8, "grid": [side, side]}),
        "sparsifiner squares, 32 vectors": (
            "sparsifiner",
            {"keep": 0.25, "block": 8, "reduce": side * side // 32, "grid": [side, side]},
        ),
        "paro 64-token blocks": ("paro", {"plan": paro_plan(side, heads, 0.25)}),
    }


def share_read(program: Program) -> float:
    """Share of the (query, key) pairs; keys that the method added count like tokens."""
    rule = program.rule
    if isinstance(rule, ChosenCells):
        return float(rule.share())
    return tiles_of(rule, program.q_len, program.mask.kv_len).pairs / program.q_len**2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", choices=("fixed", "chosen"), required=True)
    parser.add_argument("--side", type=int, default=64, help="tokens per side of the grid")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    call = GridCall(args.side, args.heads)
    report, x = Report(), ("tokens", call.length - 1)
    cases = fixed_cases(args.side) if args.methods == "fixed" else chosen_cases(args.side, args.heads)
    ready = {}
    with torch.no_grad():
        for name, (patch_name, options) in cases.items():
            patch, tensors = call.patch(patch_name, options)
            program = call.edited(patch, tensors)
            gate(name, program, attention(program, "torch").output)
            ready[name] = (patch, tensors, program)
        times: dict[str, list[list[float]]] = {name: [[], []] for name in ready}
        dense = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            F.scaled_dot_product_attention(call.q, call.k, call.v)
            dense.append(time.perf_counter() - begin)
            for name, (patch, tensors, _) in ready.items():
                begin = time.perf_counter()
                program = call.edited(patch, tensors)
                middle = time.perf_counter()
                attention(program, "torch")
                times[name][0].append(middle - begin)
                times[name][1].append(time.perf_counter() - middle)
    report.add("dense", "sdpa", "attend", "ms", x, [1000 * t for t in dense])
    for name, (choosing, attending) in times.items():
        share = round(share_read(ready[name][2]), 4)
        report.add(name, "torch", "choose", "ms", x, [1000 * t for t in choosing], share=share)
        report.add(name, "torch", "attend", "ms", x, [1000 * t for t in attending], share=share)
        both = sorted(a + b for a, b in zip(choosing, attending))
        ratio = sorted(dense)[len(dense) // 2] / both[math.floor(len(both) / 2)]
        print(f"  {name:34s} reads {share:.0%}, {ratio:.2f}x dense speed, choice included")
    if args.out:
        report.write(args.out)


if __name__ == "__main__":
    main()
