"""`moh` on SmolLM2-135M: perplexity before and after LoRA, dense and routed on the same tokens, and which heads are on.

make moh                                                        # three trainings, then this
python benchmarks/moh.py --trained runs/moh --out benchmarks/results/moh-smollm2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import hf_attn_patch as hap  # noqa: E402
from hf_attn_patch import testbed, training  # noqa: E402
from hf_attn_patch.calibration.capture import captured  # noqa: E402
from hf_attn_patch.calibration.pictures import draw_plan  # noqa: E402
from hf_attn_patch.eval.harness import evaluating, run  # noqa: E402
from hf_attn_patch.eval.measurements import prose_ids  # noqa: E402

UNTRAINED = {"norm router": {}, "learned router": {"router": "learned"}}
TRAINED = {"dense": "dense", "norm router": "moh-norm", "learned router": "moh-learned"}


def head_load(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Share of tokens for which each head is on: [layers, H]."""
    found: dict[int, torch.Tensor] = {}

    def look(layer: int, program: Any, output: torch.Tensor) -> None:
        gate = program.head_gate
        on = torch.ones(program.num_heads) if gate is None else (gate != 0).float().mean((0, 1)).cpu()
        found[layer] = on

    with captured(model, look), evaluating(model), torch.inference_mode():
        model(ids)
    return torch.stack([found[layer] for layer in sorted(found)]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trained", default="runs/moh", help="folder of the three trainings")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "moh-smollm2"))
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = testbed.load("smollm2")
    ids = prose_ids(tokenizer, 1024)
    rows: list[dict[str, Any]] = []
    before = run("perplexity", model, tokenizer, patches={k: ("moh", v) for k, v in UNTRAINED.items()})
    loads = {}
    for label, choice in UNTRAINED.items():
        with hap.patched(model, "moh", **choice):
            loads[f"{label}, untrained"] = head_load(model, ids)
    for label, folder in TRAINED.items():
        source = Path(options.trained) / folder
        log = json.loads((source / "training.json").read_text())
        base, tokenizer = testbed.load("smollm2")
        trained = training.load(base, source).eval()
        after = run("perplexity", trained, tokenizer)["dense"].aggregates["perplexity"]
        rows.append(
            {
                "model": label,
                "before": before[label].aggregates["perplexity"],
                "after": after,
                "tokens": log["tokens"],
                "seconds": round(log["seconds"], 1),
                "trained_parameters": log["parameters"]["trained"],
            }
        )
        print(rows[-1], flush=True)
        if hap.active(trained):
            loads[f"{label}, trained"] = head_load(trained, ids)
    table = [
        "| model | perplexity before | after | tokens | trained parameters | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    table += [
        f"| {r['model']} | {r['before']:.2f} | {r['after']:.2f} | {r['tokens']:,} | {r['trained_parameters']:,} | "
        f"{r['seconds']:.0f} |"
        for r in rows
    ]
    (out / "moh.md").write_text("\n".join(table) + "\n")
    (out / "moh.json").write_text(json.dumps(rows, indent=1) + "\n")
    for label, load in loads.items():
        name = label.replace(", ", "-").replace(" ", "-")
        picture = draw_plan(load, f"share of tokens with a head on: {label}")
        if picture is not None:
            (out / f"load-{name}.svg").write_text(picture)
    print("\n".join(table))


if __name__ == "__main__":
    main()
