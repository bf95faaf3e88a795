"""Pictures of plans: layers x heads, and the set of plans that no other one beats. SVG by matplotlib (extra `eval`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np


def _axes(width: float, height: float) -> tuple[Any, Any] | None:
    """A figure without a window, or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_attn_patch", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})  # the same plan gives the same file
    return text.getvalue()


def draw_plan(values: np.ndarray, title: str, low: float = 0.0, high: float = 1.0) -> str | None:
    """Heat map of one number per (layer, head): values [layers, heads]; None without matplotlib."""
    made = _axes(max(4.5, 1.8 + 0.24 * len(values)), 1.6 + 0.28 * values.shape[1])
    if made is None:
        return None
    figure, axes = made
    image = axes.imshow(values.T, aspect="auto", cmap="viridis", vmin=low, vmax=high, origin="lower")
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_yticks(range(values.shape[1]))
    axes.set_title(f"{title} (mean {values.mean():.2f})", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes)
    return _svg(figure)


def draw_front(plans: Sequence[Any], best: int, lengths: Sequence[int]) -> str | None:
    """Losses of all plans at the shortest and at the longest length; the chosen one is marked."""
    made = _axes(5, 3.6)
    if made is None:
        return None
    figure, axes = made
    points = np.array([(p.objectives[0], p.objectives[-1]) for p in plans])
    axes.scatter(points[:, 0], points[:, 1], s=24, color="#4878a8", label=f"{len(plans)} plans")
    axes.scatter(*points[best], s=110, facecolors="none", edgecolors="#c03030", linewidths=2, label="chosen")
    axes.set_xlabel(f"influence lost at {lengths[0]} tokens")
    axes.set_ylabel(f"influence lost at {lengths[-1]} tokens")
    axes.set_title("Plans that no other one beats", fontsize=10, loc="left")
    axes.legend(frameon=False)
    return _svg(figure)
