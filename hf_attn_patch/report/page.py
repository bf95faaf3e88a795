"""The demo record as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..env import lines
from . import svg

COLORS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5")  # dense first, then one per patch

ARROWS = {"lower": " ↓", "higher": " ↑"}


class ReportError(ValueError):
    """The page cannot be made; the message says what is missing."""


def write(record: Mapping[str, Any], path: str | Path) -> Path:
    """Render `record` (of the demo) into the file `path`.

    Raises:
        ReportError: jinja2 is not installed.
    """
    target = Path(path)
    target.write_text(render(record), encoding="utf-8")
    return target


def render(record: Mapping[str, Any]) -> str:
    """The page as text: no script, no link to any asset.

    Raises:
        ReportError: jinja2 is not installed.
    """
    env = templates()
    models = [_model(m) for m in record["models"]]
    return env.get_template("demo.html.jinja").render(
        record=record,
        models=models,
        environment=lines(record["environment"]),
        minutes=f"{record['seconds'] / 60:.1f}",
    )


def templates() -> Any:
    """The jinja2 environment of the pages of this package.

    Raises:
        ReportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ReportError("the HTML page needs jinja2: pip install 'hf_attn_patch[eval]'") from error
    return Environment(
        loader=PackageLoader("hf_attn_patch.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, "parts": [_part(p) for p in model["parts"]]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    colors = {row["label"]: COLORS[i % len(COLORS)] for i, row in enumerate(part["rows"])}
    return {
        "title": part["title"],
        "columns": part["columns"],
        "rows": [_row(row, part["columns"], colors[row["label"]], part["intervals"]) for row in part["rows"]],
        "bars": [_bars(part, column, colors) for column in part["columns"] if column["key"] in part["drawn"]],
        "figures": [*_spans(part, colors), *_layouts(part, colors), *_neighbourhoods(part, colors)],
        "notes": part["notes"],
    }


def _row(
    row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], color: str, intervals: Mapping[str, Any]
) -> dict[str, Any]:
    cells = []
    for column in columns:
        key = column["key"]
        if key not in row["values"]:
            cells.append({"text": "", "note": "", "css": ""})
            continue
        dense = row["method"] is None
        cells.append(
            {
                "text": format_value(row["values"][key], column),
                "note": "" if dense else format_ratio(row, column, intervals),
                "css": "" if dense else verdict(row, column, intervals),
            }
        )
    return {**row, "cells": cells, "color": color}


def format_value(value: float, column: Mapping[str, Any]) -> str:
    """A number as its column wants it; shares of a count are written k/n."""
    if column["unit"] == "%":
        return f"{value * 100:.{column['digits']}f} %"
    if column.get("of"):
        return f"{round(value * column['of'])}/{column['of']}"
    return f"{value:,.{column['digits']}f}".replace(",", "\u202f")


def format_ratio(row: Mapping[str, Any], column: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    """Against dense: an interval of the difference where there is one, else a ratio."""
    interval = intervals.get(row["label"], {}).get(column["key"])
    if interval is not None and interval["low"] is not None:
        scale, digits = (100, column["digits"]) if column["unit"] == "%" else (1, column["digits"])
        return f"[{interval['low'] * scale:+.{digits}f}, {interval['high'] * scale:+.{digits}f}]"
    ratio = row["ratios"].get(column["key"])
    if ratio is None or column.get("of") or column["better"] == "none" or column["unit"] in ("cosine", "%"):
        return ""
    return f"×{ratio:.2f}"


def verdict(
    row: Mapping[str, Any],
    column: Mapping[str, Any],
    intervals: Mapping[str, Any],
    margin: float = 0.02,
) -> str:
    """``good``, ``bad`` or nothing: an interval without 0, or a ratio beyond `margin`, on that side of dense."""
    if column["better"] == "none":
        return ""
    interval = intervals.get(row["label"], {}).get(column["key"])
    if interval is not None and interval["low"] is not None:
        change = interval["value"] if interval["significant"] else 0.0
    else:
        change = (row["ratios"].get(column["key"]) or 1.0) - 1
        change = change if abs(change) > margin else 0.0
    if change == 0.0:
        return ""
    return "good" if (change > 0) == (column["better"] == "higher") else "bad"


def _bars(part: Mapping[str, Any], column: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, str]:
    key, bars = column["key"], []
    for row in part["rows"]:
        if key in row["values"]:
            text = format_value(row["values"][key], column)
            bars.append(svg.Bar(row["label"], row["values"][key], text, colors[row["label"]], row["call"]))
    better = {"lower": "lower is better", "higher": "higher is better"}.get(column["better"], "")
    return {
        "title": column["label"],
        "better": better,
        "arrow": ARROWS.get(column["better"], ""),
        "svg": svg.bars(bars, column["label"]),
    }


def _spans(part: Mapping[str, Any], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Layers x KV heads: keys that the last query reads."""
    figures = []
    for label, seen in part["pictures"].items():
        spans = seen.get("spans")
        if not spans or len({n for line in spans for n in line}) < 2:
            continue  # a constant is a number in the table, not a picture
        length = seen["length"]
        table = list(map(list, zip(*spans)))
        notes = [
            [f"layer {seen['layers'][x]}, KV head {y}: {n} of {length} keys" for x, n in enumerate(line)]
            for y, line in enumerate(table)
        ]
        picture = svg.heat_map(
            [[n / length for n in line] for line in table],
            f"{label}: keys read per layer and KV head",
            color=colors[label],
            cell_notes=notes,
            x_label="layer →",
            y_label="KV head",
        )
        wide, narrow = max(map(max, spans)), min(map(min, spans))
        figures.append(
            {
                "title": f"{label}: which heads look back",
                "caption": f"Keys that the last of {length} tokens reads, per layer and KV head: from {narrow} (pale) "
                f"to {wide} (dark). The KV cache of each head holds exactly these.",
                "svgs": [picture],
                "kind": "wide",
            }
        )
    return figures


def _layouts(part: Mapping[str, Any], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Block grids of one layer, dense first."""
    shown = {k: v for k, v in part["pictures"].items() if v.get("blocks")}
    if not shown:
        return []
    from ..eval.pictures import causal_blocks

    length = next(iter(shown.values()))["length"]
    dense = part["rows"][0]["label"]
    pictures = [svg.block_grid(causal_blocks(length), "dense", colors[dense], "dense")]
    layers = set()
    for label, seen in shown.items():
        several = len(seen["blocks"]) > 1
        if several:
            layers.add(seen["shown_layer"])
        for head, grid in enumerate(seen["blocks"]):
            name = f"moa, KV head {head}" if label.startswith("moa") and several else label
            name = f"{label}, KV head {head}" if several and not label.startswith("moa") else name
            pictures.append(svg.block_grid(grid, name, colors[label], name))
    what = f"layer {layers.pop()}" if len(layers) == 1 else "one layer"
    return [
        {
            "title": f"What {what} reads",
            "caption": f"{length} queries from top to bottom, {length} keys from left to right, in blocks of 64. "
            "Solid: the whole block is read; half-tone: a part of it; empty: never touched.",
            "svgs": pictures,
            "kind": "row wide",
        }
    ]


def _neighbourhoods(part: Mapping[str, Any], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Patches that three queries read, over the image."""
    figures = []
    for label, seen in part["pictures"].items():
        if not seen.get("views"):
            continue
        pictures = [
            svg.patch_grid(seen["image"], view["seen"], tuple(view["query"]), label, colors[label])
            for view in seen["views"]
        ]
        grid = seen["grid"]
        prefix = "the CLS token is" if seen["prefix"] == 1 else f"{seen['prefix']} prefix tokens are"
        figures.append(
            {
                "title": label,
                "caption": "Patches (tinted) that one query patch (ringed) reads, of "
                f"{grid[0]} × {grid[1]}; {prefix} always read. Windows shift inward at the border and keep their size.",
                "svgs": pictures,
                "kind": "row",
            }
        )
    return figures
