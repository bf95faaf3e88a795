"""Decode kernels against the formula in float64: padding, windows, spans, ring buffers, splits, garbage in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_patch.call.ragged import KVGroup, RaggedKV
from hf_attn_patch.kernels.reference import masked_softmax
from hf_attn_patch.kernels.triton.decode import decode, decode_ragged
from tests.kernels.budget import check_budget

from .conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")
D = 16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
HALF = DTYPES[-1]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return x.to(DEVICE, dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def visible(B: int, H: int, n: int, S: int, q: Tensor, o: dict[str, Any]) -> Tensor:
    """bool [B, H, L, S], straight from the definition."""
    slots = torch.arange(S, device=DEVICE)
    cols = o.get("columns")
    cols = (slots + o.get("kv_offset", 0)).expand(B, S) if cols is None else cols.long()
    k, q = cols[:, None, None, :], q.long().reshape(1, 1, -1, 1)
    seen = k >= 0
    start = 0 if o.get("starts") is None else o["starts"].long().reshape(B, 1, 1, 1)
    seen = seen & (k >= start)
    if o.get("ends") is not None:
        seen = seen & (k < o["ends"].long().reshape(B, 1, 1, 1))
    if o.get("causal", True):
        seen = seen & (k <= q)
    if o.get("window") is not None:
        seen = seen & (k > q - o["window"])
    seen = seen.expand(B, n, q.shape[2], S)
    if o.get("spans") is not None:
        near = k > q - o["spans"].long().reshape(1, n, 1, 1)
        sinks = o.get("sinks")
        seen = seen & (near if sinks is None else near | (k - start < sinks.long().reshape(1, n, 1, 1)))
    if o.get("lengths") is not None:
        seen = seen & (slots < o["lengths"].long().expand(B, n)[..., None])[:, :, None]
    seen = seen.repeat_interleave(H // n, 1)
    allowed = o.get("allowed")
    if allowed is not None:
        seen = seen & (allowed if allowed.shape[1] in (1, H) else allowed.repeat_interleave(H // n, 1)).bool()
    return seen


def formula(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, o: dict[str, Any]) -> list[Tensor]:
    """Output and log-sum-exp in plain torch; garbage at keys nobody sees is replaced by zeros."""
    B, H, L, _ = query.shape
    n, S = key.shape[1:3]
    at = o["q_columns"]
    q = at if isinstance(at, Tensor) else at + torch.arange(L, device=DEVICE)
    seen = visible(B, H, n, S, q, o)
    used = seen.reshape(B, n, -1, S).any(2)[..., None]
    key, value = (x.masked_fill(~used, 0.0).to(dtype).repeat_interleave(H // n, 1) for x in (key, value))
    s = query.to(dtype) @ key.mT * o["scale"]
    if o.get("query_scale") is not None:
        s = s * o["query_scale"].to(dtype)
    if o.get("softcap") is not None:
        s = o["softcap"] * torch.tanh(s / o["softcap"])
    logits = o.get("sink_logits")
    out = masked_softmax(s, seen, logits) @ value
    if o.get("head_gate") is not None:
        out = out * o["head_gate"].to(dtype).expand(B, L, H).permute(0, 2, 1)[..., None]
    s = s.masked_fill(~seen, float("-inf"))
    if logits is not None:
        s = torch.cat([s, logits.to(dtype).reshape(1, H, 1, 1).expand(B, H, L, 1)], -1)
    return [out, torch.logsumexp(s, -1)]


def plain(query: Tensor, key: Tensor, value: Tensor, truth: list[Tensor], o: dict[str, Any]) -> list[Tensor]:
    """Plain torch in the dtype of the query: of several orders of the channels, which give one result in exact
    arithmetic, the one that is furthest off. How far one of them is off on a few rows is a matter of luck."""
    draw, dim = torch.Generator().manual_seed(0), query.shape[3]
    orders = [torch.arange(dim), *(torch.randperm(dim, generator=draw) for _ in range(3))]
    runs = [formula(query[..., c], key[..., c], value, query.dtype, o) for c in orders]
    off = lambda found, exact: float((found.double() - exact).nan_to_num().abs().max())
    return [max(found, key=lambda x, t=exact: off(x, t)) for found, exact in zip(zip(*runs), truth)]


def agree(got: tuple[Tensor, Tensor], truth: list[Tensor], base: list[Tensor], dtype: torch.dtype) -> None:
    nothing = truth[1] == float("-inf")
    assert torch.equal(got[1] == float("-inf"), nothing), "rows that see nothing"
    assert not got[0][nothing].any(), "a row that sees nothing must give 0"
    lses = [torch.where(nothing, 0.0, x[1].double()) for x in (truth, base, got)]
    check_budget(["output", "lse"], *[[x[0], y] for x, y in zip((truth, base, got), lses)], dtype)


def check(query: Tensor, key: Tensor, value: Tensor, **o: Any) -> tuple[Tensor, Tensor]:
    o = {"scale": D**-0.5, **o}
    got = decode(query, key, value, **o)
    assert got[0].dtype == query.dtype and got[1].dtype == torch.float32
    truth = formula(query, key, value, torch.float64, o)
    agree(got, truth, plain(query, key, value, truth, o), query.dtype)
    return got


def inputs(
    B: int = 2, H: int = 4, n: int = 2, L: int = 2, S: int = 65, dim: int = D, E: int = D, dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views as transformers gives them: [B, L, H, D] transposed."""
    dtype = dtype or torch.float32
    shapes = ((L, H, dim), (S, n, dim), (S, n, E))
    q, k, v = (drawn(i, B, *shape, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes))
    return q, k, v


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("S", [1, 2, 15, 63, 64, 65, 257])
def test_every_number_of_keys(S, splits):
    L = min(2, S)
    dtype = DTYPES[S % len(DTYPES)]
    check(*inputs(L=L, S=S, dtype=dtype), q_columns=S - L, splits=splits)


@pytest.mark.parametrize("L", [1, 7, 16])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_query_heads_read_their_kv_head(L, n):
    check(*inputs(n=n, L=L, S=65), q_columns=65 - L, splits=1 if L == 16 else 2)


@pytest.mark.parametrize("dim, E", [(40, 16), (80, 96), (16, 72), (64, 24), (192, 128)])
def test_head_dimensions(dim, E):
    check(*inputs(dim=dim, E=E, S=63), q_columns=61, splits=2)
    check(*inputs(dim=dim, E=E, S=63, dtype=HALF), q_columns=61, splits=1)


def test_default_number_of_splits():
    check(*inputs(S=257, L=1), q_columns=256)
    check(*inputs(S=257, L=1), q_columns=256, window=20)


def test_bidirectional_with_right_padding():
    q, k, v = inputs(L=3)
    k[0, :, 40:] = float("nan")
    v[0, :, 40:] = float("nan")
    check(q, k, v, q_columns=0, causal=False, ends=ints(40, 65), splits=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_left_padding_and_garbage_in_a_static_cache(splits):
    q, k, v = inputs(S=111, L=3)
    for x in (k, v):
        x[0, :, :37] = float("nan")
        x[:, :, 80:] = float("nan")
    check(q, k, v, q_columns=77, starts=ints(37, 0), splits=splits)
    check(q, k, v, q_columns=ints(77, 78, 79), starts=ints(37, 0), ends=ints(80, 80), splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_see_nothing_give_zero(splits):
    q, k, v = inputs(L=4, S=40)
    out, lse = check(q, k, v, q_columns=36, starts=ints(38, 40), splits=splits)
    assert not out[1].any() and not out[0, :, :2].any() and out[0, :, 2:].all()
    check(q, k, v, q_columns=36, starts=ints(38, 40), splits=splits, sink_logits=drawn(5, 4))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 200])
def test_window_counts_the_own_key(window):
    q, k, v = inputs(S=111, L=7)
    check(q, k, v, q_columns=104, window=window, starts=ints(5, 0), splits=2)
    check(q, k, v, q_columns=204, kv_offset=100, window=window, starts=ints(150, 0), splits=1)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "sinks, spans", [((4, 0), (20, 40)), ((33, 64), (1, 7)), ((0, 1), (500, 32)), (None, (9, 70))]
)
def test_spans_and_sinks_per_kv_head(sinks, spans, splits):
    q, k, v = inputs(S=257, L=5)
    sinks = None if sinks is None else ints(*sinks)
    check(q, k, v, q_columns=252, sinks=sinks, spans=ints(*spans), starts=ints(70, 0), splits=splits)
    check(q, k, v, q_columns=252, sinks=sinks, spans=ints(*spans), window=60, splits=splits)


def test_keys_out_of_span_are_not_even_read():
    q, k, v = inputs(S=257, L=1)
    for x in (k, v):
        x[:, 0, 32:160] = float("nan")
        x[:, 1, 1:250] = float("nan")
    check(q, k, v, q_columns=256, sinks=ints(4, 1), spans=ints(97, 7), splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("garbage, kind", [(1e3, torch.int32), (float("nan"), torch.int64)])
def test_ring_buffer_in_rolled_order_with_garbage_in_empty_slots(garbage, kind, splits, dtype):
    q, k, v = inputs(S=63, L=2, dtype=dtype)
    columns = torch.stack([(torch.arange(63) + 41).roll(17), torch.arange(63).roll(-5)])
    columns[0, 10:31] = -1
    columns[1, [0, 40, 62]] = -1
    columns = columns.to(DEVICE, kind)
    empty = (columns < 0)[:, None, :, None]
    k, v = k.masked_fill(empty, garbage), v.masked_fill(empty, garbage)
    own = torch.tensor([100, 103], dtype=kind, device=DEVICE)
    rules = dict(
        sinks=ints(3, 5), spans=ints(20, 45), starts=torch.tensor([43, 2], dtype=kind, device=DEVICE)
    )
    check(q, k, v, q_columns=own, columns=columns, splits=splits)
    check(q, k, v, q_columns=own, columns=columns, splits=splits, **rules)
    check(q, k, v, q_columns=own, columns=columns, splits=splits, window=50)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (1, 1)])
def test_any_other_rule_as_flags(shape, heads):
    q, k, v = inputs(S=65, L=3)
    allowed = drawn(9, shape[0], heads, shape[1], 65) > 0
    allowed[..., 20:30] = False
    k[:, :, 20:30] = v[:, :, 20:30] = float("nan")
    check(q, k, v, q_columns=62, allowed=allowed, splits=2)
    check(q, k, v, q_columns=62, allowed=allowed.to(torch.uint8), splits=1, causal=False)


def test_lengths_per_kv_head():
    q, k, v = inputs(S=111, L=2)
    k[:, 0, 33:] = v[:, 0, 33:] = float("nan")
    check(q, k, v, q_columns=109, lengths=ints(33, 111), splits=2)
    check(q, k, v, q_columns=109, lengths=ints(33, 111, 0, 70).reshape(2, 2), splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_query_scale_cap_sink_logits_and_gate(splits, dtype):
    q, k, v = inputs(S=111, L=3, dtype=dtype)
    common = dict(q_columns=108, splits=splits)
    check(q, k, v, **common, query_scale=drawn(4, 2, 4, 3, 1, dtype=dtype))
    check(q * 3, k, v, **common, softcap=2.0 if splits > 1 else 50.0)
    check(q, k, v, **common, sink_logits=drawn(5, 4, dtype=dtype, size=3.0))
    gate = drawn(6, 2, 3, 4, dtype=dtype) if splits > 1 else drawn(6, 4, dtype=dtype)
    check(q, k, v, **common, head_gate=gate, query_scale=drawn(4, 1, 1, 3, 1, dtype=dtype))


def test_merge_of_splits_with_very_different_log_sum_exp():
    """Weights exp(lse_i): one split of 32 keys equals, outweighs or vanishes beside the other three."""
    for boost in (0.0, 3.0, 30.0, -30.0):
        q, k, v = inputs(L=4, S=128)
        third = (torch.arange(128, device=DEVICE) // 32 == 2)[:, None]
        k = k + boost * q[:, ::2, 1:2] * third
        check(q, k, v, q_columns=124, splits=1)
        check(q, k, v, q_columns=124, splits=4)


def test_fewer_keys_than_splits():
    check(*inputs(S=40, L=1), q_columns=39, splits=7)


@pytest.mark.parametrize("splits", [1, 3])
def test_groups_of_heads_with_keys_of_their_own(splits):
    """Six query heads, three KV heads in two groups, out of order; the truth is each head on its own."""
    q = drawn(0, 2, 3, 6, D).transpose(1, 2)
    groups = []
    for i, (heads, S) in enumerate([((2, 0), 40), ((1,), 111)]):
        columns = torch.arange(111 - S, 111).roll(7 * i).expand(2, S).clone()
        columns[0, 5:9] = -1
        k, v = (drawn(10 + 2 * i + j, 2, len(heads), S, D) for j in (0, 1))
        k[0, :, 5:9] = v[0, :, 5:9] = float("nan")
        groups.append(KVGroup(heads, k, v, columns.to(DEVICE)))
    gate, logits = drawn(3, 2, 3, 6), drawn(4, 6)
    sinks, spans, starts = ints(75, 4, 0), ints(20, 60, 33), ints(3, 0)
    for rules in ({}, {"sinks": sinks, "spans": spans}):
        o = dict(q_columns=108, scale=0.25, starts=starts, splits=splits, **rules)
        out, lse = decode_ragged(q, RaggedKV(groups, 111), head_gate=gate, sink_logits=logits, **o)
        for g in groups:
            at = [2 * h + i for h in g.heads for i in (0, 1)]
            mine = {k: v[list(g.heads)] for k, v in rules.items()}
            given = {**o, **mine, "columns": g.columns, "head_gate": gate[..., at], "sink_logits": logits[at]}
            both = [formula(q[:, at], g.key, g.value, t, given) for t in (torch.float64, torch.float32)]
            agree((out[:, at], lse[:, at]), *both, torch.float32)


def test_flags_of_groups():
    q, k, v = inputs(S=40, L=7)
    columns = torch.arange(40, device=DEVICE).expand(2, 40)
    flags = drawn(8, 2, 2, 7, 40) > 0
    o = dict(q_columns=33, scale=0.25)
    groups = [KVGroup((h,), k[:, h : h + 1], v[:, h : h + 1], columns) for h in (1, 0)]
    got = decode_ragged(q, RaggedKV(groups, 40), allowed=[flags[:, 1:], flags[:, :1]], **o)
    both = [formula(q, k, v, t, {**o, "allowed": flags}) for t in (torch.float64, torch.float32)]
    agree(got, *both, torch.float32)


def test_what_does_not_fit_is_refused():
    q, k, v = inputs()
    common = dict(scale=1.0, q_columns=63)
    with pytest.raises(ValueError, match="no multiple"):
        decode(q[:, :3], k, v, **common)
    with pytest.raises(ValueError, match="do not fit"):
        decode(q, k, v[:, :, 1:], **common)
    with pytest.raises(ValueError, match="one dtype"):
        decode(q, k.half(), v.half(), **common)
    with pytest.raises(ValueError, match="pass spans too"):
        decode(q, k, v, sinks=ints(4, 4), **common)
    with pytest.raises(ValueError, match="spans must be a contiguous vector of 2"):
        decode(q, k, v, spans=ints(4, 4, 4, 4), **common)
    with pytest.raises(TypeError, match="columns"):
        decode_ragged(q, RaggedKV([], 0), columns=ints(1), **common)


def test_the_operators_are_well_behaved():
    q, k, v = inputs(S=40)
    none = dict(columns=None, starts=None, ends=None, causal=True, window=None, sinks=None, spans=None)
    none |= dict(allowed=None, lengths=None, query_scale=None, softcap=None, sink_logits=None, head_gate=None)
    common = {**none, "q_columns": None, "q_first": 38, "kv_offset": 0, "splits": 2, "scale": 0.25}
    torch.library.opcheck(torch.ops.hf_attn_patch.decode.default, (q, k, v), common)
    columns = [torch.arange(40, device=DEVICE).expand(2, 40)]
    ragged = {**common, "columns": columns, "allowed": [], "heads": [1, 0]}
    torch.library.opcheck(torch.ops.hf_attn_patch.decode_ragged.default, (q, [k], [v]), ragged)
