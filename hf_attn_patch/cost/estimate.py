"""FLOPs, bytes, passes and roofline time of attention, dense and patched, from what a patch's layout really visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .. import api
from ..call.program import Program
from ..call.rules import Rule, intersect
from ..errors import ConfigError, ModelMismatchError, PatchError
from ..install.stack import Call, SitePatch
from ..model.grids import configured_grid
from ..model.sites import Site, base_model, find_sites
from .cascades import CASCADES, passes
from .devices import Gpu
from .pretend import Forward, prefix_tokens, program_of
from .tiles import Tiles, tiles_of


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of torch's fused attention on a CPU, from the shapes of its arguments."""
    return sdpa_flop_count(query, key, value)


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# the flop counter of torch 2.13 knows the fused attention of GPUs only
CPU_ATTENTION: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
TRANSITS = 6  # of the L x S scores through memory in eager attention: two for each of product, softmax, second product


@dataclass(frozen=True)
class Variant:
    """What is estimated: a patch by name with its options (None: dense attention), in `passes` walks over the keys."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cascade: str = "1-pass"

    @property
    def label(self) -> str:
        if self.name is None:
            return f"dense, {self.cascade}"
        return self.name + (
            f"({', '.join(f'{k}={v}' for k, v in self.options.items())})" if self.options else ""
        )


@dataclass
class Cost:
    """Attention of all sites of a part in one forward of one sequence (projections and MLPs aside).

    queries, keys: tokens. pairs: (query, key, head) products computed, in whole tiles. read, dense: pairs read, and
    pairs that dense attention reads. flops: of matrix products (2 per multiply-add); own_flops: of the method itself
    (scores of blocks, routers), counted while it edited. exps: exponentials. bytes: moved at least (every tensor
    once, and scores as often as more than one pass demands). passes: over the keys, the method's own included.
    """

    label: str
    part: str
    dtype: str
    queries: int
    keys: int
    pairs: float = 0.0
    read: float = 0.0
    dense: float = 0.0
    flops: float = 0.0
    own_flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0
    passes: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return (self.flops + self.own_flops) / self.bytes if self.bytes else 0.0

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        """(time at the roofline, what bounds it: matmul, memory or exp). No kernel is as fast as that."""
        bounds = {
            "matmul": (self.flops + self.own_flops) / gpu.flops[self.dtype],
            "memory": self.bytes / gpu.bytes_per_s,
            "exp": self.exps / gpu.exps_per_s if gpu.exps_per_s else 0.0,
        }
        name = max(bounds, key=lambda n: bounds[n])
        return bounds[name], name


def estimate(
    model: Any,
    variants: Sequence[Variant] = (),
    *,
    length: int | None = None,
    image: tuple[int, int] | None = None,
    decode: bool = False,
    dtype: str = "bfloat16",
    part: str | None = None,
) -> list[Cost]:
    """Costs of dense attention (3-pass as eager, 1-pass as FlashAttention) and of `variants`, in this order.

    Nothing runs on the model: each site's call is made up from random q and k, the patch edits it, and the tiles of
    its layout are counted. Methods that choose by content therefore choose on noise; their notes say so.

    Args:
        length: tokens of a text. image: pixels (height, width) of one picture, for vision parts; None = the configured
            size. decode: one token behind `length - 1` cached ones. dtype: of q, k, v. part: as for `hap.patch`.

    Raises:
        ConfigError: no length for a text part, unknown dtype. PatchError: a variant does not fit the model.
    """
    if dtype not in BYTES:
        raise ConfigError(f"cost: dtype={dtype!r} is none of {', '.join(BYTES)}")
    base = base_model(model)
    plans = [api.plan(base, v.name, part=part, **v.options) if v.name else None for v in variants]
    sites = find_sites(base)
    have = {p for s in sites for p in s.parts}
    first = next((p for p in plans if p is not None), None)
    wanted = part or (first.part if first is not None else None) or ("text" if "text" in have else "vision")
    chosen = [s for s in sites if wanted in s.parts and s.part != "cross"]
    if not chosen:
        raise ModelMismatchError(f"cost: {type(base).__name__} has no attention site of part {wanted!r}")
    keys, grid = size_of(base, wanted, length, image)
    out = []
    for variant, plan in [(Variant(cascade="3-pass"), None), (Variant(), None), *zip(variants, plans)]:
        cost = Cost(variant.label, wanted, dtype, 1 if decode else keys, keys)
        _add_sites(cost, base, chosen, variant, plan, grid)
        out.append(cost)
    return out


def size_of(
    model: Any, part: str, length: int | None, image: tuple[int, int] | None
) -> tuple[int, tuple[int, ...] | None]:
    """(tokens, grid or None) of one sequence of `part`.

    Raises:
        ConfigError: a text part without `length`, a vision part whose patch size is unknown, or an image that its
            patches do not divide.
    """
    if part != "vision":
        if length is None:
            raise ConfigError(f"cost: the {part} part needs a length in tokens (--lengths)")
        return length, None
    vision = getattr(model.config, "vision_config", None) or model.config
    patch = getattr(vision, "patch_size", None)
    grid = configured_grid(model)
    if image is not None:
        if not patch:
            raise ConfigError(
                f"cost: the config of {type(model).__name__} names no patch_size, so no grid is known"
            )
        sides = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        if any(pixels % side for pixels, side in zip(image, sides[-2:])):
            raise ConfigError(
                f"cost: an image of {image} pixels is no multiple of the patch size {sides[-2:]}"
            )
        grid = (image[0] // sides[-2], image[1] // sides[-1])
    if grid is None:
        raise ConfigError(
            f"cost: the grid of {type(model).__name__} is unknown; give the image size (--image-size)"
        )
    return prefix_tokens(model) + math.prod(grid), grid


def _add_sites(
    cost: Cost, model: Any, sites: list[Site], variant: Variant, plan: Any, grid: tuple[int, ...] | None
) -> None:
    forward = Forward(model, cost.keys, grid, image_tokens=cost.keys // 2)
    edited = {} if plan is None else {s.path: v for s, v in zip(plan.sites, plan.variants)}
    known: dict[Any, torch.Tensor] = {}
    cost.passes = passes(CASCADES[variant.cascade])
    for site in sites:
        program = program_of(site, cost.queries, cost.keys, known)
        if site.path in edited:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
                edited_call(program, site, edited[site.path], plan, forward)
            cost.own_flops += counter.get_total_flops()  # what the method multiplied while it edited
        _count(cost, program, site, variant)


def edited_call(program: Program, site: Site, kinds: Any, plan: Any, forward: Forward) -> None:
    """Let the patch of `plan` edit a made-up call. Raises PatchError: it needs facts of a real forward."""
    entry: Any = SimpleNamespace(key=plan.config.name, config=plan.config, enabled=True, cache=plan.cache)
    patch = SitePatch(site, entry, kinds)
    for number, (_, config) in enumerate(kinds):
        try:
            config.edit(program, Call(patch, number, forward, site.causal))  # type: ignore[arg-type]
        except (
            PatchError,
            RuntimeError,
        ) as error:  # RuntimeError: it counts on tokens that its own hooks add
            raise PatchError(f"{plan.config.name} cannot be estimated without a forward: {error}") from error


def _count(cost: Cost, program: Program, site: Site, variant: Variant) -> None:
    mask, heads, kv_heads = program.mask, program.num_heads, program.num_kv_heads
    queries, keys = program.q_len, mask.kv_len
    dim = program.query.shape[-1]
    place = (queries, keys, mask.q_offset, mask.causal)
    plain = tiles_of(None, *place, mask.window)
    extra = [b.target for b in program.blends if isinstance(b.target, Rule)]
    pairs = read = 0.0
    touched = 0.0
    for rule in [program.rule, *(intersect([*program.rules, e]) for e in extra)]:
        dynamic = rule is not None and rule.dynamic
        if dynamic:
            cost.passes = max(cost.passes, 2)
            _note(cost, "it chooses by content, here on random queries and keys")
        if dynamic and program.share is not None:
            share = float(program.share)
            tiles = plain
        else:
            share, tiles = 1.0, plain if rule is None else tiles_of(rule, *place, mask.window)
        pairs += share * _computed(tiles, queries)
        read += share * tiles.pairs
        touched = max(touched, tiles.keys)
    rows = 1.0
    if program.head_gate is not None and program.gate_is_sparse:
        rows = float((program.head_gate != 0).float().mean())
    eager = variant.cascade == "3-pass"
    if eager:  # every score is made, whatever the mask
        pairs = queries * keys
    size = BYTES[cost.dtype]
    cost.pairs += rows * heads * pairs
    cost.read += rows * heads * read
    cost.dense += heads * plain.pairs
    cost.flops += rows * heads * pairs * 4 * dim
    cost.exps += rows * heads * pairs
    cost.bytes += size * dim * (2 * heads * queries + 2 * kv_heads * touched)
    cost.bytes += size * TRANSITS * heads * queries * keys if eager else 0


def _computed(tiles: Tiles, queries: int) -> float:
    """Pairs in the tiles visited; a tile at the border is as high as there are queries."""
    return tiles.visited * tiles.tile * min(tiles.tile, queries)


def _note(cost: Cost, text: str) -> None:
    if text not in cost.notes:
        cost.notes.append(text)
