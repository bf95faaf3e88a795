"""The page of one eval run: dense beside patched, groups, intervals, needle maps, answers side by side, settings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..env import lines
from . import svg
from .needle_map import needle_map
from .page import COLORS, ReportError, templates

MOST_ANSWERS = 200  # rows of answers on the page; all of them are in result.json
MOST_CHARACTERS = 300


def write(
    record: Mapping[str, Any], path: str | Path, attachments: Sequence[Mapping[str, str]] | None = None
) -> Path:
    """Render the record of an eval run (`Result.to_dict()`) into the file `path`.

    attachments: pictures of the first items (`Result.attachments`): title -> data URI of an image, or SVG text.

    Raises:
        ReportError: jinja2 is not installed.
    """
    target = Path(path)
    target.write_text(render(record, attachments), encoding="utf-8")
    return target


def render(record: Mapping[str, Any], attachments: Sequence[Mapping[str, str]] | None = None) -> str:
    """The page as text: no script, no link to any asset. attachments: see `write`.

    Raises:
        ReportError: jinja2 is not installed.
    """
    env = templates()
    colors = {v["label"]: COLORS[i % len(COLORS)] for i, v in enumerate(record["variants"])}
    return env.get_template("eval.html.jinja").render(
        record=record,
        colors=colors,
        metrics=record["metrics"],
        rows=[_row(v, record["metrics"]) for v in record["variants"]],
        groups=_groups(record),
        details=record.get("details") or [],
        bars=[_bars(record, m, colors) for m in record["metrics"]],
        maps=needle_map(record),
        answers=_answers(record, attachments or []),
        checks=record.get("checks") or [],
        all_answers=record["items"],
        settings=[(k, v) for k, v in record["task"]["config"].items() if v is not None],
        environment=lines(record["environment"]),
    )


def number(value: float | None, digits: int) -> str:
    """A number for a table; JSON's null (nan) is a dash."""
    return "–" if value is None or value != value else f"{value:,.{digits}f}".replace(",", "\u202f")


def _row(variant: Mapping[str, Any], metrics: list[Mapping[str, Any]]) -> dict[str, Any]:
    cells = []
    for m in metrics:
        difference = variant["difference"].get(m["name"])
        cells.append(
            {
                "text": number(variant["aggregates"][m["name"]], m["digits"]),
                "note": _interval(difference, m["digits"]),
                "css": _verdict(difference, m["higher_is_better"]),
            }
        )
    densities = [s["density"] for s in variant["sites"] if s["density"] is not None]
    executors = sorted({str(s["executor"]) for s in variant["sites"]})
    return {
        "label": variant["label"],
        "patch": variant["patch"],
        "cells": cells,
        "density": number(100 * sum(densities) / len(densities), 1) + " %" if densities else "–",
        "executors": ", ".join(executors) or "–",
        "seconds": number(variant["seconds"], 1),
    }


def _interval(difference: Mapping[str, Any] | None, digits: int) -> str:
    if not difference or difference["value"] is None:
        return ""
    text = f"{difference['value']:+.{digits}f}"
    if difference["low"] is None or difference["high"] is None:
        return text
    return f"{text} [{difference['low']:+.{digits}f}, {difference['high']:+.{digits}f}]"


def _verdict(difference: Mapping[str, Any] | None, higher_is_better: bool | None) -> str:
    if higher_is_better is None or not difference or not difference.get("significant"):
        return ""
    return "good" if (difference["value"] > 0) == higher_is_better else "bad"


def _groups(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per group of items, one number per variant and metric; nothing if there is one group."""
    names = list(dict.fromkeys(record["groups"] or []))
    if len(names) < 2:
        return []
    return [
        {
            "name": name,
            "count": record["groups"].count(name),
            "cells": [
                number(v["by_group"][m["name"]][name], m["digits"])
                for m in record["metrics"]
                for v in record["variants"]
            ],
        }
        for name in names
    ]


def _bars(record: Mapping[str, Any], metric: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, str]:
    bars = []
    for v in record["variants"]:
        value = v["aggregates"][metric["name"]]
        text = number(value, metric["digits"])
        shown = 0.0 if value is None or value != value else value
        bars.append(svg.Bar(v["label"], shown, text, colors[v["label"]]))
    arrow = {True: " ↑", False: " ↓"}.get(metric["higher_is_better"], "")
    return {"title": f"{metric['name']}, {metric['unit']}{arrow}", "svg": svg.bars(bars, metric["name"])}


def _answers(record: Mapping[str, Any], attachments: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    if not any(v["answers"] for v in record["variants"]):
        return []
    main, facts, rows = record["metrics"][0], record["facts"] or [], []
    for i in range(min(record["items"], MOST_ANSWERS)):
        fact = facts[i] if i < len(facts) else {}
        said = [
            {
                "pieces": _pieces(str((v["answers"] or {i: ""})[i]), (v.get("marks") or {i: []})[i]),
                "score": number(v["scores"][main["name"]][i], main["digits"]),
            }
            for v in record["variants"]
        ]
        where = [f"{k} {v}" for k, v in fact.items() if k not in ("expected", "tokens", "asked", "image")]
        rows.append(
            {
                "expected": ", ".join(fact.get("expected", [])),
                "asked": " / ".join(fact.get("asked", [])),
                "where": ", ".join(where),
                "said": said,
                "pictures": [(t, _source(p)) for t, p in attachments[i].items()]
                if i < len(attachments)
                else [],
                "differs": _differing(record, i),
            }
        )
    return rows


def _source(picture: str) -> str:
    """Source of an <img>: in one, an SVG of whatever origin runs nothing and fetches nothing.

    Raises:
        ReportError: neither SVG text nor a data URI of an image.
    """
    if picture.startswith("<svg"):
        return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()
    if not picture.startswith("data:image/"):
        raise ReportError(f"an attachment is SVG text or a data URI of an image, this is {picture[:40]!r}")
    return picture


def _pieces(text: str, marks: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    """(text, ``good``, ``bad`` or "") of an answer, in order; an answer without marks is cut."""
    if not marks:
        return [(text[:MOST_CHARACTERS], "")]
    pieces, at = [], 0
    for start, end, css in marks:
        pieces += [(text[at:start], ""), (text[start:end], css)]
        at = end
    return [p for p in [*pieces, (text[at:], "")] if p[0]]


def _differing(record: Mapping[str, Any], item: int) -> list[str]:
    """Answers of patches at their neutral value that are not the dense one."""
    dense = record["variants"][0]["answers"][item]
    found = [
        (c, (c["answers"] or {}).get(str(item), c["answers"].get(item))) for c in record.get("checks") or []
    ]
    return [
        f"{c['label']} at its neutral value said: {said}" for c, said in found if said not in (None, dense)
    ]
