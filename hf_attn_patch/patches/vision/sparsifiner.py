"""`sparsifiner`: a small low-rank predictor says which keys a patch reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...call.rules import ChosenCells
from ...call.token_permute import Tiles
from ...errors import ModelMismatchError
from ...forward.needs import AuxiliaryLosses, TokenGrid
from ...kernels import reference
from ...model.grids import Grid, config_grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import ChosenOnGrid, call_grid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def coefficients(query: Tensor, key: Tensor, held: dict[str, Tensor], down: Tensor, scale: float) -> Tensor:
    """How much each of n mixed keys counts for a query, softmax over n: [B, H, L, n].

    Args:
        query, key: [B, H, L|N, D]. held: query_weight, key_weight [D', D] and their biases. down: [N, n].
    """
    q, k = (F.linear(x, held[f"{n}_weight"], held[f"{n}_bias"]) for n, x in (("query", query), ("key", key)))
    return (q @ (k.mT @ down) * scale).softmax(-1)


def kept_coefficients(coefs: Tensor, count: int, threshold: float) -> Tensor:
    """`coefs` [..., n] with all but the `count` largest (0: with those not above `threshold`) set to 0."""
    if not count:
        return coefs * (coefs > threshold)
    values, index = coefs.topk(min(count, coefs.shape[-1]), -1)
    return torch.zeros_like(coefs).scatter(-1, index, values)


def basis(up: Tensor, threshold: float) -> Tensor:
    """Sparse basis [n, N] of a table [N, n]: its absolute values, those up to `threshold` set to 0."""
    size = up.abs().mT
    return size * (size > threshold)


def most_likely(scores: Tensor, keep: float, threshold: float | None) -> Tensor:
    """Keys that a row reads, bool like `scores` [..., N]: its best ceil(keep N), or all above `threshold`."""
    if threshold is not None:
        return scores > threshold
    best = scores.topk(math.ceil(keep * scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def resampled(table: Tensor, grid: Grid) -> Tensor:
    """A table [*its grid, n] for the tokens of `grid`, [N, n] (linear interpolation along the grid)."""
    if tuple(table.shape[:-1]) == tuple(grid):
        return table.flatten(0, -2)
    image = table.movedim(-1, 0)[None]
    return F.interpolate(image, size=grid, mode=MODES[len(grid)], align_corners=False)[0].flatten(1).mT


@register_patch("sparsifiner")
@dataclass
class Sparsifiner(ChosenOnGrid):
    """A small low-rank predictor per layer says which patches each patch reads.

    Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, arXiv
    2303.13755 (lim142857/Sparsifiner 9a11e26 `src/models/sparsifiner.py`, `src/losses.py`, READ and RAN).

    Formula: per head, with weights shared by the heads, ``c = softmax(W_q q (W_k k)^T P H^-1/2)`` [N, n] (its best
    `coefs` are kept), basis ``|U|^T`` [n, N] (entries up to `basis_threshold` are 0), scores S = c |U|^T. A patch reads
    the ceil(keep N) patches with the largest S (or all with S > threshold) and all prefix tokens, with the ordinary
    softmax; prefix tokens read everything. W [D / 2, D], P and U [grid, n], n = N / `reduce`.

    Training, as in the paper. Stage 1: freeze the model; as long as the predictor has gradients and the model is in
    training mode, attention is dense, and ``0.01 * mean over layers of sum (c U^T - A)^2`` is added to the loss, A the
    attention of the call. Stage 2: freeze the predictor; the model learns with the mask. In evaluation the mask is on.

    What saves time: nothing with ``block=1``. Every row then reads keys of its own, which is dense attention with
    a mask plus the predictor. With ``block`` b, squares of b x b patches choose squares together, by the mean of S over
    the pair of squares (the product of the mean c and the mean |U|, so no N x N score is made), and whole squares are
    gathered. Measure with ``benchmarks``; 12 heads x 4096 patches: see docs/vision_chosen.md.

    Neutral value: keep=1.

    Differs from the original code: prefix tokens are read by everybody and have no row in P and U, where the CLS key
    has to be chosen; P and U are interpolated for other image sizes; no token pruning; initial values are normal
    (UNVERIFIED there); the rest of the paper's stage-2 loss (distillation of logits and tokens) is the trainer's.
    An untrained predictor chooses at random.
    """

    paper = "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers"
    arxiv = "2303.13755"
    trainable = True
    needs = (TokenGrid(), AuxiliaryLosses())
    exclusive = frozenset({"token order", "query and key source"})
    head_selectable = False

    keep: float = option(0.25, help="share of the patches that a patch reads")
    threshold: float | None = option(None, help="read all patches with a score above this, instead of `keep`")
    block: int | tuple[int, ...] = option(
        1, help="patches per side of the squares that choose together; 1 = none"
    )
    coefs: int = option(8, help="coefficients that are kept per row; 0 = use coef_threshold")
    coef_threshold: float = option(0.0, help="with coefs=0: keep the coefficients above this")
    basis_threshold: float = option(0.02, help="entries of the basis up to this are 0")
    reduce: int = option(6, help="patches per basis vector")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require(0 < self.keep <= 1, "keep", "in (0, 1]")
        self.require(self.coefs >= 0, "coefs", ">= 0")
        self.require(self.reduce >= 1, "reduce", ">= 1")
        self.require(self.basis_threshold >= 0, "basis_threshold", ">= 0")
        self.require_sizes("block")
        self.require_grid()

    def fit(self, grid: Grid) -> None:
        for axis, (block, size) in enumerate(zip(per_axis(self.name, "block", self.block, grid), grid)):
            if block > size:
                raise ModelMismatchError(f"sparsifiner: block {block} exceeds axis {axis} of the grid {grid}")

    def table_grid(self, site: Site) -> Grid:
        """Grid of the tables P and U: that of the configured image size.

        Raises:
            ModelMismatchError: neither config nor `grid` says it.
        """
        grid = self.grid or config_grid(getattr(site.module, "config", None))
        if grid is None:
            raise ModelMismatchError(
                f"sparsifiner: the config of {site.path} names no image size, so the size of its predictor is unknown; "
                "pass grid=(height, width)"
            )
        return grid

    def check(self, site: Site) -> None:
        self.table_grid(site)
        if site.head_dim is None or site.num_heads is None:
            raise ModelMismatchError(
                f"sparsifiner: heads of {site.path} are unknown, its predictor projects them"
            )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        grid, dim = self.table_grid(site), site.head_dim
        assert dim is not None
        generator = torch.Generator().manual_seed(site.layer)
        normal = lambda *shape, std: nn.Parameter(std * torch.randn(*shape, generator=generator))
        rank = max(1, math.prod(grid) // self.reduce)
        found = {f"{n}_weight": normal(max(1, dim // 2), dim, std=dim**-0.5) for n in ("query", "key")}
        found |= {f"{n}_bias": nn.Parameter(torch.zeros(max(1, dim // 2))) for n in ("query", "key")}
        found |= {n: normal(*grid, rank, std=rank**-0.5) for n in ("down", "up")}
        return {**found}

    def predictor(self, program: Program, call: Call, grid: Grid, prefix: int) -> tuple[Tensor, Tensor]:
        """(coefficients [B, H, N, n], table U [N, n]) of the patches of a call, in float32 at least."""
        wide = torch.promote_types(program.query.dtype, torch.float32)
        held = {name: tensor.to(wide) for name, tensor in call.tensors.named_parameters(recurse=False)}
        if held["up"].ndim != len(grid) + 1:
            raise ModelMismatchError(
                f"sparsifiner: the predictor of {call.path} was made for the grid {tuple(held['up'].shape[:-1])}, the "
                f"call is on {grid}, with another number of axes"
            )
        query, key = (x[:, :, prefix:].detach().to(wide) for x in (program.query, program.key))  # type: ignore[index]
        key = key.repeat_interleave(program.num_heads // program.num_kv_heads, 1)
        share = held["down"][..., 0].numel() / math.prod(grid)  # more tokens in the same sum
        down, up = resampled(held["down"], grid) * share, resampled(held["up"], grid)
        return coefficients(query, key, held, down, program.num_heads**-0.5), up

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        with torch.no_grad():
            coefs, up = self.predictor(program, call, grid, prefix)
            coefs, vectors = (
                kept_coefficients(coefs, self.coefs, self.coef_threshold),
                basis(up, self.basis_threshold),
            )
            cell = Tiles(grid, per_axis(self.name, "block", self.block, grid)).cell().to(coefs.device)
            cells = int(cell.max()) + 1
            if cells < len(cell):  # the mean score of two squares is the product of their means
                size = torch.bincount(cell).to(coefs.dtype)
                coefs = (
                    coefs.new_zeros(*coefs.shape[:2], cells, coefs.shape[3]).index_add(2, cell, coefs)
                    / size[:, None]
                )
                vectors = vectors.new_zeros(len(vectors), cells).index_add(1, cell, vectors) / size
            return ChosenCells(most_likely(coefs @ vectors, self.keep, self.threshold), cell, cell, prefix)

    def edit(self, program: Program, call: Call) -> None:
        if not (call.training and any(p.requires_grad for p in call.tensors.parameters(recurse=False))):
            super().edit(program, call)
            return
        grid, prefix = call_grid(self.name, self.given, program, call)
        coefs, up = self.predictor(program, call, grid, prefix)
        teacher = reference.dense_probabilities(program)[:, :, prefix:, prefix:]
        loss = (coefs @ up.mT - teacher.to(coefs.dtype)).square().sum()
        call.add_loss("reconstruction", loss, 0.01)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return None if configured_grid(model) is None else {"keep": 1.0}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None:
            return []
        small = {"coefs": 2, "reduce": 2}
        return [
            {**small, "keep": 0.4},
            {**small, "keep": 0.4, "block": [1] * (len(grid) - 1) + [max(1, grid[-1] // 2)]},
        ]
