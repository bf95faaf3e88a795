"""A map over a picture as SVG, by matplotlib (extra ``eval``)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np


def draw(values: np.ndarray, image: Any = None, title: str = "") -> str | None:
    """`values` [h, w] in 0 … 1 as SVG, half transparent over `image` (PIL or [H, W, 3]); None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    height, width = values.shape if image is None else np.asarray(image).shape[:2]
    figure = Figure(figsize=(4, 0.4 + 4 * height / width), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    extent = (0, width, height, 0)
    if image is not None:
        axes.imshow(np.asarray(image), extent=extent)
    shown = axes.imshow(
        values, extent=extent, cmap="magma", vmin=0, vmax=1, alpha=1.0 if image is None else 0.55,
        interpolation="nearest" if image is None else "bilinear",
    )  # fmt: skip
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(shown, ax=axes, shrink=0.7)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_attn_patch", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})  # the same map gives the same file
    return text.getvalue()
