"""Device functions that the layout kernels share: rows and keys in memory, visibility bits, edited scores.

Everything two-dimensional is written for either orientation: the forward and dQ kernels hold [queries, keys], the
dK/dV kernel [keys, queries]; offsets come in already shaped [Q, 1] or [1, Q].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def token_index(slots, order, first, limit):
    """(index int64, exists) of the tokens at `slots`: shifted by the row's padding, or looked up in a token order."""
    if order is not None:
        index = tl.load(order + slots).to(tl.int64)
        exists = index >= 0
        index = tl.where(exists, index, 0)
    else:
        index = slots.to(tl.int64) + first
        exists = index < limit
    return index, exists


@triton.jit
def load_rows(pointer, index, stride, exists, dims, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """[rows, dims] of a matrix whose last dimension is contiguous; 0 outside."""
    at = pointer + index[:, None] * stride + dims[None, :]
    if CHECK_ROWS:
        return tl.load(at, mask=exists[:, None] & (dims[None, :] < DIM), other=0.0)
    return tl.load(at, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def visible_bits(bits, tile, rows, cols, first, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """bool [rows, cols] of a bit-packed tile [ROWS, WORDS * 32]; `cols` count from word `first` on."""
    at = bits + (tile.to(tl.int64) * ROWS + rows) * WORDS + first
    words = tl.load(at)[:, None]
    for w in tl.static_range(1, (cols.shape[0] + 31) // 32):
        words = tl.where((cols >= 32 * w)[None, :], tl.load(at + w)[:, None], words)
    return ((words >> (cols % 32)[None, :]) & 1) != 0


@triton.jit
def soft_cap(s, cap):
    """cap * tanh(s / cap), accurate also for small scores (polynomial of Cephes' tanhf below 0.625)."""
    x = s / cap
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = ((near * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return cap * tl.where(tl.abs(x) < 0.625, near * z * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _edited(
    s,
    slope,
    amount,
    classes,
    KIND: tl.constexpr,
    CLASS: tl.constexpr,
    SLOPE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One score edit, and the slope behind it. KIND: 0 add, 1 abs, 2 multiply. CLASS: key class + 1, 0 = every key.
    FIRST: no edit came before, which could have taken keys out for good by adding -inf. (A function of its own,
    because a constexpr cannot be assigned twice in an unrolled loop.)"""
    turn = slope
    if KIND == 2:
        changed = s * amount
        if SLOPE:
            turn = slope * amount
    elif KIND == 1:
        changed = s + amount * tl.abs(s)
        if SLOPE:
            turn = slope * (1.0 + tl.where(s > 0, amount, tl.where(s < 0, -amount, 0.0)))
    else:
        changed = s + amount
    if KIND > 0 and not FIRST:
        changed = tl.where(s == float("-inf"), s, changed)
    if CLASS > 0:
        chosen = classes == CLASS - 1
        s = tl.where(chosen, changed, s)
        if SLOPE and KIND > 0:
            slope = tl.where(chosen, turn, slope)
    else:
        s = changed
        if SLOPE:
            slope = turn
    return s, slope


@triton.jit
def edited_scores(
    s,
    scale,
    query_scale,
    bias,
    bias_at,
    amounts,
    amount_at,
    stride_amount,
    classes,
    exists,
    CAP: tl.constexpr,
    EDITS: tl.constexpr,
    KINDS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Scores in units of log2 from raw products, and d(score)/d(scale * product) if SLOPE (else 1.0).

    s: products q . k. query_scale: factors shaped like the query side, or 1.0. bias_at: offsets of the bias tile.
    amount_at: offsets of the rows' amounts, shaped like the query side. classes: key classes shaped like the key side.
    exists: which elements of the bias may be loaded.
    """
    slope = 1.0
    s = s * (scale * query_scale)
    if CAP > 0.0:
        s = soft_cap(s, CAP)
        if SLOPE:
            slope = slope * (1.0 - (s / CAP) * (s / CAP))
    if bias is not None:
        s += tl.load(bias + bias_at, mask=exists, other=0.0).to(tl.float32)
    for e in tl.static_range(EDITS):
        amount = tl.load(amounts + e * stride_amount + amount_at)
        s, slope = _edited(
            s, slope, amount, classes, (KINDS >> (8 * e)) & 3, (KINDS >> (8 * e + 2)) & 63, SLOPE, e == 0
        )
    return s * LOG2E, slope
