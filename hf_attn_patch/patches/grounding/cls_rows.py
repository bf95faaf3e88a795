"""What the CLS token of a vision tower looks at, one row per head, noted while the tower runs (no method itself)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConfigError, ModelMismatchError, PatchError
from ...kernels.reference import probabilities
from ...model.sites import base_model, find_sites
from .image_keys import layers_of

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

CLS = ("cls_token", "class_embedding", "class_token")  # names of the parameter that is the CLS token
# config fields by which models say that an image token is not one patch
MERGES = {
    "scale_factor": "pixel-shuffled",
    "downsample_ratio": "pixel-shuffled",
    "downsample_factor": "pixel-shuffled",
    "spatial_merge_size": "merged",
    "mm_tokens_per_image": "pooled",
    "projector_pooling_ratio": "pooled",
    "num_query_tokens": "resampled",
    "image_grid_pinpoints": "cut into tiles and parted by newlines",
}


def tower(name: str, model: Any) -> list[Site]:
    """Sites of the vision tower of `model` by layer; refuses towers whose CLS row says nothing about image tokens.

    Raises:
        ModelMismatchError: no vision sites or several towers, no CLS token, or image tokens that are no patches.
    """
    base = base_model(model)
    sites = [s for s in find_sites(base) if "vision" in s.parts and s.part != "cross"]
    stacks = sorted({layers_of(s.path) for s in sites})
    who = type(base).__name__
    if len(stacks) != 1:
        found = f"{len(stacks)} of them ({', '.join(stacks)})" if stacks else "none"
        raise ModelMismatchError(
            f"{name}: one vision tower that uses transformers' attention interface is needed, {who} has {found}"
        )
    for name_of, what in MERGES.items():
        for config in (base.config, getattr(base.config, "vision_config", None)):
            if getattr(config, name_of, None) is not None:
                raise ModelMismatchError(
                    f"{name}: image tokens of {who} are {what} ({name_of}={getattr(config, name_of)}), so none "
                    "of them is one patch of the tower; take pai, which needs no patches"
                )
    names = stacks[0].split(".")
    # the CLS token lives beside the layers: in the tower, some levels above its list of layers
    around = [base.get_submodule(".".join(names[:end])) for end in range(1, len(names))] or [base]
    if not any(
        p.split(".")[-1] in CLS for module in around[1:] or around for p, _ in module.named_parameters()
    ):
        raise ModelMismatchError(
            f"{name}: the vision tower of {who} ({stacks[0]}) has no CLS token ({', '.join(CLS)}), and the streams are "
            "chosen by what that token looks at; take pai, which needs none"
        )
    return sorted(sites, key=lambda s: s.layer)


def chosen(name: str, model: Any, layers: tuple[int, ...]) -> list[Site]:
    """The sites of the vision `layers` (negative: from the end), each once. Raises also ConfigError: no such layer."""
    sites = tower(name, model)
    for layer in layers:
        if not -len(sites) <= layer < len(sites):
            raise ConfigError(
                f"{name}: vision layer {layer} does not exist; the tower has {len(sites)}, 0 to {len(sites) - 1}"
            )
    return [sites[i] for i in sorted({layer % len(sites) for layer in layers})]


@dataclass
class Rows:
    """CLS rows of one forward of the tower. grid: of its patches, None if unknown. sums: vision layer (also as a
    negative number) -> attention of the CLS token summed over heads, [images, tokens of the tower], one tensor
    per call."""

    grid: tuple[int, ...] | None
    sums: dict[int, list[Tensor]] = field(default_factory=dict)


def note(program: Program, call: Call) -> None:
    """Remember the CLS row of this vision call for the rest of the forward, and with what the tower returns."""
    context = call.context
    assert context is not None
    rows = context.handed.setdefault(f"cls rows {call.key}", Rows(context.grid))
    depth = len(context.model.get_submodule(layers_of(call.path)))  # type: ignore[arg-type]

    def look(done: Program, output: Tensor) -> None:
        with torch.no_grad():
            first = torch.zeros(1, dtype=torch.long, device=output.device)
            sums = probabilities(done, first)[:, :, 0].sum(1)
        for number in (call.layer, call.layer - depth):  # layers are asked for from either end
            rows.sums.setdefault(number, []).append(sums)

    program.observe(look)


def noted(call: Call) -> Rows | None:
    """What the tower left for this forward; None where it did not run."""
    assert call.context is not None
    return call.context.handed.get(f"cls rows {call.key}")


def row_of(name: str, rows: Rows, layer: int) -> Tensor:
    """The rows [images, tokens of the tower] of one vision layer.

    Raises:
        PatchError: the layer is not watched, or the tower ran with images of different sizes.
    """
    if layer not in rows.sums:
        raise PatchError(
            f"{name}: vision layer {layer} is not watched; local_layer and summary_layer are the same for all layers "
            "of the text part, so set them outside layers="
        )
    if len({r.shape[1] for r in rows.sums[layer]}) > 1:
        sizes = ", ".join(str(r.shape[1]) for r in rows.sums[layer])
        raise PatchError(
            f"{name}: images of different sizes in one forward ({sizes} tokens); give each its own"
        )
    return torch.cat(rows.sums[layer])


@dataclass(frozen=True)
class Patches:
    """patches: of one image. kept: further tokens of the tower (CLS) that are image tokens too, in front of them.
    copies: rows of the prompt per row that the tower saw (beams)."""

    patches: int
    kept: int
    copies: int


def patches(name: str, rows: Rows, sums: Tensor, image: Tensor) -> Patches:
    """How the tower's tokens are image tokens of the prompt. sums: [images, tokens]. image: bool [B, L].

    Raises:
        PatchError: their numbers do not fit.
    """
    images, tokens = sums.shape
    count = None if rows.grid is None else math.prod(rows.grid)
    found = int(image.sum())
    for each in (count, tokens):
        if not each or not count or tokens <= count or found % (images * each):
            continue
        copies = found // (images * each)
        if copies and image.shape[0] % copies == 0:
            own = image[::copies].repeat_interleave(copies, 0)
            if torch.equal(own, image):
                return Patches(count, each - count, copies)
    raise PatchError(
        f"{name}: {images} images of {count if count is not None else 'an unknown number of'} patches (the tower "
        f"attends with {tokens} tokens), and the prompt has {found} image tokens: each must be one patch of one image"
    )
