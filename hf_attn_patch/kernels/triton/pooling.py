"""Kernels that pool the tokens of a block: means, or minima and maxima, in one pass over the input.

The formulas in plain torch are in ``kernels/block_scores.py``. The head dimension is padded to a power of two with
masked loads: nothing but memory traffic counts here, and masked lanes cause none.
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

# block_k: tokens per iteration; block_q is not used
rows(
    "pool",
    other=[(64, 4, Config(1, 128, 4, 2)), (128, 4, Config(1, 64, 4, 2)), (256, 4, Config(1, 32, 4, 2))],
)


@triton.jit
def _pool(
    x,
    starts,
    low,
    high,
    x_batch,
    x_head,
    x_token,
    tokens,
    block,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean (`high` absent) or minimum and maximum of the tokens of one block."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    first = n * block
    if starts is not None:
        first += tl.load(starts + b)
    stop = tl.minimum(first + block, tokens)
    d = tl.arange(0, PADDED)
    x += b * x_batch + h * x_head
    if high is not None:
        lowest = tl.full([TILE, PADDED], float("inf"), tl.float32)
        highest = tl.full([TILE, PADDED], float("-inf"), tl.float32)
    else:
        total = tl.zeros([TILE, PADDED], tl.float32)
    for i in range(0, block, TILE):
        t = first + i + tl.arange(0, TILE)
        inside = (t < stop)[:, None] & (d < DIM)[None, :]
        found = tl.load(x + t[:, None] * x_token + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if high is not None:
            lowest = tl.minimum(lowest, tl.where(inside, found, float("inf")))
            highest = tl.maximum(highest, tl.where(inside, found, float("-inf")))
        else:
            total += found
    at = ((b * tl.num_programs(1) + h) * tl.num_programs(0) + n) * DIM + d
    if high is not None:  # a block without tokens: 0, like its mean
        tl.store(low + at, tl.where(first < stop, tl.min(lowest, 0), 0.0), mask=d < DIM)
        tl.store(high + at, tl.where(first < stop, tl.max(highest, 0), 0.0), mask=d < DIM)
    else:
        count = tl.maximum(stop - first, 1).to(tl.float32)
        tl.store(low + at, tl.sum(total, 0) / count, mask=d < DIM)


def dense_last(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, itself if it has one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pool_impl(x: Tensor, block: int, starts: Tensor | None, outputs: int) -> list[Tensor]:
    batch, heads, tokens, dim = x.shape
    x = dense_last(x)
    blocks = -(-tokens // block)
    out = [
        torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device) for _ in range(outputs)
    ]
    chosen = config("pool", x.device, dim, x.dtype)
    launch(
        _pool,
        (blocks, heads, batch),
        x,
        starts,
        out[0],
        out[1] if outputs == 2 else None,
        *x.stride()[:3],
        tokens,
        block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        DIM=dim,
        PADDED=power_of_two(dim),
        TILE=min(chosen.block_k, power_of_two(block, 1)),
    )
    return out


@torch.library.custom_op("hf_attn_patch::block_means", mutates_args=())
def block_means(x: Tensor, block: int, starts: Tensor | None = None) -> Tensor:
    """fp32 [B, H, ceil(N / block), D], means of blocks of `block` tokens of `x` [B, H, N, D]; block 0 of batch row b
    begins at column ``starts[b]`` (int32 [B], None = 0). A last block divides by the tokens it has; none gives 0."""
    return _pool_impl(x, block, starts, 1)[0]


@torch.library.custom_op("hf_attn_patch::block_extremes", mutates_args=())
def block_extremes(x: Tensor, block: int, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(minima, maxima) per block and channel, arguments and shapes as in `block_means`."""
    low, high = _pool_impl(x, block, starts, 2)
    return low, high


@block_means.register_fake
def _(x: Tensor, block: int, starts: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:2], -(-x.shape[2] // block), x.shape[3]), dtype=torch.float32)


@block_extremes.register_fake
def _(x: Tensor, block: int, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], -(-x.shape[2] // block), x.shape[3])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def aot_cases() -> list[Case]:
    """Every dtype, head dimension and option."""
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    cases = []
    for kind, dtype, dim, options in sizes():
        # as transformers has it: [B, N, H, D] transposed
        x = torch.empty(2, 4096, 8, dim, dtype=dtype, device="meta").transpose(1, 2)
        for name, outputs in (("means", 1), ("extremes", 2)):
            for padded in (starts, None) if options else (starts,):
                label = f"{name} {kind} D={dim}" + ("" if padded is None else " starts")
                run = partial(_pool_impl, x, 64, padded, outputs)
                cases.append(Case(label, run, options and padded is not None))
    return cases
