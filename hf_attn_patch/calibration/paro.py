"""`paro` calibration: per head of a ViT, the order of the grid's axes and the blocks that hold most attention."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..api import patched
from ..call.program import Program
from ..forward.needs import TokenGrid
from ..kernels import reference
from ..model.grids import Grid
from ..model.sites import base_model
from ..patches.on_grid import call_grid
from ..patches.vision.paro import orders, packed, slots
from ..registry import Patch
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work


@dataclass
class LookAtGrid(Patch):
    """Show every attention call on a token grid to `look` (layer, program, grid, prefix); changes nothing."""

    name = "look_at_grid"
    parts = ("vision",)
    default_part = "vision"
    needs = (TokenGrid(),)

    look: Any = field(default=None)

    def edit(self, program: Program, call: Any) -> None:
        grid, prefix = call_grid(self.name, None, program, call)
        program.observe(lambda program, output: self.look(call.layer, program, grid, prefix))


def block_masses(probs: Tensor, place: Tensor, block: int) -> Tensor:
    """Attention mass of blocks, summed over the batch: probs [B, H, N, N], place of each token int64 [N] -> float64
    [H, blocks, blocks] (queries, keys)."""
    cell = (place // block).to(probs.device)
    member = torch.nn.functional.one_hot(cell).to(torch.float64)
    return torch.einsum("bhqk,qm,kn->hmn", probs.double(), member, member)


def heaviest(masses: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """The round(density * blocks^2) heaviest blocks of each head, and the share of the mass they hold.

    The heaviest block of every row is always one of them, so no query reads nothing.

    Args:
        masses: [H, blocks, blocks].

    Returns:
        (bool [H, blocks, blocks], float64 [H]).
    """
    size = masses.shape[2]
    count = max(size, round(density * size**2))
    ranked = masses.scatter(2, masses.argmax(2, keepdim=True), math.inf).flatten(1)
    best = ranked.topk(count, 1).indices
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, best, True).reshape(masses.shape)
    return kept, (masses * kept).sum((1, 2)) / masses.sum((1, 2)).clamp(min=1e-30)


@dataclass
class ParoCalibrator(Calibrator):
    """Order of the grid's axes and blocks to read, per head, for the `paro` patch.

    Ours: PAROAttention (arXiv 2506.16054) does not release how it finds its plans. For every order of the axes the
    attention of each head is summed over blocks of `block` x `block` patches, mean over images; the `density` of blocks
    with the largest mass is kept. The order whose blocks hold the most mass wins (equal ones: the first, row-major).

    Data: images, as a list (PIL, for the model's processor) or as pixel values [n, C, height, width]. Without data,
    `images` says where they are.

    Options:
        density: share of the blocks that are read. block: patches per side of a block. images: ``digits``
        (scikit-learn's, 8 x 8) or a folder. count: images. size: side in pixels, None = as the processor does.
    """

    name = "paro"
    summary = "per head of a ViT the order of the grid's axes and the blocks that hold most of its attention"
    patch = "paro"
    takes = "processor"
    task = "agreement"

    density: float = 0.3
    block: int = 64
    images: str = "digits"
    count: int = 16
    size: int | None = None
    seed: int = 0

    def validate(self) -> None:
        self.require(0 < self.density <= 1, "density", "in (0, 1]")
        self.require(self.block >= 1, "block", "at least 1")
        self.require(self.count >= 1, "count", "at least 1")

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        pixels = self._pixels(model, tokenizer, data)
        if isinstance(data, Tensor):
            work = Work(None)  # its identity is not told by its text
        total: dict[str, Tensor] = {}
        grid: Grid | None = None
        for number, image in enumerate(pixels.split(1)):
            progress("images", number, len(pixels))
            found = work.tensors(f"masses-{number}", functools.partial(self._measure, model, image))
            grid = tuple(found.pop("grid").tolist())
            for name, masses in found.items():
                total[name] = total.get(name, torch.zeros_like(masses)) + masses
        progress("images", len(pixels), len(pixels))
        if grid is None or not total:
            raise CalibrationError(
                f"paro: no attention layer of {type(model).__name__} works on the grid of its image"
            )
        return self._plan(grid, total, len(pixels))

    def _plan(self, grid: Grid, total: dict[str, Tensor], images: int) -> Calibration:
        names = orders(len(grid))
        layers: dict[str, Any] = {}
        recalls, plain, wins = [], [], dict.fromkeys(names, 0)
        for layer in sorted({int(name.split("-")[0]) for name in total}):
            kept, recall = zip(*(heaviest(total[f"{layer}-{name}"], self.density) for name in names))
            best = torch.stack(recall).round(decimals=6).argmax(0)  # the first of equal ones
            chosen = [names[n] for n in best.tolist()]
            layers[str(layer)] = {
                "orders": chosen,
                "blocks": [packed(kept[n][head]) for head, n in enumerate(best.tolist())],
            }
            recalls += [float(recall[n][head]) for head, n in enumerate(best.tolist())]
            plain += recall[0].tolist()
            for name in chosen:
                wins[name] += 1
        plan = {"grid": list(grid), "block": self.block, "layers": layers}
        blocks = -(-math.prod(grid) // self.block)
        report = {
            "images": images,
            "blocks_per_side": blocks,
            "density": round(max(blocks, round(self.density * blocks**2)) / blocks**2, 4),
            "mass_held": round(sum(recalls) / len(recalls), 4),
            "mass_held_row_major": round(sum(plain) / len(plain), 4),
            "heads_per_order": wins,
        }
        return Calibration(self.name, self.patch, plan, {"plan": plan}, report)

    def _pixels(self, model: Any, processor: Any, data: Any) -> Tensor:
        from ..eval import images as sources

        inner = base_model(model)
        if isinstance(data, Tensor):
            if data.ndim not in (4, 5):
                raise CalibrationError(
                    f"paro: pixel values {list(data.shape)}, expected [n, C, height, width] or video"
                )
            return data[: self.count].to(device=inner.device, dtype=inner.dtype)
        try:
            if data is not None:
                given: Any = list(data)[: self.count]
            elif self.images == "digits":
                given = sources.digits(self.count, self.seed)[0]
            else:
                given = sources.folder(self.images, self.count)
            if processor is None:
                raise ValueError(
                    "images need the processor of the model (tokenizer=); or pass pixel values as data"
                )
            return sources.pixel_values(inner, processor, given, self.size)
        except ValueError as error:
            raise CalibrationError(f"paro: {error}") from error

    def _measure(self, model: Any, image: Tensor) -> dict[str, Tensor]:
        """Masses ``{"<layer>-<order>": [H, blocks, blocks]}`` of one image, and its grid."""
        found: dict[str, Tensor] = {}

        def look(layer: int, program: Program, grid: Grid, prefix: int) -> None:
            probs = reference.dense_probabilities(program)
            found["grid"] = torch.tensor(grid)
            for name in orders(len(grid)):
                masses = block_masses(probs[:, :, prefix:, prefix:], slots(grid, name), self.block)
                found[f"{layer}-{name}"] = masses.cpu()

        inner = base_model(model)
        takes = inspect.signature(type(inner).forward).parameters
        more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        with patched(model, LookAtGrid(look=look)), torch.no_grad():
            inner(pixel_values=image, **more)
        return found
