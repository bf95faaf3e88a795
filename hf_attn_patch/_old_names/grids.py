"""`hf_attn_patch.grids` is `hf_attn_patch.model.grids` and `hf_attn_patch.patches.on_grid`."""

from hf_attn_patch.model.grids import Grid, config_grid, configured_grid, per_axis
from hf_attn_patch.patches.on_grid import ChosenOnGrid, GridPatch, better_stride, call_grid, saves_nothing

__all__ = [
    "ChosenOnGrid",
    "Grid",
    "GridPatch",
    "better_stride",
    "call_grid",
    "config_grid",
    "configured_grid",
    "per_axis",
    "saves_nothing",
]
