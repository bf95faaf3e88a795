"""Small inline SVG pictures. Colours are CSS variables of the page, so that light and dark schemes both work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Bar:
    """One bar. text: what is written at its end. color: CSS variable name, e.g. ``--c0``. note: tooltip."""

    label: str
    value: float
    text: str
    color: str
    note: str = ""


class Picture(str):
    """SVG text that this package drew, with every text in it escaped: the only thing a template shows as it is."""

    def __html__(self) -> str:
        return str(self)


def _svg(width: float, height: float, body: Sequence[str], title: str, css: str = "") -> Picture:
    return Picture(
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, text: str, css: str = "t", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(items: Sequence[Bar], title: str, width: int = 256) -> str:
    """Horizontal bars from zero, one row each, the label above its bar."""
    top = max((b.value for b in items), default=0.0) or 1.0
    row, room = 34, width - 66
    body = []
    for i, bar in enumerate(items):
        y = i * row
        length = max(room * bar.value / top, 1.5)
        note = f"<title>{escape(bar.note or f'{bar.label}: {bar.text}')}</title>"
        body.append(_text(0, y + 11, bar.label, "t small"))
        body.append(f'<rect x="0" y="{y + 15}" width="{room}" height="12" rx="3" class="track"/>')
        fill = f'style="fill:var({bar.color})"'
        body.append(f'<rect x="0" y="{y + 15}" width="{length:.1f}" height="12" rx="3" {fill}>{note}</rect>')
        body.append(_text(width, y + 25.5, bar.text, "t num", "end"))
    return _svg(width, row * len(items) - 6, body, title, "bars")


def heat_map(
    values: Sequence[Sequence[float]],
    title: str,
    *,
    color: str,
    cell_notes: Sequence[Sequence[str]],
    x_label: str,
    y_label: str,
) -> str:
    """Cells [rows][columns] in 0 … 1, darker = more; every tenth column is numbered."""
    rows, columns, cell, left, top = len(values), len(values[0]), 20, 34, 18
    body = [_text(left, 12, x_label, "t small muted")]
    for y, line in enumerate(values):
        body.append(_text(left - 6, top + y * cell + 14, str(y), "t small muted", "end"))
        for x, value in enumerate(line):
            at = f'x="{left + x * cell + 1}" y="{top + y * cell + 1}"'
            box = f'{at} width="{cell - 2}" height="{cell - 2}" rx="2"'
            shade = f"fill:var({color});fill-opacity:{0.07 + 0.93 * min(max(value, 0), 1):.3f}"
            body.append(f'<rect {box} style="{shade}"><title>{escape(cell_notes[y][x])}</title></rect>')
    bottom = top + rows * cell
    for x in range(columns):
        if x % 5 == 0 or columns <= 12:
            body.append(_text(left + x * cell + cell / 2, bottom + 13, str(x), "t small muted", "middle"))
    body.append(
        f'<text class="t small muted" text-anchor="middle" transform="translate(10 {top + rows * cell / 2:g}) '
        f'rotate(-90)">{escape(y_label)}</text>'
    )
    return _svg(left + columns * cell + 2, bottom + 18, body, title, "heat")


def block_grid(grid: Sequence[Sequence[int]], title: str, color: str, caption: str = "") -> str:
    """Query blocks (rows) x key blocks (columns): 0 not read, 1 read in part, 2 read in full; runs are merged."""
    rows, columns = len(grid), len(grid[0])
    size = 160
    w, h = size / columns, size / rows
    body = [f'<rect x="0" y="0" width="{size}" height="{size}" rx="3" class="track"/>']
    for y, line in enumerate(grid):
        x = 0
        while x < columns:
            kind, end = line[x], x
            while end < columns and line[end] == kind:
                end += 1
            if kind:
                # crisp: antialiased edges of neighbouring rows would show as seams
                box = f'x="{x * w:.2f}" y="{y * h:.2f}" width="{(end - x) * w:.2f}" height="{h:.2f}"'
                shade = f"fill:var({color});fill-opacity:{1 if kind == 2 else 0.5}"
                body.append(f'<rect {box} style="{shade}" shape-rendering="crispEdges"/>')
            x = end
    height = size
    if caption:
        height += 20
        body.append(_text(size / 2, size + 15, caption, "t", "middle"))
    return _svg(size, height, body, title, "blocks")


def patch_grid(
    shades: Sequence[Sequence[float]],
    seen: Sequence[Sequence[bool]],
    query: tuple[int, int],
    title: str,
    color: str,
    caption: str = "",
) -> str:
    """An image as a grid of patches: brightness `shades` 0 … 1, patches that `query` reads tinted, itself ringed."""
    rows, columns, size = len(shades), len(shades[0]), 160
    w, h = size / columns, size / rows
    body = []
    for y in range(rows):
        for x in range(columns):
            box = f'x="{x * w + 0.3:.2f}" y="{y * h + 0.3:.2f}" width="{w - 0.6:.2f}" height="{h - 0.6:.2f}"'
            level = round(24 + 214 * shades[y][x])
            body.append(f'<rect {box} fill="rgb({level},{level},{level})"/>')
            if seen[y][x]:
                body.append(f'<rect {box} style="fill:var({color});fill-opacity:.62"/>')
    y, x = query
    body.append(
        f'<rect x="{x * w:.2f}" y="{y * h:.2f}" width="{w:.2f}" height="{h:.2f}" rx="1" fill="none" class="ring"/>'
    )
    height = size
    if caption:
        height += 20
        body.append(_text(size / 2, size + 15, caption, "t", "middle"))
    return _svg(size, height, body, title, "blocks")
