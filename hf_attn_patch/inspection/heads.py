"""What each head of a vision transformer looks at: NMI (local, hybrid, global), attention distance, and its map."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..api import active, patched
from ..call.program import Program
from ..errors import ConfigError, PatchError
from ..forward.needs.grid import grid_of
from ..kernels.reference import probabilities
from ..model.sites import base_model
from ..registry import Patch
from .calls import Watch

LOCAL, GLOBAL = 0.15, 0.06  # NMI above: local, below: global. Our bounds: UNIP publishes none
TARGET = 0.09  # NMI of the layer UNIP takes as a teacher (second-hand)
EPS = 1e-8
BLOCK = 128  # query rows whose probabilities exist at a time
Of = Literal["auto", "cls", "received"]


class Spread:
    """NMI and attention distance of heads, fed with blocks of rows; no N x N map has to exist.

    prefix: first keys that are no patches (CLS, registers); they are left out, and rows are divided by what is left.
    distances: float [N, N] between patches (`patch_distances`), or None for the NMI alone.
    """

    def __init__(self, prefix: int = 0, distances: Tensor | None = None, eps: float = EPS):
        self.prefix, self.distances, self.eps = prefix, distances, eps
        self.rows = 0
        self.columns = self.entropy = self.far = torch.zeros(())

    def add(self, probs: Tensor, rows: Tensor) -> None:
        """probs: [B, H, n, prefix + N] of the patches numbered `rows` (int64 [n], without the prefix)."""
        patches = probs[..., self.prefix :].double()
        p = patches + self.eps
        p = p / p.sum(-1, keepdim=True)
        self.rows += len(rows)
        self.columns = self.columns + p.sum(2)
        self.entropy = self.entropy - torch.xlogy(p, p).sum((2, 3))
        if self.distances is not None:
            # without eps: in a row that looks at CLS nearly only, it would weigh as much as the patches
            share = patches / patches.sum(-1, keepdim=True).clamp(min=1e-30)
            self.far = self.far + (share * self.distances[rows].to(p)).sum((2, 3))

    def nmi(self) -> Tensor:
        """[B, H] in 0 … 1: 1 = every patch looks at one patch of its own, 0 = all look at the same.

        Formula: ``(H(p_k) - mean_q H(A_q)) / sqrt(log N * H(p_k))``, ``p_k = mean_q A_qk``; 0 where all
        look at one key.
        """
        p = self.columns / self.rows
        keys = -torch.xlogy(p, p).sum(-1)
        shared = keys - self.entropy / self.rows
        scale = (math.log(max(self.rows, 2)) * keys).sqrt()
        return torch.where(scale > 0, shared / scale.clamp(min=1e-30), 0.0).clamp(0, 1)

    def distance(self) -> Tensor:
        """[B, H], mean distance in patches between a query and what it looks at, weighted by probability."""
        return self.far / self.rows


def nmi(attention: Tensor, prefix: int = 1, eps: float = EPS) -> Tensor:
    """Normalised mutual information of queries and keys of attention maps, [B, H]. The mean over both is a layer's.

    Source: What Do Self-Supervised Vision Transformers Learn?, arXiv 2305.00729 (naver-ai/cl-vs-mim eafe516 notebook,
    READ and RAN); used by UNIP, arXiv 2502.02257, to call layers local, hybrid or global. In float64, where the
    original is in float32. For causal models it is biased: early rows see few keys.

    Args:
        attention: [B, H, prefix + N, prefix + N], rows sum to 1. prefix: tokens before the patches (CLS), left out.
    """
    spread = Spread(prefix, eps=eps)
    rows = torch.arange(attention.shape[2] - prefix, device=attention.device)
    spread.add(attention[:, :, prefix:], rows)
    return spread.nmi()


def attention_distance(attention: Tensor, grid: tuple[int, ...], prefix: int = 1) -> Tensor:
    """Mean attention distance [B, H] in patches, of maps [B, H, prefix + N, prefix + N] on a grid of N patches.

    Source: An Image is Worth 16x16 Words, arXiv 2010.11929, figure 7 (there in pixels: times the patch size). Prefix
    tokens are left out and rows divided by what is left.
    """
    spread = Spread(prefix, patch_distances(grid).to(attention.device))
    rows = torch.arange(attention.shape[2] - prefix, device=attention.device)
    spread.add(attention[:, :, prefix:], rows)
    return spread.distance()


def patch_distances(grid: tuple[int, ...]) -> Tensor:
    """float64 [N, N], Euclidean distance of the patches of a grid, in patches, line by line."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    points = torch.stack([a.flatten() for a in axes], -1)
    return torch.cdist(points, points)


def kind_of(value: float) -> str:
    """``local`` (NMI > 0.15), ``hybrid``, or ``global`` (< 0.06). The bounds are ours."""
    return "local" if value > LOCAL else "global" if value < GLOBAL else "hybrid"


@dataclass
class HeadMaps:
    """Heads of one part for one image.

    layers: numbers of the layers. nmi, distance: float64 [layers, heads], distance in patches. maps: float32 [layers,
    heads, h, w], sum 1: where the CLS token looks (`of` = "cls"), or how much a patch receives from all patches on
    average ("received"). grid: (h, w). prefix: tokens before the patches.
    """

    model: str
    layers: list[int]
    grid: tuple[int, int]
    prefix: int
    of: str
    nmi: np.ndarray
    distance: np.ndarray
    maps: np.ndarray
    patches: list[str] = field(default_factory=list)

    @property
    def target(self) -> int:
        """The layer whose NMI is nearest to 0.09: what UNIP distils from (sees neighbours and foreground)."""
        return self.layers[int(np.abs(self.nmi.mean(1) - TARGET).argmin())]

    def kinds(self) -> list[list[str]]:
        """Per layer and head ``local``, ``hybrid`` or ``global``."""
        return [[kind_of(v) for v in row] for row in self.nmi]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the maps."""
        return {
            "model": self.model, "layers": self.layers, "grid": list(self.grid), "prefix": self.prefix, "of": self.of,
            "nmi": self.nmi.tolist(), "distance": self.distance.tolist(), "kinds": self.kinds(),
            "target_layer": self.target, "patches": self.patches,
        }  # fmt: skip

    def __str__(self) -> str:
        h, w = self.grid
        lines = [
            f"{self.model}: {len(self.layers)} layers x {self.nmi.shape[1]} heads on {h} x {w} patches",
            "layer    NMI  kind    distance  heads local/hybrid/global",
        ]
        for i, layer in enumerate(self.layers):
            kinds = self.kinds()[i]
            counts = "/".join(str(kinds.count(k)) for k in ("local", "hybrid", "global"))
            mean = float(self.nmi[i].mean())
            lines.append(
                f"{layer:5d}  {mean:.3f}  {kind_of(mean):6s}  {self.distance[i].mean():8.2f}  {counts}"
            )
        lines.append(f"nearest to NMI {TARGET}: layer {self.target}")
        return "\n".join(lines)

    __repr__ = __str__


def head_maps(
    model: Any,
    pixel_values: Tensor,
    *,
    of: Of = "auto",
    part: str = "vision",
    layers: Any = None,
    block: int = BLOCK,
) -> HeadMaps:
    """Look at every head of a vision model while it reads one image; patches on the model are part of what is seen.

    Args:
        pixel_values: [1, C, H, W]. of: ``cls`` where the CLS token looks, ``received`` how much a patch gets from all
            patches on average; ``auto`` = cls where there are prefix tokens. part, layers: as for `hap.patch`.
        block: query rows whose probabilities exist at a time.

    Raises:
        ConfigError: unknown `of`. PatchError: several images, no grid, layers that attend in windows or merge patches,
            or ``of="cls"`` without a prefix token.
    """
    if of not in ("auto", "cls", "received"):
        raise ConfigError(f"head_maps: of={of!r} is unknown; choose auto, cls or received")
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise PatchError(f"head_maps: one image [1, C, H, W] is looked at, got {list(pixel_values.shape)}")
    grid = grid_of(pixel_values, model.config)
    if grid is None or len(grid) != 2:
        raise PatchError(f"head_maps: the patch grid of {type(model).__name__} is unknown (patch_size)")
    distances = patch_distances(grid)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    seen_prefix: list[int] = []

    def look(program: Program, call: Any) -> None:
        prefix = program.q_len - math.prod(grid)
        if program.batch != 1 or prefix < 0 or program.mask.kv_len < program.q_len:
            raise PatchError(
                f"head_maps: {call.path} attends {program.batch} x {program.q_len} tokens, which is not the grid "
                f"{grid} of one image (windows or merged patches); choose other layers="
            )
        if of == "cls" and prefix == 0:
            raise PatchError(f"head_maps: {call.path} has no token before its patches; take of='received'")
        seen_prefix.append(prefix)
        spread = Spread(prefix, distances)
        for rows in torch.arange(prefix, program.q_len, device=program.query.device).split(block):
            spread.add(program.of_tokens(probabilities(program, rows)).cpu(), rows.cpu() - prefix)
        if of == "received" or prefix == 0:
            picture = spread.columns[0] / spread.rows
        else:
            first = torch.zeros(1, dtype=torch.long, device=program.query.device)
            row = program.of_tokens(probabilities(program, first))[0, :, 0, prefix:].double().cpu()
            picture = row / row.sum(-1, keepdim=True).clamp(min=1e-30)
        found[call.layer] = (spread.nmi()[0], spread.distance()[0], picture.unflatten(-1, grid))

    with patched(model, Watch(look=look), part=part, layers=layers) as handle, torch.no_grad():
        _tower(model, handle)(pixel_values=pixel_values)
    numbers = sorted(found)
    values = [torch.stack([found[n][i] for n in numbers]).numpy() for i in range(3)]
    return HeadMaps(
        type(model).__name__, numbers, (grid[0], grid[1]), seen_prefix[0],
        "received" if of == "received" or seen_prefix[0] == 0 else "cls",
        values[0], values[1], values[2].astype(np.float32), [_said(h.config) for h in active(model)],
    )  # fmt: skip


def _said(config: Patch) -> str:
    """A patch by name, with the options that are not at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    options = ", ".join(f"{k}={v}" for k, v in config.to_dict().items() if v != defaults.get(k))
    return f"{config.name}({options})" if options else config.name


def _tower(model: Any, handle: Any) -> Any:
    """The innermost transformers model around all watched sites that takes pixel values: a VLM's vision tower."""
    from transformers import PreTrainedModel

    base = base_model(model)
    names = handle.sites[0].path.split(".")
    best = base
    for end in range(len(names)):
        module = base.get_submodule(".".join(names[:end]))
        takes = isinstance(module, PreTrainedModel) and (
            "pixel_values" in inspect.signature(type(module).forward).parameters
        )
        inside = all(s.path.startswith(".".join(names[:end])) for s in handle.sites)
        if takes and inside:
            best = module
    return best
