"""`clear`: attention to a disc around every token, and optionally to a coarse copy of the whole image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...call.rules import Appended, Disc
from ...errors import ModelMismatchError
from ...model.grids import Grid, configured_grid
from ...registry import option, register_patch
from ..on_grid import GridPatch, call_grid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


def cells(x: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    """Weighted sums over cells of f x f tokens: [B, H, Gh * Gw, D], weight [f, f] -> [B, H, Gh * Gw / f^2, D]."""
    f, (height, width) = weight.shape[0], grid
    tiled = x.unflatten(2, (height // f, f, width // f, f))
    return torch.einsum("bhyixjd,ij->bhyxd", tiled, weight.to(x.dtype)).flatten(2, 3)


@register_patch("clear")
@dataclass
class Clear(GridPatch):
    """Attention to the tokens in a disc around each token, and optionally to a coarse copy of the image (CLEAR).

    Source: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up, arXiv 2412.16112
    (Huage001/CLEAR `attention_processor.py`, READ and RAN).

    Formula: a patch at (y, x) reads the patches with ``dy^2 + dx^2 < radius^2`` (strictly: radius 1 is the token alone)
    and all prefix tokens; prefix tokens read everything. Discs are cut at the borders. Interior keys per query: 45 at
    radius 4, 193 at 8, 793 at 16. On 3-D grids the distance counts time like space (a ball). With ``downsample`` f,
    patches also read one key per cell of f x f patches, ``sum_ij w_ij k_ij`` with the value ``sum_ij w_ij v_ij``, after
    rotary embeddings; w [f, f] starts at 1 / f^2, is shared by the heads of a layer, and can be trained.

    Neutral value: a radius above the diagonal of the grid, without downsample.

    Differs from the original: the prefix tokens of a ViT (CLS, registers) take the role of the text tokens; a rule for
    a loaded model, without the paper's distillation of the projections (10k iterations); its proportional scale for
    larger images is `entropy_scale`. Attention maps count what a coarse key gets for the tokens in it.
    """

    paper = "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"
    arxiv = "2412.16112"
    trainable = True

    radius: float = option(8.0, help="keys at a distance below this, in tokens")
    downsample: int | None = option(
        None, help="also read one key per cell of this many tokens per side; None = none"
    )
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    @property
    def exclusive(self) -> frozenset[str]:  # type: ignore[override]
        """Cells are made of the keys there are, so what replaces queries and keys must not come later."""
        more = {"query and key source"} if self.downsample else set()
        return GridPatch.exclusive | more

    def validate(self) -> None:
        self.require(0 < self.radius < float("inf"), "radius", "a finite number > 0")
        self.require(self.downsample is None or self.downsample >= 2, "downsample", ">= 2 or None")
        self.require_grid()

    def tensors(self, site: Site) -> dict[str, Tensor]:
        f = self.downsample
        return {} if f is None else {"weight": nn.Parameter(torch.full((f, f), 1 / f**2))}

    def rule(self, grid: Grid, prefix: int) -> Disc | Appended:
        disc, f = Disc(tuple(grid), self.radius, prefix), self.downsample
        if f is None:
            return disc
        if len(grid) != 2 or any(size % f for size in grid):
            raise ModelMismatchError(
                f"clear: downsample {f} needs a 2-D grid whose sides it divides, this one is {grid}; choose another "
                "cell size, or downsample=None"
            )
        return Appended(disc.required_len(), prefix, disc)

    def edit(self, program: Program, call: Call) -> None:
        grid, prefix = call_grid(self.name, self.given, program, call)
        rule = self.rule(grid, prefix)
        if isinstance(rule, Disc):
            program.restrict(rule, call.heads)
            return
        if call.heads is not None:
            rule = replace(rule, on=tuple(call.heads), heads=program.num_heads)
        weight, key, value = call.tensors.weight, program.key, program.value
        assert isinstance(weight, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        mixture = None
        if program.need_weights:  # the cells as sums of tokens
            tokens = torch.eye(program.q_len, dtype=key.dtype, device=key.device)[None, None]
            mixture = cells(tokens[:, :, prefix:], grid, weight)
        coarse_key, coarse_value = (cells(x[:, :, prefix:], grid, weight) for x in (key, value))
        program.append(coarse_key, coarse_value, mixture)
        program.restrict(rule)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        grid = configured_grid(model)
        return None if grid is None else {"radius": float(sum(grid))}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        return [] if grid is None else [{"radius": 1.5}, {"radius": 1.0, "downsample": 2}]
