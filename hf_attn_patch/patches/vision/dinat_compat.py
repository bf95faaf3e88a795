"""`dinat_compat`: neighborhood attention with DiNAT's relative position bias, on the grid of any ViT."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...call.program import head_selector
from ...call.rules import Neighborhood
from ...errors import ModelMismatchError
from ...model.grids import Grid, config_grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import GridPatch, call_grid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@functools.lru_cache(maxsize=16)
def bias_index(grid: Grid, window: Grid, dilation: Grid) -> Tensor:
    """Entry of a flattened table [2 W - 1, ...] for each pair of grid tokens, int64 [N, N].

    Per axis the entry is ``k // d - q // d + W - 1``; pairs outside the window get some entry (nobody reads them).
    """
    index = torch.zeros(1, 1, dtype=torch.long)
    for size, w, d in zip(grid, window, dilation):
        at = torch.arange(size) // d
        entry = (at[None] - at[:, None] + w - 1).clamp(0, 2 * w - 2)
        # [Nq, Nk] x [size, size] -> [Nq * size, Nk * size], row-major on both sides
        index = (index[:, None, :, None] * (2 * w - 1) + entry[None, :, None, :]).flatten(2).flatten(0, 1)
    return index


def position_bias(table: Tensor, grid: Grid, window: Grid, dilation: Grid, prefix: int = 0) -> Tensor:
    """Additive score bias [1, H, prefix + N, prefix + N] from a table [H, 2 W - 1, ...]; prefix tokens get 0."""
    bias = table.flatten(1)[:, bias_index(grid, window, dilation).to(table.device)]
    return F.pad(bias, (prefix, 0, prefix, 0))[None]


@register_patch("dinat_compat")
@dataclass
class DinatCompat(GridPatch):
    """Neighborhood attention with a learned bias per relative position, as DiNAT checkpoints hold it.

    Source: Dilated Neighborhood Attention Transformer, arXiv 2209.15001 (transformers 5.23 `modeling_dinat.py`, READ;
    NATTEN 0.17.5 CPU kernels, READ and RAN).

    Formula: ``score_ij = scale q_i . k_j + rpb[h, b_1, b_2]`` for the keys j in the window of `neighborhood`, with
    ``b = j // d - i // d + W - 1`` per axis and rpb [H, 2 W - 1, ...], a parameter per layer that starts at 0, is
    trained and saved with the patch. It has the shape and meaning of ``attention.self.rpb`` of a DiNAT layer.
    The paper alternates dilation 1 and floor(grid / W): ``layers={"1::2": {"dilation": 2}}``.

    Neutral value: window = grid and dilation 1 (untrained).

    Differs from the original: the bias and the window on any ViT whose attention goes through transformers' attention
    interface. HF's own `dinat` models do not: they ask for natten when they are built, and call two of its functions
    that 0.17.5 removed, so they are refused. A grid smaller than window x dilation is refused, where a DiNAT layer pads
    it with tokens that are attended. Prefix tokens take part with bias 0. The bias is one L x L table per head while a
    layer runs: this saves no time over `neighborhood`.
    """

    paper = "Dilated Neighborhood Attention Transformer"
    arxiv = "2209.15001"
    trainable = True
    without_site = (
        "HF's dinat calls natten2dqkrpb and natten2dav, which natten 0.17.5 removed, inside its own forward; no "
        "attention function is looked up that could be patched. Use this method on a ViT (vit, dinov2, ...) and "
        "load its `rpb` tables from the checkpoint, or run dinat with an older natten and transformers"
    )

    window: int | tuple[int, ...] = option(
        7, help="keys per axis (one number, or one per axis); HF: kernel_size"
    )
    dilation: int | tuple[int, ...] = option(1, help="distance of neighbouring keys per axis")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require_sizes("window", "dilation")
        self.require_grid()

    def check(self, site: Site) -> None:
        if site.num_heads is None:
            raise ModelMismatchError(
                f"dinat_compat: the number of heads of {site.path} is unknown, a table has one row each"
            )

    def rule(self, grid: Grid, prefix: int) -> Neighborhood:
        window, dilation = self.sizes(grid)
        for axis, (size, w, d) in enumerate(zip(grid, window, dilation)):
            if w * d > size:
                raise ModelMismatchError(
                    f"dinat_compat: window {w} x dilation {d} = {w * d} exceeds axis {axis} of the grid {grid}; at "
                    f"most {size // d} fits"
                )
        axes = len(grid)
        return Neighborhood(tuple(grid), window, (1,) * axes, dilation, (False,) * axes, prefix)

    def sizes(self, grid: Grid) -> tuple[Grid, Grid]:
        """(window, dilation) per axis of `grid`."""
        return per_axis(self.name, "window", self.window, grid), per_axis(
            self.name, "dilation", self.dilation, grid
        )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        window = self.window
        if not isinstance(window, tuple):
            known = self.grid or config_grid(getattr(site.module, "config", None)) or (0, 0)
            window = (window,) * len(known)
        return {"rpb": nn.Parameter(torch.zeros(site.num_heads or 0, *(2 * w - 1 for w in window)))}

    def edit(self, program: Program, call: Call) -> None:
        grid, prefix = call_grid(self.name, self.given, program, call)
        rule = self.rule(grid, prefix)
        table = call.tensors.rpb
        assert isinstance(table, Tensor)
        if table.ndim != len(grid) + 1:
            raise ModelMismatchError(
                f"dinat_compat: the table of {call.path} has {table.ndim - 1} axes, the grid {grid} has {len(grid)}; "
                "give one window per axis"
            )
        bias = position_bias(table, rule.grid, rule.window, rule.dilation, prefix)
        chosen = head_selector(call.heads, program.num_heads, bias.device)
        bias = (bias if chosen is None else bias * chosen).to(program.query.dtype)
        program.position_bias = bias if program.position_bias is None else program.position_bias + bias
        program.restrict(rule, call.heads)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None:
            return []
        small = [max(1, min(3, g)) for g in grid]
        half = [max(1, g // 2) for g in grid]
        return [{"window": small}, {"window": half, "dilation": [2 if g >= 2 else 1 for g in grid]}]
