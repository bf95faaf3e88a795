"""Attention of listed (head, token) pairs against dense attention in float64: lists, padding, windows, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_patch.kernels.reference import masked_softmax
from hf_attn_patch.kernels.triton import configs
from hf_attn_patch.kernels.triton.configs import Config
from hf_attn_patch.kernels.triton.ragged_queries import ragged_query_attention, token_lists
from tests.kernels.budget import check_budget

from .conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")
D = 16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAMES = ["output", "dq", "dk", "dv"]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(
    B: int = 2,
    H: int = 4,
    n: int = 2,
    L: int = 65,
    S: int | None = None,
    dim: int = D,
    E: int = D,
    dtype: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views as transformers gives them: [B, L, H, D] transposed."""
    shapes = ((L, H, dim), (S or L, n, dim), (S or L, n, E))
    q, k, v = (drawn(i, B, *s, dtype=dtype or torch.float32).transpose(1, 2) for i, s in enumerate(shapes))
    return q, k, v


def chosen(B: int, L: int, H: int, share: float, seed: int = 11) -> Tensor:
    return torch.rand(B, L, H, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < share


def formula(query: Tensor, key: Tensor, value: Tensor, active: Tensor, o: dict[str, Any]) -> Tensor:
    """Dense attention with a gate of 0 or 1 per pair; garbage at keys that do not exist is replaced by zeros."""
    B, H, L, _ = query.shape
    n, S = key.shape[1:3]
    k = torch.arange(S, device=DEVICE).reshape(1, 1, 1, S)
    q = torch.arange(L, device=DEVICE).reshape(1, 1, L, 1) + o.get("q_offset", 0)
    real = k >= 0
    if o.get("starts") is not None:
        real = real & (k >= o["starts"].long().reshape(B, 1, 1, 1))
    if o.get("ends") is not None:
        real = real & (k < o["ends"].long().reshape(B, 1, 1, 1))
    seen = real & (k <= q) if o.get("causal", True) else real & (q == q)
    if o.get("window") is not None:
        seen = seen & (k > q - o["window"])
    real = real.expand(B, 1, 1, S).transpose(2, 3)
    key, value = (torch.where(real, x, 0.0).repeat_interleave(H // n, 1) for x in (key, value))
    s = query @ key.mT * o["scale"]
    if o.get("query_scale") is not None:
        s = s * o["query_scale"].to(s.dtype)
    out = masked_softmax(s, seen.expand(B, H, L, S)) @ value
    if o.get("head_gate") is not None:
        out = out * o["head_gate"].to(s.dtype).expand(B, L, H).permute(0, 2, 1)[..., None]
    return torch.where(active.permute(0, 2, 1)[..., None], out, 0.0)


def run(function: Any, tensors: tuple[Tensor, ...], dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """Output and gradients for a fixed cotangent; values are those of `tensors`, the arithmetic is `dtype`'s."""
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in tensors]
    out = function(*leaves)
    if not gradients:
        return [out]
    return [out, *torch.autograd.grad(out, leaves, drawn(7, *out.shape, dtype=tensors[0].dtype).to(dtype))]


def check(q: Tensor, k: Tensor, v: Tensor, active: Tensor, gradients: bool = True, **o: Any) -> list[Tensor]:
    o = {"scale": q.shape[-1] ** -0.5, **o}
    lists = token_lists(active)
    dense = lambda q, k, v: formula(q, k, v, active, o)
    truth, baseline = (run(dense, (q, k, v), t, gradients) for t in (torch.float64, q.dtype))
    got = run(lambda q, k, v: ragged_query_attention(q, k, v, *lists, **o), (q, k, v), q.dtype, gradients)
    assert got[0].dtype == q.dtype
    assert not got[0][~active.permute(0, 2, 1)].any(), "rows that are not listed must be 0"
    check_budget(NAMES, truth, baseline, got, q.dtype)
    return got


def test_lists_of_a_known_choice():
    active = torch.zeros(1, 4, 3, dtype=torch.bool, device=DEVICE)
    active[0, [1, 3], 0] = True
    active[0, :, 2] = True
    tokens, offsets, longest = token_lists(active)
    assert tokens.tolist() == [1, 3, 0, 1, 2, 3] and offsets.tolist() == [0, 2, 2, 6] and longest == 4
    assert tokens.dtype == offsets.dtype == torch.int32
    tokens, offsets, longest = token_lists(torch.zeros_like(active))
    assert tokens.tolist() == [] and offsets.tolist() == [0, 0, 0, 0] and longest == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 0, 4)])
def test_lists_are_what_nonzero_finds(shape):
    active = chosen(*shape, share=0.4)
    tokens, offsets, longest = token_lists(active)
    b, h, l = torch.nonzero(active.transpose(1, 2), as_tuple=True)
    counts = active.sum(1).reshape(-1)
    assert torch.equal(tokens.long(), l)
    assert torch.equal(offsets.diff().long(), counts) and longest == int(counts.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [1, 2, 15, 65])
def test_all_tokens_active_is_dense_causal_attention(L, dtype):
    everything = torch.ones(2, L, 4, dtype=torch.bool, device=DEVICE)
    # of a single key the gradient of the scores is exactly 0 in the formula, and a rounding error in any kernel that
    # takes do . v and do . o from two products: no budget from plain torch can say how large it may be
    check(*inputs(L=L, dtype=dtype), everything, gradients=L > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_random_choice_is_dense_attention_with_a_gate(share, dtype):
    check(*inputs(dtype=dtype), chosen(2, 65, 4, share))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_query_heads_read_and_train_their_kv_head(n):
    check(*inputs(n=n, L=63), chosen(2, 63, 4, 0.6))


def test_heads_without_tokens_and_with_a_single_one():
    active = torch.zeros(2, 65, 4, dtype=torch.bool, device=DEVICE)
    active[0, 40, 1] = active[1, 64, 3] = active[1, 0, 2] = active[0, 20, 3] = True
    check(*inputs(), active)
    check(*inputs(n=1), active)


def test_nothing_active_gives_zeros():
    got = check(*inputs(L=15), torch.zeros(2, 15, 4, dtype=torch.bool, device=DEVICE))
    assert not any(x.any() for x in got)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_read_and_rows_that_see_nothing_give_zero(causal):
    q, k, v = inputs(L=65)
    starts, ends = ints(37, 0), ints(65, 50)
    for x in (k, v):
        x[0, :, :37] = float("nan")
        x[1, :, 50:] = float("nan")
    out, dq, dk, dv = check(q, k, v, chosen(2, 65, 4, 0.6), starts=starts, ends=ends, causal=causal)
    assert not dk[0, :, :37].any() and not dv[1, :, 50:].any()
    if causal:
        assert not out[0, :, :37].any() and not dq[0, :, :37].any()


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 200])
def test_window_counts_the_own_key(window):
    active = chosen(2, 111, 2, 0.7)
    check(*inputs(L=111, H=2, n=1), active, gradients=window > 1, window=window, starts=ints(5, 0))


def test_window_without_causality():
    check(*inputs(L=65), chosen(2, 65, 4, 0.7), window=20, causal=False)


@pytest.mark.parametrize("S", [111, 257])
def test_rows_that_continue_a_cache(S):
    q, k, v = inputs(L=15, S=S)
    check(q, k, v, chosen(2, 15, 4, 0.6), gradients=S < 200, q_offset=S - 15, starts=ints(40, 3))
    check(q, k, v, chosen(2, 15, 4, 0.6), q_offset=50, window=40)


@pytest.mark.parametrize("dim, E", [(40, 16), (80, 96), (16, 72)])
def test_head_dimensions(dim, E):
    check(*inputs(L=40, H=2, n=1, dim=dim, E=E), chosen(2, 40, 2, 0.6), window=30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_query_scale(dtype):
    q, k, v = inputs(L=40, dtype=dtype)
    active = chosen(2, 40, 4, 0.6)
    check(q, k, v, active, head_gate=drawn(3, 2, 40, 4, dtype=dtype))
    check(q, k, v, active, head_gate=drawn(3, 4, dtype=dtype), query_scale=drawn(4, 1, 1, 40, 1))
    check(q, k, v, active, query_scale=drawn(4, 2, 4, 40, 1, dtype=dtype))


@pytest.mark.parametrize("q_block, k_block", [(16, 64), (64, 16)])
def test_tiles_of_unequal_sides(q_block, k_block):
    kernels = ("forward", "dq", "dkdv")
    forced = [configs.forced(f"ragged_queries_{k}", Config(q_block, k_block, 4, 1)) for k in kernels]
    with forced[0], forced[1], forced[2]:
        check(*inputs(L=111, H=2, n=1), chosen(2, 111, 2, 0.8), window=50, starts=ints(21, 0))


def test_gradients_of_a_view_and_of_an_expanded_cotangent():
    q, k, v = (x.requires_grad_() for x in inputs(L=15))
    lists = token_lists(chosen(2, 15, 4, 0.6))
    ragged_query_attention(q, k, v, *lists, scale=0.25).sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (q, k, v))


def test_what_is_not_computed_is_refused():
    q, k, v = inputs(L=15)
    lists = token_lists(chosen(2, 15, 4, 0.6))
    gate = drawn(3, 2, 15, 4).requires_grad_()
    with pytest.raises(ValueError, match="head_gate requires a gradient"):
        ragged_query_attention(q, k, v, *lists, scale=1.0, head_gate=gate)
    with torch.no_grad():
        ragged_query_attention(q, k, v, *lists, scale=1.0, head_gate=gate)
    with pytest.raises(ValueError, match="do not fit"):
        ragged_query_attention(q, k[:, :, 1:], v, *lists, scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        ragged_query_attention(q.half(), k, v, *lists, scale=1.0)
    with pytest.raises(ValueError, match="offsets"):
        ragged_query_attention(q[:, :2], k, v, *lists, scale=1.0)


def test_the_operator_is_well_behaved():
    q, k, v = (x.requires_grad_() for x in inputs(B=1, H=2, L=9))
    tokens, offsets, longest = token_lists(chosen(1, 9, 2, 0.6))
    arguments = (q, k, v, tokens, offsets, longest, 0.25, 0, True, None, None, None, None, None)
    torch.library.opcheck(torch.ops.hf_attn_patch.ragged_query_attention.default, arguments)
