"""Time on a CPU of the methods that choose cells of a token grid for every call, against dense attention.

    python benchmarks/bench_grid_choice.py --out benchmarks/results/grid-choice-cpu.csv

Choosing (`edit`) and attending are timed apart. A provider is timed only after some of its rows have been compared with
float64 on the same choice; providers are interleaved, compare medians of one run only.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench_attention import Report
from hf_attn_patch import registry
from hf_attn_patch.kernels import attention
from hf_attn_patch.kernels.row_blocks import run_rows
from hf_attn_patch.masks import Mask
from hf_attn_patch.patches.vision.paro import packed
from hf_attn_patch.program import Program
from hf_attn_patch.rules_dynamic import ChosenCells


def paro_plan(side: int, heads: int, density: float) -> dict[str, Any]:
    """Random 64-token blocks, every other head by columns."""
    count, draw = side * side // 64, torch.Generator().manual_seed(0)
    masks = [packed(torch.rand(count, count, generator=draw) < density) for _ in range(heads)]
    layer = {"orders": ["hw", "wh"] * (heads // 2), "blocks": masks}
    return {"grid": [side, side], "block": 64, "layers": {"0": layer}}


def cases(side: int, heads: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (patch, options); each reads about a quarter of the keys."""
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


def gate(name: str, program: Program, output: torch.Tensor) -> None:
    """Some rows against float64, on the choice that was made.

    Raises:
        SystemExit: they are further off than float32 can explain.
    """
    rows = torch.linspace(0, program.q_len - 1, 7).long()
    wide = replace(
        program, query=program.query.double(), key=program.key.double(), value=program.value.double()
    )  # type: ignore[union-attr]
    error = float((run_rows(wide, rows) - output[:, :, rows]).abs().max())
    if not error < 100 * torch.finfo(torch.float32).eps * float(program.value.abs().max()):  # type: ignore[union-attr]
        raise SystemExit(f"{name}: rows are {error:.3g} off, no number")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=64, help="tokens per side of the grid")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, length, dim = torch.Generator().manual_seed(0), args.side**2 + 1, 64
    q, k, v = (torch.randn(1, args.heads, length, dim, generator=draw) for _ in range(3))
    report, x = Report(), ("tokens", length - 1)

    def made(patch: Any, tensors: Any) -> Program:
        program = Program(q, k, v, Mask(1, length, length), dim**-0.5)
        grid = SimpleNamespace(grid=(args.side, args.side))
        call = SimpleNamespace(
            path="bench", heads=None, layer=0, context=grid, tensors=tensors, training=False
        )
        patch.edit(program, call)
        return program

    ready = {}
    with torch.no_grad():
        for name, (patch_name, options) in cases(args.side, args.heads).items():
            patch, tensors = registry.build(patch_name, options), torch.nn.Module()
            site: Any = SimpleNamespace(
                layer=0, num_heads=args.heads, num_kv_heads=args.heads, head_dim=dim, module=None
            )
            for key, tensor in patch.tensors(site).items():
                tensors.register_parameter(key, torch.nn.Parameter(tensor))
            program = made(patch, tensors)
            gate(name, program, attention(program, "torch").output)
            ready[name] = (patch, tensors, program)
        times: dict[str, list[list[float]]] = {name: [[], []] for name in ready}
        dense = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            F.scaled_dot_product_attention(q, k, v)
            dense.append(time.perf_counter() - begin)
            for name, (patch, tensors, _) in ready.items():
                begin = time.perf_counter()
                program = made(patch, tensors)
                middle = time.perf_counter()
                attention(program, "torch")
                times[name][0].append(middle - begin)
                times[name][1].append(time.perf_counter() - middle)
    report.add("dense", "sdpa", "attend", "ms", x, [1000 * t for t in dense])
    for name, (choosing, attending) in times.items():
        rule = ready[name][2].rule
        assert isinstance(rule, ChosenCells)
        share = round(float(rule.share()), 4)
        report.add(name, "torch", "choose", "ms", x, [1000 * t for t in choosing], share=share)
        report.add(name, "torch", "attend", "ms", x, [1000 * t for t in attending], share=share)
        both = sorted(a + b for a, b in zip(choosing, attending))
        ratio = sorted(dense)[len(dense) // 2] / both[math.floor(len(both) / 2)]
        print(f"  {name:34s} reads {share:.0%}, {ratio:.2f}x dense speed, choice included")
    if args.out:
        report.write(args.out)


if __name__ == "__main__":
    main()
