"""Triton kernels of linear attention, forward: states between chunks of keys, then every chunk of rows on its own.

States are fp32 and enter products as fp32 (tf32 for half inputs, ieee for fp32 ones): a sum over many keys can leave
the range of fp16. For the same reason products of features are not rounded to fp16; bf16 has the range and keeps its
speed (`wide`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config
from .launch import launch, power_of_two

# block_q: tokens per chunk (all kernels use the forward's); block_k: widest tile of a feature or value dimension
configs.rows(
    "linear_forward",
    other=[(256, 2, Config(64, 64, 4, 2)), (256, 4, Config(32, 32, 4, 2))],
)
configs.rows(
    "linear_state",
    other=[(256, 2, Config(64, 64, 4, 2)), (256, 4, Config(32, 32, 4, 2))],
)
configs.rows(  # the sums of a backward, whose products are tf32
    "linear_state_scaled",
    other=[(256, 2, Config(64, 64, 4, 2)), (256, 4, Config(32, 32, 4, 2))],
    sm100=[(256, 2, Config(64, 64, 4, 1)), (256, 4, Config(32, 32, 4, 2))],
)


def tile(dim: int, widest: int) -> int:
    """Tile of a dimension: a power of two between 32 (16 for dim 16) and `widest` that wastes least, the largest such.

    80 -> 32 (96 columns), 96 -> 32, 128 -> 64, 160 -> 32, 192 -> 64: kernels loop over tiles, so none is split in two.
    """
    whole = power_of_two(dim)
    most = min(whole, widest)
    sizes = [t for t in (16, 32, 64, 128, 256) if min(32, most) <= t <= most]
    return min(sizes, key=lambda t: (-(-dim // t) * t, -t))


def chunk_size(device: torch.device, dim: int, dtype: torch.dtype) -> int:
    """Tokens per chunk; states are kept at multiples of it."""
    return configs.config("linear_forward", device, dim, dtype).block_q


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of dots."""
    return "ieee" if dtype == torch.float32 else "tf32"


def wide(dtype: torch.dtype) -> tl.dtype:
    """Type in which products of features enter dots: the input type unless that is fp16 (range)."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with stride 1 in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def load_tile(base, stride, rows, ok, first, DIM: tl.constexpr, TILE: tl.constexpr):
    """[rows, TILE] of a row-major matrix from column `first`; 0 where a row is not ok or a column is beyond DIM."""
    cols = first + tl.arange(0, TILE)
    return tl.load(
        base + rows[:, None] * stride + cols[None, :], mask=ok[:, None] & (cols < DIM)[None, :], other=0.0
    )


@triton.jit
def load_tile_t(base, stride, rows, ok, first, DIM: tl.constexpr, TILE: tl.constexpr):
    """The transpose of `load_tile`: [TILE, rows]."""
    cols = first + tl.arange(0, TILE)
    return tl.load(
        base + rows[None, :] * stride + cols[:, None], mask=ok[None, :] & (cols < DIM)[:, None], other=0.0
    )


@triton.jit
def pairs(
    a, a_stride, a_rows, a_ok, b, b_stride, b_rows, b_ok,
    M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of rows of a with rows of b, fp32 [M, N]; 0 for rows that are not ok."""
    acc = tl.zeros([M, N], dtype=tl.float32)
    for d in range(0, DIM, TILE):
        x = load_tile(a, a_stride, a_rows, a_ok, d, DIM, TILE)
        y = load_tile_t(b, b_stride, b_rows, b_ok, d, DIM, TILE)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def key_ok(mask, batch, cols, length):
    """Keys that exist and are not padding."""
    ok = cols < length
    if mask is not None:
        ok = ok & (tl.load(mask + batch * length + cols, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _linear_state(
    X, Y, MASK, SCALE, WEIGHT, KV0, Z0, KV, Z, KV_END, Z_END,
    x_b, x_h, x_t, y_b, y_h, y_t, T, CHUNKS, HEADS,
    GROUP: tl.constexpr, Y_DIV: tl.constexpr, REVERSE: tl.constexpr, EACH: tl.constexpr, SEGMENTS: tl.constexpr,
    F: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running sums of scale_t x_t y_t^T and weight_t x_t, over tokens and the GROUP heads of a state head.

    KV, Z: the sum before each chunk (after it, in sequence order, if REVERSE), if EACH. KV_END, Z_END: the sum of all
    tokens of this segment. Grid: (B * HEADS * SEGMENTS, tiles of F, tiles of DV).
    """
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    d = tl.program_id(2) * BV + tl.arange(0, BV)
    segment = tl.program_id(0) % SEGMENTS
    bh = tl.program_id(0) // SEGMENTS
    batch = (bh // HEADS).to(tl.int64)
    head = (bh % HEADS).to(tl.int64)
    bh = bh.to(tl.int64)
    keep = (f < F)[:, None] & (d < DV)[None, :]
    at = f.to(tl.int64)[:, None] * DV + d[None, :]
    kv = tl.zeros([BF, BV], dtype=tl.float32)
    z = tl.zeros([BF], dtype=tl.float32)
    if KV0 is not None:
        if segment == 0:
            kv += tl.load(KV0 + bh * F * DV + at, mask=keep, other=0.0)
            z += tl.load(Z0 + bh * F + f, mask=f < F, other=0.0)
    per = tl.cdiv(CHUNKS, SEGMENTS)
    begin = segment * per
    end = tl.minimum(begin + per, CHUNKS)
    for i in range(begin, end):
        c = i
        if REVERSE:
            c = CHUNKS - 1 - i
        if EACH:
            slot = bh * CHUNKS + c
            tl.store(KV + slot * F * DV + at, kv, mask=keep)
            if tl.program_id(2) == 0:
                tl.store(Z + slot * F + f, z, mask=f < F)
        t = (c * C + tl.arange(0, C)).to(tl.int64)
        ok = key_ok(MASK, batch, t, T)
        for g in range(GROUP):
            h = head * GROUP + g
            x = tl.load(
                X + batch * x_b + h * x_h + t[None, :] * x_t + f[:, None],
                mask=(f < F)[:, None] & ok[None, :],
                other=0.0,
            )
            y = tl.load(
                Y + batch * y_b + (h // Y_DIV) * y_h + t[:, None] * y_t + d[None, :],
                mask=ok[:, None] & (d < DV)[None, :],
                other=0.0,
            )
            row = (batch * HEADS * GROUP + h) * T + t
            if WEIGHT is not None:
                weight = tl.load(WEIGHT + row, mask=ok, other=0.0)
                z += tl.sum(x.to(tl.float32) * weight[None, :], 1)
            else:
                z += tl.sum(x.to(tl.float32), 1)
            if SCALE is not None:
                scale = tl.load(SCALE + row, mask=ok, other=0.0)
                kv = tl.dot(
                    x.to(tl.float32) * scale[None, :], y.to(tl.float32), kv, input_precision=PRECISION
                )
            else:
                kv = tl.dot(x, y, kv, input_precision=PRECISION)
    slot = bh * SEGMENTS + segment
    tl.store(KV_END + slot * F * DV + at, kv, mask=keep)
    if tl.program_id(2) == 0:
        tl.store(Z_END + slot * F + f, z, mask=f < F)


@triton.jit
def _linear_forward(
    FQ, FK, V, MASK, KV, Z, OUT, INV,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, L, S, CHUNKS, HEADS, EPS,
    K_DIV: tl.constexpr, V_DIV: tl.constexpr, CAUSAL: tl.constexpr, NORMALISE: tl.constexpr, F: tl.constexpr,
    DV: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of one chunk: older keys through the state (all keys if not CAUSAL), own chunk pair by pair.

    INV: 1 / (normaliser + eps) per row, 0 for a row whose normaliser is 0, 1 if not NORMALISE.
    Grid: (B * HEADS, chunks of rows, tiles of DV).
    """
    c = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(2) * BV
    t = c * C + tl.arange(0, C)
    ok = t < L
    slot = batch * (HEADS // K_DIV) + head // K_DIV
    if CAUSAL:
        slot = slot * CHUNKS + c
    fq = FQ + batch * q_b + head * q_h
    fk = FK + batch * k_b + (head // K_DIV) * k_h
    seen = key_ok(MASK, batch, t, S)
    acc = tl.zeros([C, BV], dtype=tl.float32)
    weights = tl.zeros([C, C], dtype=tl.float32)
    total = tl.zeros([C], dtype=tl.float32)
    for f in range(0, F, BF):
        q = load_tile(fq, q_t, t, ok, f, F, BF)
        wide_q = q.to(tl.float32)
        rows = f + tl.arange(0, BF)
        kv = load_tile(KV + slot * F * DV, DV, rows, rows < F, first, DV, BV)
        acc = tl.dot(wide_q, kv, acc, input_precision=PRECISION)
        if NORMALISE:
            z = tl.load(Z + slot * F + rows, mask=rows < F, other=0.0)
            total += tl.sum(wide_q * z[None, :], 1)
        if CAUSAL:
            k = load_tile_t(fk, k_t, t, seen, f, F, BF)
            weights = tl.dot(q, k, weights, input_precision=PRECISION)
    if CAUSAL:
        at = tl.arange(0, C)
        weights = tl.where(at[None, :] <= at[:, None], weights, 0.0)
        total += tl.sum(weights, 1)
        v = load_tile(V + batch * v_b + (head // V_DIV) * v_h, v_t, t, seen, first, DV, BV)
        acc = tl.dot(weights.to(WIDE), v.to(WIDE), acc, input_precision=PRECISION)
    inverse = tl.full([C], 1.0, dtype=tl.float32)
    if NORMALISE:
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total + EPS))
    cols = first + tl.arange(0, BV)
    row = (batch * HEADS + head) * L + t
    tl.store(
        OUT + row[:, None] * DV + cols[None, :],
        (acc * inverse[:, None]).to(OUT.dtype.element_ty),
        mask=ok[:, None] & (cols < DV)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(INV + row, inverse, mask=ok)


def states(
    x: Tensor,
    y: Tensor,
    heads: int,
    chunk: int,
    *,
    each: bool,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    initial: tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of x_t y_t^T (scaled) and x_t (weighted) for `heads` state heads.

    Args:
        x: [B, heads * group, T, F] (a group is summed). y: [B, Hy, T, Dv]. mask: uint8 [B, T].
        scale, weight: fp32 [B, heads * group, T]. each: also the sum before every chunk.

    Returns:
        (kv [B, heads, chunks, F, Dv], z [B, heads, chunks, F]) if `each`, else the total twice over:
        the total (kv [B, heads, F, Dv], z [B, heads, F]) comes last.
    """
    B, Hx, T, F = x.shape
    DV = y.shape[3]
    name = "linear_state" if scale is None else "linear_state_scaled"
    chosen = configs.config(name, x.device, max(F, DV), x.dtype)
    BF, BV = tile(F, chosen.block_k), tile(DV, chosen.block_k)
    chunks = triton.cdiv(T, chunk)
    tiles = (triton.cdiv(F, BF), triton.cdiv(DV, BV))
    # without states between chunks nothing is sequential: segments fill the GPU when there are few heads
    segments = 1 if each else max(1, min(chunks, 256 // max(1, B * heads * tiles[0] * tiles[1])))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    kv, z = (new(B, heads, chunks, F, DV), new(B, heads, chunks, F)) if each else (None, None)
    kv_end, z_end = new(B, heads, segments, F, DV), new(B, heads, segments, F)
    kv0, z0 = (None, None) if initial is None else (s.float().contiguous() for s in initial)
    launch(
        _linear_state, (B * heads * segments, *tiles),
        x, y, mask, scale, weight, kv0, z0, kv, z, kv_end, z_end,
        *x.stride()[:3], *y.stride()[:3], T, chunks, heads,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        GROUP=Hx // heads, Y_DIV=Hx // y.shape[1], REVERSE=reverse, EACH=each, SEGMENTS=segments,
        F=F, DV=DV, C=chunk, BF=BF, BV=BV, PRECISION=precision(x.dtype),
    )  # fmt: skip
    kv_end, z_end = (s[:, :, 0] if segments == 1 else s.sum(2) for s in (kv_end, z_end))
    return (kv_end, z_end, kv_end, z_end) if kv is None or z is None else (kv, z, kv_end, z_end)


def forward(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    initial: tuple[Tensor, Tensor] | None,
    causal: bool,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, H, L, Dv], 1 / normaliser [B, H, L], final kv, final k_sum)."""
    fq, fk, value = (rows_contiguous(x) for x in (fq, fk, value))
    B, H, L, F = fq.shape
    Hf, S, DV = fk.shape[1], fk.shape[2], value.shape[3]
    chunk = chunk_size(fq.device, max(F, DV), fq.dtype)
    kv, z, kv_end, z_end = states(fk, value, Hf, chunk, each=causal, mask=mask, initial=initial)
    out = torch.empty((B, H, L, DV), dtype=value.dtype, device=value.device)
    inverse = torch.empty((B, H, L), dtype=torch.float32, device=value.device)
    chosen = configs.config("linear_forward", fq.device, max(F, DV), fq.dtype)
    BF, BV = tile(F, chosen.block_k), tile(DV, chosen.block_k)
    launch(
        _linear_forward, (B * H, triton.cdiv(L, chunk), triton.cdiv(DV, BV)),
        fq, fk, value, mask, kv.contiguous(), z.contiguous(), out, inverse,
        *fq.stride()[:3], *fk.stride()[:3], *value.stride()[:3], L, S, triton.cdiv(S, chunk), H, float(eps),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        K_DIV=H // Hf, V_DIV=H // value.shape[1], CAUSAL=causal, NORMALISE=normalise,
        F=F, DV=DV, C=chunk, BF=BF, BV=BV, PRECISION=precision(fq.dtype), WIDE=wide(fq.dtype),
    )  # fmt: skip
    return out, inverse, kv_end, z_end
