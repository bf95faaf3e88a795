"""What a plan's patterns would save at one size, before anything is patched: tiles visited per group of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import PatchError
from ..patches.on_grid import GridPatch, better_stride
from .estimate import edited_call, size_of
from .pretend import Forward, program_of
from .tiles import Tiles, tiles_of

if TYPE_CHECKING:
    from ..install.plan import Plan


@dataclass
class Saving:
    """One pattern. layers: the sites of the plan's part that read it. tiles: what it visits, None where it is chosen by
    content or nothing is left out; `text` says which. hint: how it would visit fewer."""

    layers: list[int]
    tiles: Tiles | None
    text: str
    hint: str = ""


@dataclass
class Simulation:
    """Savings of a plan for `tokens` tokens (`grid` of an image). ``str()`` is what ``hf-attn-patch plan`` prints."""

    tokens: int
    grid: tuple[int, ...] | None
    savings: list[Saving] = field(default_factory=list)

    def __str__(self) -> str:
        where = f"{self.tokens} tokens" + (f" (grid {' x '.join(map(str, self.grid))})" if self.grid else "")
        lines = [f"at {where}:"]
        for s in self.savings:
            layers = (
                f"layer {s.layers[0]}" if len(s.layers) == 1 else f"{len(s.layers)} layers from {s.layers[0]}"
            )
            lines.append(f"  {layers}: {s.text}" + (f"; {s.hint}" if s.hint else ""))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The simulation as JSON data."""
        rows = [
            {"layers": s.layers, "text": s.text, "hint": s.hint,
             "speedup": None if s.tiles is None else s.tiles.speedup,
             "tiles": None if s.tiles is None else s.tiles.visited / s.tiles.possible,
             "pairs": None if s.tiles is None else s.tiles.pairs / s.tiles.possible_pairs}
            for s in self.savings
        ]  # fmt: skip
        return {"tokens": self.tokens, "grid": self.grid, "savings": rows}


def simulate(
    model: Any, plan: Plan, length: int | None = None, image: tuple[int, int] | None = None
) -> Simulation:
    """Tiles that `plan` visits on `model` at one size, from made-up calls (see `estimate`).

    Args:
        length: tokens, for text. image: pixels (height, width), for vision; None = the configured size.

    Raises:
        ConfigError: see `size_of`.
    """
    part = plan.sites[0].part if plan.part is None else plan.part
    tokens, grid = size_of(model, part, length, image)
    made = Simulation(tokens, grid)
    forward = Forward(model, tokens, grid, tokens // 2)
    known: dict[Any, torch.Tensor] = {}
    groups: dict[Any, Saving] = {}
    for site, kinds in zip(plan.sites, plan.variants):
        if part not in site.parts:
            continue
        try:
            program = program_of(site, tokens, tokens, known)
            with torch.no_grad():
                edited_call(program, site, kinds, plan, forward)
        except PatchError as error:
            groups.setdefault(
                str(error), Saving([], None, f"not known before a forward: {error}")
            ).layers.append(site.layer)
            continue
        rule = program.rule
        if rule is None or rule.dynamic:
            text = "reads every key" if rule is None else "chooses its keys by content: measure it"
            groups.setdefault(text, Saving([], None, text)).layers.append(site.layer)
            continue
        if rule not in groups:
            tiles = tiles_of(rule, tokens, program.mask.kv_len, 0, site.causal, site.window)
            groups[rule] = Saving([], tiles, str(tiles), _hint(kinds[0][1], grid, tokens, tiles))
        groups[rule].layers.append(site.layer)
    made.savings = list(groups.values())
    return made


def _hint(config: Any, grid: tuple[int, ...] | None, tokens: int, tiles: Tiles) -> str:
    """What would visit fewer tiles, where that is known: another stride of a window on a grid."""
    if grid is None or not isinstance(config, GridPatch) or tiles.wasted < 0.005:
        return ""
    found = better_stride(config, grid, tokens - math.prod(grid))
    if found is None or found[1] >= tiles.visited / tiles.possible:
        return ""
    return f"use stride={found[0]}: {found[1]:.0%} of the tiles"
