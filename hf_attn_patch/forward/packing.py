"""Several sequences in one row, told by whatever tells: position ids that begin again, lengths for a varlen kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .needs.base import Given
    from .running import Running


def look(running: Running, given: Given) -> None:
    """Note which sequence of its row every token belongs to, if the arguments of the outermost model say it."""
    return None
