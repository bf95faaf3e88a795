"""Window attention of hierarchical ViTs on a plain one: `swin_window`, `davit_spatial`, `maxvit_block`, `maxvit_grid`,
`halo`. All are one index rule on the token grid; what differs is who shares a window, and what happens at borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...call.rules import BlockWindows, Neighborhood
from ...errors import ModelMismatchError
from ...model.grids import Grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import GridPatch

GRID_HELP = "token grid, e.g. [16, 16]; default: from the pixel values"


def within(name: str, option_name: str, sizes: Grid, grid: Grid) -> Grid:
    """`sizes`, none larger than its axis.

    Raises:
        ModelMismatchError: one is.
    """
    for axis, (size, length) in enumerate(zip(sizes, grid)):
        if size > length:
            raise ModelMismatchError(
                f"{name}: {option_name} {size} exceeds axis {axis} of the grid {grid}; at most {length} fits"
            )
    return sizes


def dividing(name: str, option_name: str, sizes: Grid, grid: Grid) -> Grid:
    """`sizes`, each a divisor of its axis.

    Raises:
        ModelMismatchError: one is not; the sizes that are get listed.
    """
    for axis, (size, length) in enumerate(zip(within(name, option_name, sizes, grid), grid)):
        if length % size:
            fits = [d for d in range(1, length + 1) if length % d == 0]
            raise ModelMismatchError(
                f"{name}: {option_name} {size} does not divide axis {axis} of the grid {grid}; "
                f"{', '.join(map(str, fits))} do (swin_window takes any size)"
            )
    return sizes


def partition(grid: Grid, window: Grid, start: Grid, prefix: int) -> BlockWindows:
    """Windows side by side, the first one beginning at `start` (what is before is a smaller window)."""
    return BlockWindows.of(grid, window, (0,) * len(grid), start, prefix)


@register_patch("swin_window")
@dataclass
class SwinWindow(GridPatch):
    """Attention inside windows of the token grid, shifted by half a window in every other layer (Swin).

    Source: Swin Transformer, arXiv 2103.14030 (the shift mask of transformers 5.23 `modeling_swin.py`, READ and RAN:
    equal on divisible grids).

    Formula: per axis a token at i is in window ``floor((i - shift) / window)``; a patch reads the patches of its window
    and all prefix tokens, prefix tokens read everything. Shifted layers as in Swin:
    ``layers={"0::2": {}, "1::2": {"shift": 3}}`` (shift = window // 2).

    Neutral value: window = grid.

    Differs from the original: no relative position bias (the pretrained ViT has its own position code); a grid that
    the window does not divide gets smaller windows at its lower and right border, where Swin pads with zero tokens that
    are attended; a window larger than the grid is refused, where Swin shrinks it; prefix tokens take part in the same
    softmax. As in Swin, nothing is shifted when one window spans an axis.
    """

    paper = "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
    arxiv = "2103.14030"

    window: int | tuple[int, ...] = option(
        7, help="tokens per side of a window (one number, or one per axis)"
    )
    shift: int | tuple[int, ...] = option(0, help="where windows begin; Swin: window // 2 in odd layers")
    grid: tuple[int, ...] | None = option(None, help=GRID_HELP)

    def validate(self) -> None:
        self.require_sizes("window")
        self.require_sizes("shift", least=0)
        as_tuple = lambda v: v if isinstance(v, tuple) else (v,)
        windows, shifts = as_tuple(self.window), as_tuple(self.shift)
        axes = max(len(windows), len(shifts))
        if len(windows) in (1, axes) and len(shifts) in (1, axes):
            pairs = zip(windows * (axes // len(windows)), shifts * (axes // len(shifts)))
            self.require(all(s < w for w, s in pairs), "shift", f"below window={self.window}")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> BlockWindows:
        window = within(self.name, "window", per_axis(self.name, "window", self.window, grid), grid)
        shift = per_axis(self.name, "shift", self.shift, grid)
        if any(w >= length for w, length in zip(window, grid)):
            shift = (0,) * len(grid)
        return partition(grid, window, shift, prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None:
            return []
        small = [max(1, g - 1) for g in grid]  # does not divide: cut windows
        return [{"window": small}, {"window": small, "shift": [w // 2 for w in small]}]


@register_patch("davit_spatial")
@dataclass
class DaViTSpatial(GridPatch):
    """Attention inside windows of the token grid: the spatial half of DaViT (its channel half needs training).

    Source: DaViT, arXiv 2204.03645 (dingmyu/davit `timm/models/davit.py`, READ and RAN).

    Formula: per axis a token at i is in window ``floor(i / window)``; a patch reads the patches of its window and all
    prefix tokens, prefix tokens read everything.

    Neutral value: window = grid.

    Differs from the original: a grid that the window does not divide gets smaller windows at its lower and right
    border, where DaViT pads with zero tokens after the norm (keys and values that are pure bias, attended); no
    convolutional position code; prefix tokens take part in the same softmax. Channel attention is another operator with
    its own weights and cannot be put into a pretrained ViT.
    """

    paper = "DaViT: Dual Attention Vision Transformers"
    arxiv = "2204.03645"

    window: int | tuple[int, ...] = option(
        7, help="tokens per side of a window (one number, or one per axis)"
    )
    grid: tuple[int, ...] | None = option(None, help=GRID_HELP)

    def validate(self) -> None:
        self.require_sizes("window")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> BlockWindows:
        window = within(self.name, "window", per_axis(self.name, "window", self.window, grid), grid)
        return partition(grid, window, (0,) * len(grid), prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        return [] if grid is None else [{"window": [max(1, g - 1) for g in grid]}]


@register_patch("maxvit_block")
@dataclass
class MaxViTBlock(GridPatch):
    """Block attention of MaxViT: the tokens of a P x P window attend to each other.

    Source: MaxViT, arXiv 2204.01697 (google-research/maxvit `maxvit/models/maxvit.py`, READ and RAN).

    Formula: per axis tokens with equal ``i // window`` see each other, all tokens see the prefix tokens, and those
    everything. The paper alternates with `maxvit_grid`: patch ``maxvit_block`` with ``layers="0::2"`` and
    ``maxvit_grid`` with ``layers="1::2"``; two layers then connect every pair of tokens.

    Neutral value: window = grid.

    Differs from the original: no relative position bias, no MBConv in front; prefix tokens take part in the same
    softmax. As there, a window that does not divide the grid is an error.
    """

    paper = "MaxViT: Multi-Axis Vision Transformer"
    arxiv = "2204.01697"

    window: int | tuple[int, ...] = option(
        7, help="tokens per side of a window (one number, or one per axis)"
    )
    grid: tuple[int, ...] | None = option(None, help=GRID_HELP)

    def validate(self) -> None:
        self.require_sizes("window")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> BlockWindows:
        window = dividing(self.name, "window", per_axis(self.name, "window", self.window, grid), grid)
        return partition(grid, window, (0,) * len(grid), prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"window": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        return [] if grid is None else [{"window": [divisor(g) for g in grid]}]


@register_patch("maxvit_grid")
@dataclass
class MaxViTGrid(GridPatch):
    """Grid attention of MaxViT: a G x G lattice of tokens, spread evenly over the image, attend to each other.

    Source: MaxViT, arXiv 2204.01697 (google-research/maxvit `maxvit/models/maxvit.py`, READ and RAN).

    Formula: per axis of length L tokens with equal ``i mod (L / size)`` see each other, all tokens see the prefix
    tokens, and those everything. Equal to `neighborhood` with window = size and dilation = L / size. See
    `maxvit_block` for alternating the two over the layers.

    Neutral value: size = grid.

    Differs from the original: no relative position bias, no MBConv in front; prefix tokens take part in the same
    softmax. As there, a size that does not divide the grid is an error.
    """

    paper = "MaxViT: Multi-Axis Vision Transformer"
    arxiv = "2204.01697"

    size: int | tuple[int, ...] = option(7, help="tokens per side of a lattice (one number, or one per axis)")
    grid: tuple[int, ...] | None = option(None, help=GRID_HELP)

    def validate(self) -> None:
        self.require_sizes("size")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> Neighborhood:
        size = dividing(self.name, "size", per_axis(self.name, "size", self.size, grid), grid)
        apart = tuple(length // s for length, s in zip(grid, size))
        axes = len(grid)
        return Neighborhood(grid, size, (1,) * axes, apart, (False,) * axes, prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"size": list(grid)}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        return [] if grid is None else [{"size": [divisor(g) for g in grid]}]


@register_patch("halo")
@dataclass
class Halo(GridPatch):
    """Blocks of queries read their block and a halo around it (HaloNet).

    Source: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731 (no official code;
    the unofficial `timm/models/layers/halo_attn.py` vendored in dingmyu/davit, READ and RAN).

    Formula: per axis the queries of block n = i // block read keys ``n block - halo .. (n + 1) block - 1 + halo``, as
    far as they exist; all tokens see the prefix tokens, and those everything.

    Neutral value: block = grid.

    Differs from the original: keys outside the image are not there, where the unofficial layer lets its zero padding
    take attention mass; no relative position logits; a grid that the block does not divide gets smaller blocks at
    its lower and right border; prefix tokens take part in the same softmax. `neighborhood` with window = block + 2 halo
    and stride = block is the same away from the borders, where it shifts its window inward instead.
    """

    paper = "Scaling Local Self-Attention for Parameter Efficient Visual Backbones"
    arxiv = "2103.12731"

    block: int | tuple[int, ...] = option(8, help="queries per side of a block (one number, or one per axis)")
    halo: int | tuple[int, ...] = option(3, help="keys beyond the block on each side")
    grid: tuple[int, ...] | None = option(None, help=GRID_HELP)

    def validate(self) -> None:
        self.require_sizes("halo", least=0)
        self.require_sizes("block")
        self.require_grid()

    def rule(self, grid: Grid, prefix: int) -> BlockWindows:
        block = within(self.name, "block", per_axis(self.name, "block", self.block, grid), grid)
        halo = per_axis(self.name, "halo", self.halo, grid)
        return BlockWindows.of(grid, block, halo, (0,) * len(grid), prefix)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"block": list(grid), "halo": 0}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        return (
            []
            if grid is None
            else [{"block": [divisor(g) for g in grid], "halo": 1}, {"block": 1, "halo": 1}]
        )


def divisor(length: int) -> int:
    """The largest proper divisor of `length` (1 for 1 and for primes)."""
    return max((d for d in range(1, length) if length % d == 0), default=1)
