"""Targets: what a row must reach, judged by its worst case; a target without its rows is "not run"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A claim `what` about the rows of a group (and `name`, unless it is empty).

    value: number of a row, None = the claim does not apply to it. wanted: bound; at_most: values must stay below it.
    needs: competitor without which there is no verdict.
    """

    what: str
    group: str
    name: str
    value: Callable[[Row, dict[str, float]], float | None]
    wanted: float
    at_most: bool = False
    needs: str = ""


def versus(other: str) -> Callable[[Row, dict[str, float]], float | None]:
    """Speed relative to a competitor."""
    return lambda row, ceilings: row["versus"].get(other)


def versus_best_sdpa(row: Row, ceilings: dict[str, float]) -> float | None:
    found = [ratio for other, ratio in row["versus"].items() if other.startswith("sdpa ")]
    return min(found) if found else None


def share_of_dense(row: Row, ceilings: dict[str, float]) -> float | None:
    """time / (density * time of dense)."""
    if "dense" not in row["versus"]:
        return None
    return 1 / row["versus"]["dense"] / row["extra"]["density"]


def build_share(row: Row, ceilings: dict[str, float]) -> float | None:
    return row["extra"]["build_ms"]["p50"] / row["ms"]["p50"]


def of_copy(row: Row, ceilings: dict[str, float]) -> float | None:
    return row["rate"] / ceilings["copy"] if "copy" in ceilings else None


def memory_growth(row: Row, ceilings: dict[str, float]) -> float | None:
    """Growth of peak memory over growth of the length, largest against smallest (1 = linear, 2 and more = not)."""
    peaks, lengths = row["extra"]["peak_mib"], row["extra"]["lengths"]
    if not peaks or peaks[0] is None or len(peaks) < 2:
        return None
    return (peaks[-1] / max(peaks[0], 1e-9)) / (lengths[-1] / lengths[0])


TARGETS = (
    Target("full causal forward >= 1.0x FlexAttention", "full forward", "", versus("flex"), 1.0, needs="flex"),
    Target("full causal forward >= 0.70x best SDPA backend", "full forward", "", versus_best_sdpa, 0.70, needs="sdpa"),
    Target("full causal backward >= 1.0x FlexAttention", "full backward", "", versus("flex"), 1.0, needs="flex"),
    Target("sparse: time <= 1.25 x density x own dense time", "sparse", "", share_of_dense, 1.25, at_most=True),
    Target("sparse per head >= 1.2x FlexAttention", "sparse", "random per head", versus("flex"), 1.2, needs="flex"),
    Target("layout build <= 3 % of the kernel", "sparse", "random per head", build_share, 0.03, at_most=True),
    Target("decode >= 75 % of copy bandwidth", "decode", "dense", of_copy, 0.75, needs="copy"),
    Target("spans at 50 %, half the heads: >= 1.8x dense decode", "decode", "half the heads", versus("dense"), 1.8),
    Target("spans at 50 %, half the keys: >= 1.8x dense decode", "decode", "half the keys", versus("dense"), 1.8),
    Target("key classes with a mass transfer <= 1.15x plain", "classes", "mass transfer",
           lambda row, _: 1 / row["versus"]["plain"] if "plain" in row["versus"] else None, 1.15, at_most=True),
    Target("VAR >= 10x its eager reference", "classes", "var", versus("eager reference"), 10.0),
    Target("VAR: memory grows like L (<= 1.2x of it)", "classes", "var", memory_growth, 1.2, at_most=True),
    Target("linear attention >= 1.0x fla", "linear", "", versus("fla"), 1.0, needs="fla"),
)  # fmt: skip


def ceilings_of(rows: Iterable[Row]) -> dict[str, float]:
    """Rates of the ceiling rows: copy in GB/s, matmul in TFLOP/s."""
    return {row["name"]: row["rate"] for row in rows if row["group"] == "ceilings" and row["status"] == "ok"}


def evaluate(rows: list[Row]) -> list[dict[str, Any]]:
    """Per target: verdict "met", "met where it ran", "missed" or "not run", the worst number and its case, and how many
    of the cases the verdict covers."""
    ceilings, result = ceilings_of(rows), []
    for target in TARGETS:
        mine = [
            r
            for r in rows
            if r["group"] == target.group and target.name in ("", r["name"]) and r["provider"] == "ours"
        ]
        found = []
        for row in mine:
            value = target.value(row, ceilings) if row["status"] == "ok" else None
            if value is not None:
                found.append((value, row["case"]))
        entry = {
            "what": target.what,
            "wanted": target.wanted,
            "at_most": target.at_most,
            "cases": len(mine),
            "judged": len(found),
        }
        if not found:
            entry |= {"verdict": "not run", "why": _why(rows, mine, target)}
        else:
            worst, where = max(found) if target.at_most else min(found)
            met = worst <= target.wanted if target.at_most else worst >= target.wanted
            # a case that failed or did not run cannot have met anything
            complete = len(found) == len(mine)
            entry |= {"verdict": "missed" if not met else "met" if complete else "met where it ran",
                      "worst": worst, "where": where}  # fmt: skip
        result.append(entry)
    return result


def _why(rows: list[Row], mine: list[Row], target: Target) -> str:
    cases = {row["case"] for row in mine}
    reasons = [r["why"] for r in rows if r["case"] in cases and r["status"] != "ok" and
               (r["provider"] == "ours" or r["provider"].startswith(target.needs or "\0"))]  # fmt: skip
    return reasons[0] if reasons else "no row of it"


def lines(verdicts: list[dict[str, Any]]) -> list[str]:
    """The verdicts as text, one line each."""
    text = []
    for v in verdicts:
        number = f"{v['worst']:.3g} at {v['where']}" if "worst" in v else v["why"]
        text.append(f"{v['verdict']:17s} {v['what']}: {number} ({v['judged']} of {v['cases']} cases)")
    return text
