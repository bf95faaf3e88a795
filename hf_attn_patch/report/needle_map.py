"""The needle map: depth x length, one map per variant, the deeper the colour the more was found."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from . import svg


def needle_map(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Maps of an eval record whose items have a length and a depth: group of items -> variant -> SVG.

    The group is the subtask where there are several (`ruler`), else "". A cell is the mean of the main metric over its
    items. Empty if no item has both facts, or the main metric is no share. Colours are CSS variables of the page.

    Args:
        record: `Result.to_dict()`, or result.json read back.
    """
    facts = record.get("facts") or []
    metric = record["metrics"][0]
    if metric["unit"] != "share":
        return {}
    subtasks: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        if "length" in fact and "depth" in fact:
            subtasks.setdefault(str(fact.get("subtask", "")), []).append(i)
    maps: dict[str, dict[str, str]] = {}
    for subtask, chosen in subtasks.items():
        lengths = sorted({facts[i]["length"] for i in chosen})
        depths = sorted({facts[i]["depth"] for i in chosen})
        for n, variant in enumerate(record["variants"]):
            cells: dict[tuple[float, int], list[float]] = {}
            for i in chosen:
                place = (facts[i]["depth"], facts[i]["length"])
                cells.setdefault(place, []).append(variant["scores"][metric["name"]][i])
            title = f"{variant['label']}: {metric['name']} by depth and length"
            maps.setdefault(subtask, {})[variant["label"]] = _draw(
                cells, depths, lengths, title, f"--c{n % 6}"
            )
    return maps


def _draw(
    cells: Mapping[tuple[float, int], list[float]],
    depths: list[float],
    lengths: list[int],
    title: str,
    color: str,
) -> str:
    left, top, wide, high = 46, 18, 52, 24
    body = [svg._text(left, 12, "length →, depth of the needle ↓", "t small muted")]
    for y, depth in enumerate(depths):
        body.append(svg._text(left - 6, top + y * high + 16, f"{depth:.0%}", "t small muted", "end"))
        for x, length in enumerate(lengths):
            found = cells.get((depth, length))
            if not found:
                continue
            mean = sum(found) / len(found)
            place = f'x="{left + x * wide + 1}" y="{top + y * high + 1}" width="{wide - 2}" height="{high - 2}" rx="2"'
            note = (
                f"<title>{escape(f'{length} tokens, depth {depth:.0%}: {mean:.0%} of {len(found)}')}</title>"
            )
            shade = f"fill:var({color});fill-opacity:{0.85 * min(max(mean, 0.0), 1.0):.3f}"
            body.append(f'<rect {place} class="track"/><rect {place} style="{shade}">{note}</rect>')
            # the number as well as the colour: a picture in grey tells the same
            body.append(
                svg._text(left + x * wide + wide / 2, top + y * high + 16, f"{mean:.0%}", "t small", "middle")
            )
    bottom = top + len(depths) * high
    for x, length in enumerate(lengths):
        body.append(
            svg._text(left + x * wide + wide / 2, bottom + 13, str(length), "t small muted", "middle")
        )
    # a map of few lengths is not blown up to the width of the page
    return svg._svg(max(left + len(lengths) * wide + 2, 400), bottom + 18, body, title, "heat")
