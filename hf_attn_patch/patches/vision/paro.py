"""`paro`: every head orders the token grid along its own axes and reads a fixed set of blocks."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, ModelMismatchError
from ...grids import ChosenOnGrid, Grid, configured_grid
from ...registry import option, register_patch
from ...rules_dynamic import ChosenCells

if TYPE_CHECKING:
    from ...dispatch import Call
    from ...program import Program
    from ...sites import Site

AXES = {1: "w", 2: "hw", 3: "fhw"}


def orders(axes: int) -> list[str]:
    """Names of the orders of a grid with that many axes, row-major first: ``hw`` (rows), ``wh`` (columns), ..."""
    return ["".join(p) for p in itertools.permutations(AXES[axes])]


def slots(grid: Grid, order: str) -> Tensor:
    """Place of each row-major token when the grid is read in `order` (last letter fastest), int64 [N]."""
    sequence = torch.arange(math.prod(grid)).reshape(grid).permute([AXES[len(grid)].index(a) for a in order])
    return sequence.flatten().argsort()


def packed(blocks: Tensor) -> str:
    """bool [n, n] as hexadecimal text."""
    return np.packbits(blocks.flatten().cpu().numpy()).tobytes().hex()


def unpacked(text: str, blocks: int) -> Tensor:
    """bool [blocks, blocks] of `packed` text.

    Raises:
        ValueError: it is no hexadecimal text of that many bits.
    """
    found = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(found) != -(-(blocks**2) // 8):
        raise ValueError(f"{8 * len(found)} bits are no mask of {blocks} x {blocks} blocks")
    return torch.from_numpy(np.unpackbits(found)[: blocks**2].astype(bool)).reshape(blocks, blocks)


@register_patch("paro")
@dataclass
class Paro(ChosenOnGrid):
    """Every head orders the grid along the axes that make its attention block-sparse, and reads fixed blocks.

    Source: PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation
    Models, arXiv 2506.16054 (jamescsq47/PAROAtten, READ: kernels and pipelines; its calibration is not released).

    Formula: head h reads the patches in order pi_h (2-D: by rows or by columns; 3-D: six orders of frames, rows,
    columns) cut into blocks of `block` tokens, ``o = softmax(scale q k^T) v`` over the blocks n with ``M_h[m, n]`` for
    a query of block m, and all prefix tokens; prefix tokens read everything. Rotary positions were applied before, so
    the order alone changes nothing.

    plan: ``{"grid": [16, 16], "block": 64, "layers": {"0": {"orders": ["hw", "wh"], "blocks": [hex, hex]}}}``, one
    entry per query head, or a file that ``hf-attn-patch calibrate paro`` wrote (it is read here, and saved with the
    patch). Layers that it does not name stay dense.

    Neutral value: a plan whose blocks are all read.

    Differs from the original: how orders and blocks are found (see `calibration/paro.py`; theirs is UNVERIFIED); prefix
    tokens where it has text; one mask, not one per denoising step; no INT8 or INT4 products and no scaling of values by
    1/8 against fp16 overflow; any grid, and a last block that is smaller.
    """

    paper = (
        "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation "
        "Models"
    )
    arxiv = "2506.16054"
    exclusive = frozenset({"token order"})

    plan: dict | str | None = option(None, help="plan of `calibrate paro`: a file, or its data")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )
    _layers: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def validate(self) -> None:
        self.require(self.plan is not None, "plan", "a plan; find one with `hf-attn-patch calibrate paro`")
        if isinstance(self.plan, str):
            if not Path(self.plan).is_file():
                raise ConfigError(
                    f"paro: plan={self.plan!r} is no file; write one with `hf-attn-patch calibrate paro`"
                )
            self.plan = json.loads(Path(self.plan).read_text())
        assert isinstance(self.plan, dict)
        try:
            self.size, self.block = tuple(int(n) for n in self.plan["grid"]), int(self.plan["block"])
            count = -(-math.prod(self.size) // self.block)
            for layer, heads in self.plan["layers"].items():
                cells = torch.stack([slots(self.size, order) // self.block for order in heads["orders"]])
                blocks = torch.stack([unpacked(text, count) for text in heads["blocks"]])
                if len(cells) != len(blocks):
                    raise ValueError(f"layer {layer} has {len(cells)} orders and {len(blocks)} masks")
                self._layers[int(layer)] = (cells, blocks)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"paro: this is no plan of `calibrate paro`: {type(error).__name__}: {error}"
            ) from error
        self.require_grid()

    def fit(self, grid: Grid) -> None:
        if tuple(grid) != self.size:
            raise ModelMismatchError(
                f"paro: the plan is for the grid {self.size}, this call is on {tuple(grid)}; calibrate at "
                "this image size"
            )

    def check(self, site: Site) -> None:
        heads = self._layers.get(site.layer)
        if heads is not None and len(heads[0]) != site.num_heads:
            raise ModelMismatchError(
                f"paro: the plan has {len(heads[0])} heads in layer {site.layer}, {site.path} has {site.num_heads}"
            )

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        there = {site.layer for site in sites}
        unknown = sorted(set(self._layers) - there)
        if unknown and not there & set(self._layers):
            raise ModelMismatchError(f"paro: the plan names layers {unknown}, the model has {sorted(there)}")
        return super().check_model(model, sites)

    def edit(self, program: Program, call: Call) -> None:
        if call.layer in self._layers:
            super().edit(program, call)

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        cells, blocks = (x.to(program.query.device) for x in self._layers[call.layer])
        return ChosenCells(blocks[None], cells, cells, prefix)

    @classmethod
    def _plan(cls, model: Any, share: float) -> dict[str, Any] | None:
        """A plan with random blocks for the sites of `model`."""
        from ...sites import base_model, find_sites

        grid = configured_grid(model)
        if grid is None:
            return None
        draw, block = torch.Generator().manual_seed(0), max(1, math.prod(grid) // 4)
        count = -(-math.prod(grid) // block)
        layers: dict[str, Any] = {}
        for site in find_sites(base_model(model)):
            if "vision" in site.parts:
                names = orders(len(grid))
                masks = [torch.rand(count, count, generator=draw) < share for _ in range(site.num_heads or 1)]
                kept = [packed(m | torch.eye(count, dtype=torch.bool)) for m in masks]
                layers[str(site.layer)] = {
                    "orders": [names[h % len(names)] for h in range(len(kept))],
                    "blocks": kept,
                }
        return {"grid": list(grid), "block": block, "layers": layers}

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        plan = cls._plan(model, 2.0)
        return None if plan is None else {"plan": plan}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        plan = cls._plan(model, 0.3)
        return [] if plan is None else [{"plan": plan}]
