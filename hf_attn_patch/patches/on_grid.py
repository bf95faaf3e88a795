"""What methods on token grids share: the grid of a call, what a rule on it saves, and base classes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ModelMismatchError
from ..forward.needs import Need, TokenGrid
from ..forward.needs.grid import SeenGrid
from ..model.grids import Grid, configured_grid
from ..registry import Patch

if TYPE_CHECKING:
    from ..call.program import Program
    from ..call.rules import ChosenCells, Rule
    from ..install.stack import Call
    from ..model.sites import Site

TILE = 64  # tokens per side of the blocks that kernels skip
LARGEST = 1 << 20  # tokens of a grid: an image of 8192 x 8192 in patches of 8
NOTED = 1 << 16  # tokens of a grid up to which a note about it is worth a layout of it


def call_grid(name: str, given: Grid | None, program: Program, call: Call) -> tuple[Grid, int]:
    """(grid, prefix tokens) of an attention call; `given` overrides what was seen of the pixel values.

    Raises:
        ModelMismatchError: the grid is unknown, or the tokens of the call are not that grid plus prefix tokens.
    """
    seen = getattr(call.context, "pixels", SeenGrid(getattr(call.context, "grid", None)))
    if not seen.ordered:
        raise ModelMismatchError(f"{name}: {seen.why_not}")
    grid = given or seen.grid
    if grid is None:
        raise ModelMismatchError(
            f"{name}: no pixel values were seen before {call.path} (or its layer is recomputed by gradient "
            "checkpointing), so the token grid is unknown; pass grid=(height, width)"
        )
    tokens = math.prod(grid)
    prefix = program.q_len - tokens
    if prefix < 0 or program.mask.kv_len != program.q_len:
        raise ModelMismatchError(
            f"{name}: {call.path} attends {program.q_len} x {program.mask.kv_len} tokens, which is not the "
            f"grid {grid} of {tokens} tokens plus prefix tokens (a merging, windowed or masked backbone?)"
        )
    if seen.grid is not None and grid != seen.grid and math.prod(seen.grid) <= program.q_len:
        raise ModelMismatchError(
            f"{name}: grid={grid} was given, the pixel values of this forward have the grid {seen.grid}. Leave grid out"
        )
    if seen.images is not None and program.batch < seen.images:
        raise ModelMismatchError(
            f"{name}: the {seen.images} images of this forward are {program.batch} sequence(s) in {call.path}, so "
            "several grids share a sequence; run one image per forward"
        )
    return grid, prefix


def saves_nothing(rule: Rule, grid: Grid) -> str | None:
    """Sentence for a rule that leaves keys out but no whole tile of them; None if it saves time or reads everything."""
    from ..kernels.layout import layout_for

    length = rule.required_len()
    if length is None or length > NOTED:
        return None
    elements, blocks = layout_for(rule, length, length, block_q=TILE, block_k=TILE).density()
    if elements == 1 or blocks < 1:
        return None
    way_out = "use larger images" if length <= TILE else "let blocks of queries share keys (swin_window)"
    return (
        f"this window on the grid {grid} saves 0 %: it reads {elements:.0%} of the keys, but every {TILE}-token tile "
        f"is touched, and a kernel skips whole tiles only; to save time, {way_out}"
    )


def better_stride(patch: GridPatch, grid: Grid, prefix: int = 0) -> tuple[int, float] | None:
    """(stride, share of tiles read) of the stride with which `patch` reads the fewest tiles on `grid`; None if it has
    no such option or none saves anything. Queries that share a window touch fewer tiles."""
    from ..kernels.layout import layout_for

    if "stride" not in {f.name for f in dataclasses.fields(patch)}:
        return None
    window = getattr(patch, "window", 1)
    widest = min(window) if isinstance(window, tuple) else window
    best = None
    for stride in range(2, widest + 1):
        try:
            rule = dataclasses.replace(patch, **{"stride": stride}).rule(grid, prefix)
        except ModelMismatchError:
            continue
        length = prefix + math.prod(grid)
        share = layout_for(rule, length, length, block_q=TILE, block_k=TILE).density()[1]
        if share < (1 if best is None else best[1]):
            best = (stride, share)
    return best


class GridPatch(Patch):
    """Base of methods whose rule is tied to the token grid; a subclass has a `grid` option and says `rule`."""

    parts = ("vision",)
    default_part = "vision"
    needs: ClassVar[tuple[Need, ...]] = (TokenGrid(),)
    exclusive = frozenset({"token order"})

    def rule(self, grid: Grid, prefix: int) -> Rule:
        """The index rule on `grid`.

        Raises:
            ModelMismatchError: the options do not fit the grid (the violated bound is named).
        """
        raise NotImplementedError

    def fit(self, grid: Grid) -> None:
        """Check that the options fit `grid`.

        Raises:
            ModelMismatchError: they do not (the violated bound is named).
        """
        self.rule(grid, 0)

    @property
    def given(self) -> Grid | None:
        """The grid that the user named, if any."""
        return getattr(self, "grid", None)

    def require_sizes(self, *options: str, least: int = 1) -> None:
        """Check options that hold one size, or one per axis.

        Raises:
            ConfigError: a size below `least`, or no size at all.
        """
        for option in options:
            value = getattr(self, option)
            value = value if isinstance(value, tuple) else (value,)
            self.require(value != () and all(v >= least for v in value), option, f">= {least}")

    def require_grid(self) -> None:
        """Check the `grid` option, if it is set; call it last in `validate`.

        Raises:
            ConfigError: other than 1 to 3 axes. ModelMismatchError: the other options do not fit the grid.
        """
        if self.given is not None:
            fits = 1 <= len(self.given) <= 3 and all(g >= 1 for g in self.given)
            self.require(fits, "grid", "1 to 3 sizes >= 1")
            self.require(math.prod(self.given) <= LARGEST, "grid", f"at most {LARGEST:,} tokens")
            self.fit(self.given)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        grid = self.given or configured_grid(model)
        if grid is None:
            return []
        try:
            note = saves_nothing(self.rule(grid, 0), grid)
        except ModelMismatchError as error:  # other images may have another grid
            return [f"images of the configured size will be refused: {error}"]
        if note is not None and (found := better_stride(self, grid)) is not None:
            note += f", or use stride={found[0]}: {found[1]:.0%} of the tiles"
        return [] if note is None else [note]

    def edit(self, program: Program, call: Call) -> None:
        grid, prefix = call_grid(self.name, self.given, program, call)
        program.restrict(self.rule(grid, prefix), call.heads)


class ChosenOnGrid(GridPatch):
    """Base of methods that choose for every call which cells of the grid are read: a subclass has `fit`, `choose`."""

    def fit(self, grid: Grid) -> None:
        raise NotImplementedError

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        """What the patches of this call read."""
        raise NotImplementedError

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        grid = self.given or configured_grid(model)
        try:
            if grid is not None:
                self.fit(grid)
        except ModelMismatchError as error:  # other images may have another grid
            return [f"images of the configured size will be refused: {error}"]
        return []

    def edit(self, program: Program, call: Call) -> None:
        grid, prefix = call_grid(self.name, self.given, program, call)
        self.fit(grid)
        if program.mask.restricts:
            raise ModelMismatchError(
                f"{self.name}: some patches of this call are padding or hidden by a mask, and what is read is chosen "
                "by pooled keys, which would hold them. Give images that fill the grid (no padded pixels), or take a "
                "method with a fixed pattern (neighborhood, swin_window)"
            )
        rule = self.choose(program, call, grid, prefix)
        program.share = rule.share()
        program.restrict(rule, call.heads)
