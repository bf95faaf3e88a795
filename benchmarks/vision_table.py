"""The tables of `benchmarks.vision_quality`, from the files of its steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
QUALITY = (
    # key, head of the column, decimals of a percentage (None = a plain number)
    ("kept_mass", "kept attention", 0),
    ("cls_cosine", "CLS cosine", None),
    ("patch_cosine", "patch cosine", None),
    ("top1_agreement", "same class", 0),
    ("kl", "KL, nats", None),
    ("old_head", "dense head", 0),
    ("own_head", "own head", 0),
    ("knn", "k-NN", 0),
)


def rows_of(folder: Path) -> Rows:
    """Label -> what its file says, dense first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[0] != "dense"))


def cell(value: Any, decimals: int | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if decimals is None else f"{100 * value:.{decimals}f} %"


def options_of(row: dict[str, Any]) -> str:
    if "patch" not in row:
        return ""
    plain = ", ".join(f"{k}={json.dumps(v)}" for k, v in row["options"].items())
    return f"`{row['patch']}: {plain}`" if plain else f"`{row['patch']}`"


def quality(measured: Rows, times: Rows) -> list[str]:
    heads = ["variant", "pairs", "tiles", *(head for _, head, _ in QUALITY), "time, dense / patched"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    by_quality = sorted(measured.items(), key=lambda item: (item[0] != "dense", -item[1]["patch_cosine"]))
    for label, row in by_quality:
        pairs = row.get("pairs") if row.get("pairs") is not None else row.get("chosen")
        ratio = f"{times[label]['ratio']:.2f}x" if label in times else "1" if label == "dense" else "–"
        cells = [
            label,
            cell(pairs, 0),
            cell(row.get("tiles"), 0),
            *(cell(row[k], d) for k, _, d in QUALITY),
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tuning(measured: Rows, tuned: Rows) -> list[str]:
    chosen = [(k, h, d) for k, h, d in QUALITY if k not in ("kept_mass", "knn")]
    heads = ["variant", "", *(head for _, head, _ in chosen)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for label, row in tuned.items():
        stages = [("before", measured[label])]
        if "predictor_loss" in row:
            stages.append(("predictor trained", {k: row[f"predictor_{k}"] for k, _, _ in chosen}))
        stages.append(("after", row))
        for stage, found in stages:
            cells = [label, stage, *(cell(found[k], d) for k, _, d in chosen)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(root: Path) -> str:
    """Markdown of everything below `root`."""
    parts = ["# Vision patterns on DINOv2-S", "", "Written by `python -m benchmarks.vision_quality table`."]
    sizes = sorted(int(p.name.split("-")[1]) for p in root.glob("measure-*"))
    for size in sizes:
        measured = rows_of(root / f"measure-{size}")
        times, tuned = rows_of(root / f"time-{size}"), rows_of(root / f"tune-{size}")
        parts += ["", f"## {size} px", ""]
        first = next(iter(times.values()), None)
        said = f"{measured['dense']['images']} test scenes"
        if first is not None:
            said += (
                f"; times: dense {first['dense_ms']:.0f} ms per image, {first['threads']} thread(s), batch "
            )
            said += f"{first['batch']}, median of {first['repeats']} in turns"
        parts += [said + ".", "", *quality(measured, times)]
        if tuned:
            one = next(iter(tuned.values()))
            parts += ["", f"After {one['steps']} steps of {one['batch']} scenes of distillation:", ""]
            parts += tuning(measured, tuned)
        parts += ["", "Options:", ""]
        parts += [f"- {label}: {options_of(row)}" for label, row in measured.items() if "patch" in row]
    return "\n".join(parts) + "\n"
