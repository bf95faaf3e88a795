"""Layout rules: which keys a head *reads*, as small hashable values (the sparse half of a `Program`).

A rule speaks of *positions*: the index of a token counted from the first real token of its row, so that left
padding never moves a sink. Rules say nothing about causality or padding, which are the `Mask`'s business; the
keys a query finally sees are those that the mask and every rule allow.

Convention: a *window* counts visible keys including the query's own.
"""

from .base import Everything, Ranges, Rule
from .combine import AllOf, OnHeads, intersect
from .dynamic import ChosenBlocks, ChosenCells, ColumnsDiagonals
from .grid import Appended, BlockWindows, Disc
from .neighborhood import Neighborhood
from .sink_window import BlockSinkWindow, SinkWindow, StridedShards

__all__ = [
    "AllOf",
    "Appended",
    "BlockSinkWindow",
    "BlockWindows",
    "ChosenBlocks",
    "ChosenCells",
    "ColumnsDiagonals",
    "Disc",
    "Everything",
    "Neighborhood",
    "OnHeads",
    "Ranges",
    "Rule",
    "SinkWindow",
    "StridedShards",
    "intersect",
]
