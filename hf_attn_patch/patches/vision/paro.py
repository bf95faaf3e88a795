"""`paro`: every head orders the token grid along its own axes and reads a fixed set of blocks."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...call.program import head_selector
from ...call.rules import ChosenCells
from ...errors import ConfigError, ModelMismatchError
from ...model.grids import Grid, configured_grid
from ...options import option, option_file, short
from ...registry import register_patch
from ..on_grid import LARGEST, ChosenOnGrid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

QUERIES = 32  # rows that share a scale
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


def rounded(x: Tensor, places: Tensor, block: int) -> Tensor:
    """`x` as INT8 values times a scale per block of tokens, ``s = max |x| / 127``, rounded to nearest, ties to even.

    Args:
        x: [B, H, N, D]. places: int64 [H, N], place of each token; `block` places share a scale.

    Returns:
        Like x, each value within s / 2 of it; the gradient passes as if nothing had been rounded.
    """
    index = places.argsort(-1)[None, :, :, None].expand(len(x), -1, -1, x.shape[3])
    ordered = x.detach().gather(2, index)
    short = -ordered.shape[2] % block
    cut = torch.nn.functional.pad(ordered, (0, 0, 0, short)).unflatten(2, (-1, block))
    scale = cut.abs().amax((3, 4), keepdim=True) / 127
    whole = torch.where(scale > 0, (cut / scale.clamp(min=torch.finfo(x.dtype).tiny)).round(), 0) * scale
    found = torch.empty_like(ordered).scatter_(2, index, whole.flatten(2, 3)[:, :, : ordered.shape[2]])
    return x + (found - x).detach()


def _load(path: str) -> Any:
    missing = "is no file; write one with `hf-attn-patch calibrate paro`"
    try:
        return json.loads(option_file("paro", "plan", path, missing=missing))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"paro: plan file {path} is not valid JSON: {error}") from error


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

    int8: the scores are those of INT8 queries (a scale per 32 rows) and keys (per block of the plan, their mean over
    the tokens taken off first, which softmax does not see), in each head's order, accumulated exactly. The values stand
    in the tensors of the call, so every executor gives the same result; none saves time by it yet.

    Neutral value: a plan whose blocks are all read.

    Differs from the original: how orders and blocks are found (see `calibration/paro.py`; theirs is UNVERIFIED); prefix
    tokens where it has text; one mask, not one per denoising step; no INT4 scores, no INT8 weights and values, and no
    scaling of values by 1/8 against fp16 overflow; any grid, and a last block that is smaller. That the mean key is
    taken off is SageAttention's way (its kernels are a fork of it); whether PARO does is UNVERIFIED.
    """

    paper = (
        "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation "
        "Models"
    )
    arxiv = "2506.16054"
    exclusive = frozenset({"token order"})

    plan: dict | str | None = option(None, help="plan of `calibrate paro`: a file, or its data", path=True)
    int8: bool = option(
        False, help="scores from INT8 queries and keys (accuracy only: no executor is faster by it)"
    )
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )
    _layers: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def validate(self) -> None:
        self.require(self.plan is not None, "plan", "a plan; find one with `hf-attn-patch calibrate paro`")
        if isinstance(self.plan, str):
            self.plan = _load(self.plan)
        if not isinstance(self.plan, dict):
            raise ConfigError("paro: this is no plan of `calibrate paro`: it is no object")
        try:
            self.size, self.block = tuple(int(n) for n in self.plan["grid"]), int(self.plan["block"])
            if min(self.size) < 1 or self.block < 1 or math.prod(self.size) > LARGEST:
                raise ValueError(f"its grid is {short(self.size)}, in blocks of {self.block}")
            count = -(-math.prod(self.size) // self.block)
            for layer, heads in self.plan["layers"].items():
                places = torch.stack([slots(self.size, order) for order in heads["orders"]])
                blocks = torch.stack([unpacked(text, count) for text in heads["blocks"]])
                if len(places) != len(blocks):
                    raise ValueError(f"layer {layer} has {len(places)} orders and {len(blocks)} masks")
                self._layers[int(layer)] = (places, blocks)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"paro: this is no plan of `calibrate paro`: {type(error).__name__}: {short(str(error), 200)}"
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
        if self.int8 and heads is not None and site.num_heads != site.num_kv_heads:
            raise ModelMismatchError(
                f"paro: {site.path} has {site.num_kv_heads} KV heads for {site.num_heads} heads; with int8 a key is "
                "rounded in the order of its head, so every head needs keys of its own. Leave int8 out"
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
            if self.int8:
                self.round(program, call)

    def round(self, program: Program, call: Call) -> None:
        """Put INT8 values times their scales into the queries and keys of the call."""
        key = program.key
        assert isinstance(key, Tensor)
        places = self._layers[call.layer][0].to(key.device)
        prefix = key.shape[2] - places.shape[1]
        chosen = head_selector(call.heads, program.num_heads, key.device)

        def values(x: Tensor, block: int) -> Tensor:
            first = torch.arange(prefix, device=x.device).expand(x.shape[1], -1)
            found = [rounded(x[:, :, :prefix], first, block)] if prefix else []
            whole = torch.cat([*found, rounded(x[:, :, prefix:], places, block)], 2)
            return whole if chosen is None else torch.where(chosen, whole, x)

        program.query = values(program.query, QUERIES)
        program.key = values(key - key.mean(2, keepdim=True), self.block)

    def choose(self, program: Program, call: Call, grid: Grid, prefix: int) -> ChosenCells:
        places, blocks = (x.to(program.query.device) for x in self._layers[call.layer])
        cells = places // self.block
        return ChosenCells(blocks[None], cells, cells, prefix)

    @classmethod
    def _plan(cls, model: Any, share: float) -> dict[str, Any] | None:
        """A plan with random blocks for the sites of `model`."""
        from ...model.sites import base_model, find_sites

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
