"""One self-contained HTML page from the record of a demo: inline CSS and SVG, no script, nothing to fetch."""

from __future__ import annotations

from .page import render, write

__all__ = ["render", "write"]
