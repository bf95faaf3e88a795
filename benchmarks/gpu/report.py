"""The result file of a GPU check: its schema, tables for the terminal, and the plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "missing", "error", "not run")
FIELDS = {
    "schema": int, "date": str, "command": str, "environment": dict, "gate": str, "gate_report": dict, "stages": list,
    "ceilings": dict, "rows": list, "targets": list,
}  # fmt: skip


def check(result: dict[str, Any]) -> None:
    """Raise ValueError where `result` does not keep the schema; a file behind a closed gate may hold no number."""
    for name, kind in FIELDS.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(
                f"result file: {name} is {type(result.get(name)).__name__}, expected {kind.__name__}"
            )
    if result["schema"] != SCHEMA:
        raise ValueError(f"result file: schema {result['schema']}, this code reads {SCHEMA}")
    if result["gate"] not in ("green", "quick") and (
        result["rows"] or result["ceilings"] or result["targets"]
    ):
        raise ValueError(f"result file: the gate is {result['gate']}, yet there are numbers")
    for row in result["rows"]:
        if row.get("status") not in STATUSES:
            raise ValueError(f"result file: status {row.get('status')!r} of {row.get('case')}")
        needed = {"case", "group", "name", "at", "provider"} | (
            {"ms", "unit", "rate"} if row["status"] == "ok" else {"why"}
        )
        if missing := needed - set(row):
            raise ValueError(f"result file: row {row.get('case')} lacks {sorted(missing)}")


def write(result: dict[str, Any], *folders: Path) -> list[Path]:
    """Write the file into every folder, as ``<gpu>-<date>.json``."""
    check(result)
    gpu = (result["environment"].get("gpu") or {}).get("name") or "no-gpu"
    name = (
        re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + "-" + re.sub(r"[^0-9]", "", result["date"])[:12]
    )
    paths = []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result, indent=1))
        paths.append(path)
    return paths


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: it does not keep the schema.
    """
    result = json.loads(path.read_text())
    check(result)
    return result


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per row."""
    lines = []
    for row in rows:
        start = f"{row['case']:48s} {row['provider']:18s}"
        if row["status"] != "ok":
            lines.append(f"{start} {row['status']}: {row['why'].splitlines()[0][:140] if row['why'] else ''}")
            continue
        ms, rate = row["ms"], row["rate"]
        text = f"{start} {ms['p50']:9.3f} ms ({ms['p20']:.3f} to {ms['p80']:.3f})"
        text += "" if rate is None else f" {rate:8.1f} {row['unit']}"
        text += "" if row.get("peak_mib") is None else f", peak {row['peak_mib']:.0f} MiB"
        if row.get("versus"):
            text += "; " + ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row["versus"].items())
        lines.append(text)
    return lines


def plot(result: dict[str, Any], path: Path) -> str | None:
    """Draw rates by length, sparse times by density and decoding; reason why not, or None.

    Only what was measured is drawn; a panel without rows stays empty.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    rows = [r for r in result["rows"] if r["status"] == "ok"]
    figure = Figure(figsize=(13, 8), layout="constrained")
    full, back, sparse, decoding = figure.subplots(2, 2).flat
    for axis, group in zip((full, back), ("full forward", "full backward")):
        mine = [r for r in rows if r["group"] == group]
        for provider in dict.fromkeys(r["provider"] for r in mine):
            points = sorted((r["at"]["L"], r["rate"]) for r in mine if r["provider"] == provider)
            axis.plot(*zip(*points), marker="o", label=provider, linewidth=2.5 if provider == "ours" else 1)
        axis.set(title=f"{group}, causal, D 128, bf16", xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None))
        if mine:
            axis.set_xscale("log", base=2)
            axis.legend()
    axis = sparse
    for name in ("random per head", "sinks and window"):
        mine = [r for r in rows if r["group"] == "sparse" and r["name"] == name and r["provider"] == "ours"]
        for other in ("dense", "flex"):
            points = sorted((r["extra"]["density"], r["versus"][other]) for r in mine if other in r["versus"])
            if points:
                axis.plot(*zip(*points), marker="o", label=f"{name}, against {other}")
    axis.set(title="sparse forward, 32k", xlabel="density (blocks)", ylabel="times faster", ylim=(0, None))
    if axis.lines:
        axis.legend()
    axis = decoding
    mine = [r for r in rows if r["group"] == "decode" and r["provider"] == "ours"]
    names = [f"{r['name']}, {r['at']['Hkv']} KV heads" for r in mine]
    axis.barh(names, [r["rate"] for r in mine])
    if "copy" in result["ceilings"]:
        axis.axvline(result["ceilings"]["copy"], color="black", label="copy")
        axis.legend()
    axis.set(title="decoding at 32k", xlabel="GB/s of K and V that are visible")
    gpu = (result["environment"].get("gpu") or {}).get("name", "")
    figure.suptitle(f"{gpu}, {result['date']}, gate {result['gate']}")
    figure.savefig(path, dpi=110)
    return None
