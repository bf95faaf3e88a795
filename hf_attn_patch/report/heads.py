"""Head maps of a vision model as one HTML file: no script, no link to any asset."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..inspection.heads import GLOBAL, LOCAL, TARGET, kind_of
from . import svg
from .page import ReportError, templates

if TYPE_CHECKING:
    from ..inspection.heads import HeadMaps

COLORS = {"local": "--c1", "hybrid": "--c2", "global": "--c4"}
OF = {
    "cls": "where the CLS token looks",
    "received": "how much each patch receives from all patches, on average",
}


def write(maps: HeadMaps, picture: Any, path: str | Path, **facts: Any) -> Path:
    """Render `maps` into the file `path`. picture: uint8 [H, W, 3], what the model saw. facts: see `render`.

    Raises:
        ReportError: jinja2 or Pillow is not installed.
    """
    target = Path(path)
    target.write_text(render(maps, picture, **facts), encoding="utf-8")
    return target


def render(maps: HeadMaps, picture: Any, *, name: str = "", source: str = "", command: str = "") -> str:
    """The page as text. name: of the model. source: file name of the image. command: that made the page.

    Raises:
        ReportError: jinja2 or Pillow is not installed.
    """
    kinds = [k for row in maps.kinds() for k in row]
    rows = []
    for i, layer in enumerate(maps.layers):
        mean = float(maps.nmi[i].mean())
        heads = [
            {
                "number": head, "nmi": f"{value:.3f}", "kind": kind_of(value), "color": COLORS[kind_of(value)],
                "distance": f"{maps.distance[i, head]:.1f}", "image": overlay(maps.maps[i, head]),
            }
            for head, value in enumerate(maps.nmi[i])
        ]  # fmt: skip
        rows.append(
            {"number": layer, "nmi": f"{mean:.3f}", "kind": kind_of(mean), "distance": f"{maps.distance[i].mean():.1f}",
             "heads": heads}
        )  # fmt: skip
    h, w = maps.grid
    of_each, names = maps.layers, maps.kinds()
    return (
        templates()
        .get_template("heads.html.jinja")
        .render(
            maps=maps,
            name=name or maps.model,
            source=source,
            command=command,
            of=OF[maps.of],
            rows=rows,
            picture=png(np.asarray(picture, dtype=np.uint8)),
            ratio=f"{np.asarray(picture).shape[1]} / {np.asarray(picture).shape[0]}",
            counts={k: kinds.count(k) for k in COLORS},
            colors=COLORS,
            bounds={"local": LOCAL, "global": GLOBAL, "target": TARGET},
            nmi_plot=dots(maps.nmi, of_each, names, "NMI of each head by layer", (GLOBAL, LOCAL)),
            distance_plot=dots(
                maps.distance, of_each, names, "Attention distance of each head by layer, in patches"
            ),
            patch=f"{h} × {w}",
        )
    )


def dots(
    values: np.ndarray,
    layers: Sequence[int],
    kinds: Sequence[Sequence[str]],
    title: str,
    bounds: Sequence[float] = (),
) -> str:
    """One dot per head over its layer, a line through the means; values [layers, heads], lines at `bounds`."""
    width, height, left, top = 480, 220, 40, 12
    high = float(values.max()) * 1.06 or 1.0
    x = lambda i: left + (i + 0.5) * (width - left - 8) / len(layers)
    y = lambda v: top + (1 - v / high) * (height - top - 26)
    body = []
    step = tick(high)
    for n in range(int(high / step) + 1):
        at = y(n * step)
        body.append(f'<line x1="{left}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}" class="axis"/>')
        body.append(svg._text(left - 6, at + 4, f"{n * step:g}", "t small muted", "end"))
    for bound in bounds:
        if bound < high:
            at = y(bound)
            body.append(f'<line x1="{left}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}" class="bound"/>')
    way = " ".join(f"{x(i):.1f},{y(float(row.mean())):.1f}" for i, row in enumerate(values))
    body.append(f'<polyline points="{way}" class="mean"/>')
    for i, row in enumerate(values):
        if i % max(1, len(layers) // 16) == 0:
            body.append(svg._text(x(i), height - 6, str(layers[i]), "t small muted", "middle"))
        for head, value in enumerate(row):
            note = escape(f"layer {layers[i]}, head {head}: {value:.3f} ({kinds[i][head]})")
            shift = (head - (len(row) - 1) / 2) * min(3.0, 18 / len(row))
            body.append(
                f'<circle cx="{x(i) + shift:.1f}" cy="{y(float(value)):.1f}" r="4" '
                f'style="fill:var({COLORS[kinds[i][head]]})"><title>{note}</title></circle>'
            )
    return svg._svg(width, height, body, title, "plot")


def tick(high: float) -> float:
    """A round step that divides 0 … `high` into two to five."""
    step = 10.0 ** np.floor(np.log10(high))
    for factor in (0.2, 0.5, 1.0):
        if high / (step * factor) <= 5:
            return float(step * factor)
    return float(step * 2)


def overlay(values: np.ndarray) -> str:
    """A map [h, w] as a PNG with transparency, to lie over the picture: nothing where it is small, warm where large.

    The top is the 99th percentile, so that one patch (a register in disguise) does not hide all others.
    """
    top = float(np.quantile(values, 0.99)) or float(values.max()) or 1.0
    level = np.clip(values / top, 0, 1)[..., None]
    cold, warm, hot = (np.array(c, dtype=float) for c in ((36, 10, 70), (226, 74, 51), (255, 236, 140)))
    color = np.where(level < 0.5, cold + (warm - cold) * level * 2, warm + (hot - warm) * (level * 2 - 1))
    alpha = 255 * (0.72 - 0.12 * level)
    return png(np.concatenate([color, alpha], -1).round().astype(np.uint8))


def png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] as a data URI.

    Raises:
        ReportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ReportError("the HTML page needs Pillow: pip install 'hf_attn_patch[eval]'") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
