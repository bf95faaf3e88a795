"""Kernel that quantises queries or keys to int8 with one scale per block of tokens (SageAttention's layout).

``s = max |x - mean| / 127`` over the tokens and channels of a block, ``q = round((x - mean) / s)``, ties to even. A
constant added to every key of a head shifts all scores of a row alike, so softmax does not see it: `mean` (over the
keys, per channel) is subtracted first, which makes outlier channels harmless ("smooth K", arXiv 2410.02367). A factor
that scores are multiplied with may be folded into the scales.

The head dimension is padded to a power of two with masked loads (memory traffic is all that counts here).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, sizes
from .configs import Config, config, rows
from .launch import launch, power_of_two
from .pooling import dense_last

# block_k: tokens per iteration; block_q is not used
rows(
    "int8",
    other=[(64, 4, Config(1, 128, 4, 2)), (128, 4, Config(1, 64, 4, 2)), (256, 4, Config(1, 32, 4, 2))],
)


@triton.jit
def _centred(x, mean, x_token, t, stop, d, DIM: tl.constexpr):
    """(x - mean) of tokens t in fp32, 0 outside."""
    inside = (t < stop)[:, None] & (d < DIM)[None, :]
    found = tl.load(x + t[:, None] * x_token + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        found -= tl.load(mean + d, mask=d < DIM, other=0.0)[None, :]
    return tl.where(inside, found, 0.0)


@triton.jit
def _quantise(
    x,
    mean,
    out,
    scales,
    x_batch,
    x_head,
    x_token,
    tokens,
    block,
    factor,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One block of tokens: its largest magnitude, then its values (the second read comes from the cache)."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + h
    x += b * x_batch + h * x_head
    out += head * tokens * DIM
    if mean is not None:
        mean += head * DIM
    first = n * block
    stop = tl.minimum(first + block, tokens)
    d = tl.arange(0, PADDED)
    largest = tl.zeros([TILE, PADDED], tl.float32)
    for i in range(0, block, TILE):
        t = first + i + tl.arange(0, TILE)
        largest = tl.maximum(largest, tl.abs(_centred(x, mean, x_token, t, stop, d, DIM)))
    largest = tl.max(tl.max(largest, 1), 0)
    # below 1e-30 the inverse of the scale could overflow: such a block counts as zero
    some = largest > 1e-30
    scale = tl.where(some, largest / 127.0, 0.0)
    inverse = tl.where(some, 127.0 / tl.where(some, largest, 1.0), 0.0)
    tl.store(scales + head * tl.num_programs(0) + n, scale * factor)
    for i in range(0, block, TILE):
        t = first + i + tl.arange(0, TILE)
        y = _centred(x, mean, x_token, t, stop, d, DIM) * inverse
        # adding 1.5 * 2^23 leaves no bits for a fraction: the hardware rounds to nearest, ties to even
        y = (y + 12582912.0) - 12582912.0
        inside = (t < stop)[:, None] & (d < DIM)[None, :]
        tl.store(out + t[:, None] * DIM + d[None, :], y.to(tl.int8), mask=inside)


def _quantise_impl(x: Tensor, block: int, mean: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = x.shape
    if block < 1 or (mean is not None and tuple(mean.shape) != (batch, heads, 1, dim)):
        found = None if mean is None else list(mean.shape)
        raise ValueError(f"quantise: block={block} must be positive, mean is {found}, "
                         f"expected {[batch, heads, 1, dim]}")  # fmt: skip
    x = dense_last(x)
    mean = None if mean is None else mean.float().contiguous()
    blocks = -(-tokens // block)
    out = torch.empty(batch, heads, tokens, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    chosen = config("int8", x.device, dim, x.dtype)
    launch(
        _quantise,
        (blocks, heads, batch),
        x,
        mean,
        out,
        scales,
        *x.stride()[:3],
        tokens,
        block,
        float(scale),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        DIM=dim,
        PADDED=power_of_two(dim),
        TILE=min(chosen.block_k, power_of_two(block, 1)),
    )
    return out, scales


@torch.library.custom_op("hf_attn_patch::quantise_int8", mutates_args=())
def quantise(x: Tensor, block: int, mean: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Quantise ``(x - mean) * scale`` so that it is ``scales[block] * values`` within half a step.

    Args:
        x: [B, H, S, D]. block: tokens that share a scale, counted in columns (left padding is not known here: a padded
            token takes part like any other). mean: fp32 [B, H, 1, D], subtracted first. scale: folded into the scales.

    Returns:
        (values int8 [B, H, S, D] contiguous, scales fp32 [B, H, ceil(S / block)]). A block whose largest magnitude is
        below 1e-30 has scale 0 and values 0.

    Raises:
        ValueError: `block` is not positive, or `mean` has another shape.
    """
    return _quantise_impl(x, block, mean, scale)


@quantise.register_fake
def _(x: Tensor, block: int, mean: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = x.shape
    values = x.new_empty(x.shape, dtype=torch.int8)
    return values, x.new_empty((batch, heads, -(-tokens // block)), dtype=torch.float32)


def aot_cases() -> list[Case]:
    """Every dtype, head dimension and option."""
    cases = []
    for name, dtype, dim, options in sizes():
        # as transformers has it: [B, N, H, D] transposed
        x = torch.empty(2, 4096, 8, dim, dtype=dtype, device="meta").transpose(1, 2)
        mean = torch.empty(2, 8, 1, dim, device="meta")
        for block, less in ((64, mean), (64, None), (128, mean))[: 3 if options else 1]:
            label = f"{name} D={dim} block={block}" + ("" if less is None else " mean")
            cases.append(Case(label, partial(_quantise_impl, x, block, less, 1.0), options and block == 64))
    return cases
