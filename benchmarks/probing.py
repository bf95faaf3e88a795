"""Heads on frozen DINOv2-S features of rendered scenes: efficient probing against linear probes, at the same images.

    python -m benchmarks.probing --train 600 --test 400 --size 112 --seeds 3 --out benchmarks/results/probing-scenes.md

Label = the scene's group (kitchen, street, …). Every head sees the same features, is trained on the training scenes and
scored on others; heads that are drawn at random are trained once per seed. Nothing is chosen on the test scenes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hf_attn_patch import __version__, probing, testbed
from hf_attn_patch.eval.feature_cache import encoded
from hf_attn_patch.eval.images import pixel_values
from hf_attn_patch.eval.labelled import SCENES, labelled
from hf_attn_patch.eval.probes import item_scores

HEADS = (
    # label, what it reads, head, options
    ("linear on CLS", "cls", "linear", {}),
    ("linear on the mean patch", "mean", "linear", {}),
    ("linear on both", "both", "linear", {}),
    ("ep, 8 queries, patches", "patches", "ep", {"queries": 8}),
    ("ep, 8 queries, CLS and patches", "all", "ep", {"queries": 8}),
    ("acmil, patches", "patches", "acmil", {}),
)


def views(cls: torch.Tensor, patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a head may read: name -> [n, C] or [n, N, C]."""
    mean = patches.mean(1)
    return {
        "cls": cls,
        "mean": mean,
        "both": torch.cat([cls, mean], -1),
        "patches": patches,
        "all": torch.cat([cls[:, None], patches], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("train", 600), ("test", 400), ("size", 112), ("seeds", 3), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache", help="folder for features; none are kept without it")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    given = parser.parse_args()

    model, processor = testbed.load("dinov2s")
    train, test = labelled("probing", SCENES, given.train, given.test, seed=0)
    started = time.monotonic()
    known, asked = (
        views(*encoded(model, pixel_values(model, processor, part.images, given.size), 16, given.cache))
        for part in (train, test)
    )
    encoding = time.monotonic() - started
    correct: dict[str, np.ndarray] = {}
    rows = []
    for label, view, head, options in HEADS:
        runs, fitted = [], None
        for seed in range(1 if head == "linear" else given.seeds):
            fitted = probing.fit(
                known[view],
                train.targets(),
                head,
                given.steps,
                classes=len(train.names),
                seed=seed,
                **options,
            )
            runs.append(item_scores(fitted.logits(asked[view]), test))
        assert fitted is not None
        correct[label] = np.array(runs).mean(0)
        each = np.array(runs).mean(1)
        spread = f"{100 * each.min():.1f} … {100 * each.max():.1f}" if len(each) > 1 else ""
        rows.append([label, f"{fitted.parameters:,}", correct[label].mean(), spread, f"{fitted.seconds:.1f}"])

    bases = ("linear on the mean patch", "linear on CLS")
    draws = np.random.default_rng(0).integers(0, len(test.labels), (10_000, len(test.labels)))
    heads = [
        "head",
        "parameters",
        "accuracy",
        "over seeds",
        *(f"against {b}, 95 %" for b in bases),
        "s per training",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (label, parameters, accuracy, spread, seconds), one in zip(rows, correct.values()):
        against = []
        for base in bases:
            low, high = np.percentile(100 * (one - correct[base])[draws].mean(1), [2.5, 97.5])
            apart = f"{100 * (one - correct[base]).mean():+.1f} ({low:+.1f} … {high:+.1f})"
            against.append("" if base == label else apart)
        cells = [label, parameters, f"{100 * accuracy:.1f} %", spread, *against, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(
        [
            "# Probing DINOv2-S on scenes",
            "",
            f"    python -m benchmarks.probing {' '.join(sys.argv[1:])}",
            "",
            f"{given.train} training and {given.test} test scenes, {given.size} px ({known['patches'].shape[1]} "
            f"patches), label = one of {len(train.names)} groups; features in {encoding:.0f} s; "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, hf_attn_patch {__version__}. Intervals: "
            "paired bootstrap over test scenes, of the mean over seeds.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
