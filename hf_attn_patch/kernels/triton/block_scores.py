"""Kernel of anti-diagonal block scores (XAttention, arXiv 2503.16428); the formula is in ``kernels/block_scores.py``.

Nothing as large as L / stride x S / stride exists: the key groups of a tile of query groups are walked twice (softmax
statistics, then sums per block) and one number is stored per pair of blocks.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, sizes
from .configs import Config, config, rows
from .launch import launch, split_dim
from .pooling import dense_last

# block_q, block_k: *groups* of `stride` tokens per tile. fp32 (no tensor cores) spills above D = 128: 16 bytes at
# stride 16, kilobytes at stride 2, where a block of 64 groups sets the tile
rows(
    "antidiagonal",
    other=[(128, 2, Config(64, 64, 4, 3)), (256, 2, Config(64, 64, 8, 2)), (256, 4, Config(32, 32, 8, 1))],
    sm80=[  # above D = 64 four warps need all 255 registers and spill with Triton 3.6, as do three stages
        (64, 2, Config(64, 64, 4, 3)),
        (128, 2, Config(64, 64, 8, 2)),
        (256, 2, Config(64, 64, 8, 2)),
        (256, 4, Config(32, 32, 8, 1)),
    ],
    sm100=[  # D = 80 and 96 spill with three stages or eight warps
        (64, 2, Config(64, 64, 4, 3)),
        (96, 2, Config(64, 64, 4, 2)),
        (128, 2, Config(64, 64, 4, 3)),
        (256, 2, Config(64, 64, 8, 2)),
        (256, 4, Config(32, 32, 8, 1)),
    ],
    gfx942=[(128, 2, Config(64, 64, 4, 2)), (256, 2, Config(32, 64, 4, 1)), (256, 4, Config(32, 32, 4, 1))],
)


@triton.jit
def _group_scores(
    query,
    key,
    q_token,
    k_token,
    a,
    c,
    q_real,
    k_real,
    last,
    scale,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [query groups a, key groups c] in powers of two, -inf where there is nothing to see."""
    d = tl.arange(0, FIRST)
    s = tl.zeros([a.shape[0], c.shape[0]], tl.float32)
    for i in range(STRIDE):
        row = a * STRIDE + (STRIDE - 1 - i)
        col = c * STRIDE + i
        row_in = row < q_real
        col_in = col < k_real
        q_at = query + row.to(tl.int64)[:, None] * q_token
        k_at = key + col.to(tl.int64)[None, :] * k_token
        q = tl.load(q_at + d[None, :], mask=row_in[:, None] & (d < DIM)[None, :], other=0.0)
        k = tl.load(k_at + d[:, None], mask=col_in[None, :] & (d < DIM)[:, None], other=0.0)
        s = tl.dot(q, k, s, input_precision=PRECISION)
        if SECOND > 0:
            e = FIRST + tl.arange(0, SECOND)
            q = tl.load(q_at + e[None, :], mask=row_in[:, None] & (e < DIM)[None, :], other=0.0)
            k = tl.load(k_at + e[:, None], mask=col_in[None, :] & (e < DIM)[:, None], other=0.0)
            s = tl.dot(q, k, s, input_precision=PRECISION)
    seen = (a * STRIDE < q_real)[:, None] & (c * STRIDE < k_real)[None, :]
    if CAUSAL:
        seen = seen & ((c * STRIDE)[None, :] <= last[:, None])
    return tl.where(seen, s * scale, float("-inf"))


@triton.jit
def _antidiagonal(
    query,
    key,
    starts,
    out,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    heads_per_kv,
    q_len,
    k_len,
    q_offset,
    q_blocks,
    k_blocks,
    scale,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax over key groups for a tile of query groups, summed per (query block, key block)."""
    tile = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    query += b * q_batch + h * q_head
    key += b * k_batch + (h // heads_per_kv) * k_head
    out += (b * tl.num_programs(1) + h) * q_blocks * k_blocks
    q_real = q_len
    k_real = k_len
    offset = q_offset
    if starts is not None:  # positions count from the first real token
        start = tl.load(starts + b)
        padding = tl.maximum(start - q_offset, 0)
        query += padding.to(tl.int64) * q_token
        key += start.to(tl.int64) * k_token
        q_real = q_len - padding
        k_real = k_len - start
        offset = tl.maximum(q_offset - start, 0)
    a = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    last = offset + tl.minimum((a + 1) * STRIDE, q_real) - 1
    stop = tl.cdiv(k_real, STRIDE)
    if CAUSAL:
        newest = offset + tl.minimum((tile + 1) * BLOCK_Q * STRIDE, q_real) - 1
        stop = tl.minimum(stop, newest // STRIDE + 1)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for lo in range(0, stop, BLOCK_K):
        c = lo + tl.arange(0, BLOCK_K)
        s = _group_scores(
            query, key, q_token, k_token, a, c, q_real, k_real, last, scale,
            DIM, FIRST, SECOND, STRIDE, CAUSAL, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = higher

    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    m = tile * (BLOCK_Q // PER_BLOCK) + tl.arange(0, BLOCK_Q // PER_BLOCK)
    for lo in range(0, stop, BLOCK_K):
        c = lo + tl.arange(0, BLOCK_K)
        s = _group_scores(
            query, key, q_token, k_token, a, c, q_real, k_real, last, scale,
            DIM, FIRST, SECOND, STRIDE, CAUSAL, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - top[:, None]) * share[:, None]
        p = tl.reshape(p, (BLOCK_Q // PER_BLOCK, PER_BLOCK, BLOCK_K // PER_BLOCK, PER_BLOCK))
        sums = tl.sum(tl.sum(p, 3), 1)
        n = lo // PER_BLOCK + tl.arange(0, BLOCK_K // PER_BLOCK)
        inside = (m < q_blocks)[:, None] & (n < k_blocks)[None, :]
        tl.store(out + m.to(tl.int64)[:, None] * k_blocks + n[None, :], sums, mask=inside)


def why_not_antidiagonal(block: int, stride: int) -> str | None:
    """Reason the anti-diagonal kernel cannot score blocks of `block` tokens in groups of `stride`, or None."""
    groups = block // stride
    if block % stride or groups & (groups - 1) or groups > 64:
        return f"block={block} must hold 1, 2, 4, .. 64 groups of stride={stride} tokens"
    return None


def _antidiagonal_impl(
    query: Tensor,
    key: Tensor,
    block: int,
    stride: int,
    scale: float,
    q_offset: int,
    causal: bool,
    starts: Tensor | None,
) -> Tensor:
    if (reason := why_not_antidiagonal(block, stride)) is not None:
        raise ValueError(f"anti-diagonal scores: {reason}")
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    query, key = dense_last(query), dense_last(key)
    q_blocks, k_blocks = -(-q_len // block), -(-k_len // block)
    # zeros: key blocks in the future are not visited
    out = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=query.device)
    chosen = config("antidiagonal", query.device, dim, query.dtype)
    per_block = block // stride
    block_q, block_k = max(chosen.block_q, per_block), max(chosen.block_k, per_block)
    first, second = split_dim(dim)
    if first > 128:  # two products of 128: one of 256 spills on sm100
        first, second = 128, 128
    launch(
        _antidiagonal,
        (-(-q_blocks * per_block // block_q), heads, batch),
        query,
        key,
        starts,
        out,
        *query.stride()[:3],
        *key.stride()[:3],
        heads // key.shape[1],
        q_len,
        k_len,
        q_offset,
        q_blocks,
        k_blocks,
        scale / stride * math.log2(math.e),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        DIM=dim,
        FIRST=first,
        SECOND=second,
        STRIDE=stride,
        PER_BLOCK=per_block,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        CAUSAL=causal,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )
    return out


@torch.library.custom_op("hf_attn_patch::antidiagonal", mutates_args=())
def antidiagonal(
    query: Tensor,
    key: Tensor,
    block: int,
    stride: int,
    scale: float,
    q_offset: int = 0,
    causal: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """fp32 [B, H, ceil(L / block), ceil(S / block)], see `kernels.block_scores.antidiagonal_scores`.

    Raises:
        ValueError: a block does not hold 1, 2, 4, .. 64 groups of `stride` tokens.
    """
    return _antidiagonal_impl(query, key, block, stride, scale, q_offset, causal, starts)


@antidiagonal.register_fake
def _(
    query: Tensor,
    key: Tensor,
    block: int,
    stride: int,
    scale: float,
    q_offset: int = 0,
    causal: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    blocks = (-(-query.shape[2] // block), -(-key.shape[2] // block))
    return query.new_empty((*query.shape[:2], *blocks), dtype=torch.float32)


def aot_cases() -> list[Case]:
    """Every dtype, head dimension and option."""

    def tensor(
        heads: int, dim: int, dtype: torch.dtype
    ) -> Tensor:  # as transformers has it: [B, N, H, D] transposed
        return torch.empty(2, 4096, heads, dim, dtype=dtype, device="meta").transpose(1, 2)

    starts = torch.empty(2, dtype=torch.int32, device="meta")
    cases = []
    for name, dtype, dim, options in sizes():
        q, k = tensor(8, dim, dtype), tensor(2, dim, dtype)
        for block, stride, causal, padded in (
            (128, 16, True, starts),
            (64, 16, True, starts),
            (128, 8, True, None),
            (128, 16, False, None),
            (128, 2, True, None),
        )[: 5 if options else 1]:
            cases.append(
                Case(
                    f"antidiagonal {name} D={dim} block={block} stride={stride}"
                    + (" causal" if causal else "")
                    + ("" if padded is None else " starts"),
                    partial(_antidiagonal_impl, q, k, block, stride, 0.1, 0, causal, padded),
                    options and (block, stride) == (128, 16) and causal,
                )
            )
    return cases
