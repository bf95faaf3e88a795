"""Block scores: the kernels against float64, the formulas against loops and recorded numbers, selections against what
they promise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_attn_patch.kernels import block_scores, block_selection
from hf_attn_patch.kernels.block_selection import forced_blocks, select_threshold, select_topk
from hf_attn_patch.kernels.reference import per_query_head
from hf_attn_patch.kernels.triton import block_scores as antidiagonal_ops
from hf_attn_patch.kernels.triton import pooling
from tests.kernels.budget import check_budget

from .conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LENGTHS = (1, 2, 15, 63, 65, 111, 257)
GOLDEN = Path(__file__).parents[1] / "golden"


def random(seed: int, *shape: int) -> torch.Tensor:
    """float64 [B, H, N, D] as transformers gives it: a transposed view of [B, N, H, D]."""
    batch, heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return x.to(DEVICE).transpose(1, 2)


def starts_of(*columns: int) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.int32, device=DEVICE)


def compare(names, formula, kernel, inputs, dtype) -> None:
    """Budget check of `kernel` against `formula` on `inputs` rounded to `dtype`."""
    low = [x.to(dtype) for x in inputs]
    check_budget(names, formula(*[x.double() for x in low]), formula(*low), kernel(*low), dtype)


# -- pooling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("block, start", [(1, None), (7, "half"), (32, None), (100, "half")])
def test_a_block_mean_divides_by_the_tokens_the_block_really_has(tokens, block, start, dtype):
    tokens = min(tokens, 64 * block)  # hundreds of blocks only cost time
    starts = None if start is None else starts_of(0, tokens // 2)
    compare(
        ["mean"],
        lambda x: [block_scores.block_means(x, block, starts, "torch")],
        lambda x: [pooling.block_means(x, block, starts)],
        [random(1, 2, 2, tokens, 24)],
        dtype,
    )


def test_the_mean_formula_is_the_mean_of_slices():
    x = random(2, 2, 1, 21, 8)
    means = block_scores.block_means(x, 8, starts_of(0, 6), "torch")
    for b, start in enumerate((0, 6)):
        for n in range(3):
            piece = x[b, 0, start + 8 * n : start + 8 * n + 8]
            expected = piece.mean(0) if len(piece) else torch.zeros_like(x[0, 0, 0])
            torch.testing.assert_close(means[b, 0, n], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_block_extremes_are_exact(tokens, dtype):
    x = random(3, 2, 2, tokens, 40).to(dtype) - 5  # all negative: a masked token must not count as 0
    small = max(7, tokens // 4)
    for block, starts in ((small, starts_of(0, tokens - 1)), (64, starts_of(tokens // 3, 0))):
        expected = block_scores.block_extremes(x, block, starts, "torch")
        for found, wanted in zip(pooling.block_extremes(x, block, starts), expected):
            assert torch.equal(found, wanted)
    first = x[1, 1, :64].amax(0).float()
    assert torch.equal(expected[1][1, 1, 0], first)


# -- anti-diagonals -------------------------------------------------------------------------------------------------


def original_estimate(query, key, block, stride, scale):
    """The original estimate for equal lengths (x-attention, `xattn_estimate`): pad with zeros, interleave, softmax."""
    length, dim = query.shape[2], query.shape[3]
    pad = -length % block
    query, key = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (query, key))
    key = torch.cat([key[:, :, t::stride] for t in range(stride)], -1)
    query = torch.cat([query[:, :, stride - 1 - t :: stride] for t in range(stride)], -1)
    assert query.shape[3] == stride * dim
    scores = query @ key.mT * (scale / stride)
    groups, empty = scores.shape[2], pad // stride
    scores = scores + torch.full((groups, groups), float("-inf"), dtype=scores.dtype).triu(1)
    if empty:
        scores[..., -empty:] = float("-inf")
    probs = scores.softmax(-1)
    if empty:
        probs[:, :, -empty:] = 0
    per = block // stride
    return probs.unflatten(3, (-1, per)).sum(4).unflatten(2, (-1, per)).sum(3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block, stride", [(16, 4), (32, 8), (8, 8)])
def test_antidiagonal_scores_are_those_of_the_original_code(length, block, stride):
    q, k = random(4, 2, 2, length, 8).cpu(), random(5, 2, 2, length, 8).cpu()
    found = block_scores.antidiagonal_scores(q, k, block=block, stride=stride, scale=0.4)
    torch.testing.assert_close(found, original_estimate(q, k, block, stride, 0.4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 3, 16])
def test_stride_one_gives_the_attention_mass_of_each_block_exactly(offset):
    q, k = random(6, 1, 4, 21, 8), random(7, 1, 2, 21 + offset, 8)
    scores = q @ per_query_head(k, 4).mT * 0.3
    future = torch.arange(21 + offset, device=DEVICE) > offset + torch.arange(21, device=DEVICE)[:, None]
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    found = block_scores.antidiagonal_scores(q, k, block=8, stride=1, scale=0.3, q_offset=offset)
    for m, n in itertools.product(range(found.shape[2]), range(found.shape[3])):
        mass = probs[:, :, 8 * m : 8 * m + 8, 8 * n : 8 * n + 8].sum((2, 3))
        torch.testing.assert_close(found[:, :, m, n], mass, rtol=0, atol=1e-13)


def check_antidiagonal(q_len, k_len, dim, heads, kv_heads, dtype, **options):
    inputs = [random(8, 2, heads, q_len, dim), random(9, 2, kv_heads, k_len, dim)]
    options = {"scale": 2 * dim**-0.5, **options}
    compare(
        ["mass"],
        lambda q, k: [block_scores.antidiagonal_scores(q, k, impl="torch", **options)],
        lambda q, k: [block_scores.antidiagonal_scores(q, k, impl="triton", **options)],
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block, stride", [(16, 4), (64, 1), (8, 8), (128, 16)])
def test_the_antidiagonal_kernel_keeps_the_budget_at_odd_lengths(length, block, stride, dtype):
    check_antidiagonal(length, length, 16, 2, 1, dtype, block=block, stride=stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_antidiagonal_kernel_reads_the_right_kv_head_of_a_chunk_after_a_cache(kv_heads, causal, dtype):
    for offset in (0, 5, 72):
        check_antidiagonal(
            30, 111, 16, 4, kv_heads, dtype, block=32, stride=4, q_offset=offset, causal=causal
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96])
def test_the_antidiagonal_kernel_takes_head_dimensions_that_are_no_powers_of_two(dim, dtype):
    check_antidiagonal(65, 65, dim, 1, 1, dtype, block=16, stride=8)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_offset", [0, 20])
def test_left_padding_gives_the_scores_of_the_shorter_row(impl, causal, q_offset):
    q, k = random(10, 3, 2, 91 - q_offset, 16).float(), random(11, 3, 1, 91, 16).float()
    starts = starts_of(0, 37, 90)
    q[1:2, :, : max(37 - q_offset, 0)] = 100.0  # whatever padding holds
    k[1:2, :, :37] = -100.0

    def three(q, k, q_offset, starts, impl):
        same = {"scale": 0.25, "q_offset": q_offset, "causal": causal, "starts": starts, "impl": impl}
        return (
            block_scores.antidiagonal_scores(q, k, block=16, stride=4, **same),
            block_scores.pooled_scores(q, k, block_q=16, block_k=32, **same),
            block_scores.pooled_scores(q, k, block_q=16, block_k=8, pool="minmax", **same),
        )

    padded = three(q, k, q_offset, starts, impl)
    for b, start in enumerate(starts.tolist()):
        skip, offset = max(start - q_offset, 0), max(q_offset - start, 0)
        alone = three(q[b : b + 1, :, skip:], k[b : b + 1, :, start:], offset, None, "torch")
        for found, wanted in zip(padded, alone):
            rows, cols = wanted.shape[2:]
            torch.testing.assert_close(found[b : b + 1, :, :rows, :cols], wanted, rtol=1e-5, atol=1e-5)
            rest = torch.cat([found[b, :, rows:].flatten(), found[b, :, :, cols:].flatten()])
            assert ((rest == 0) | (rest == float("-inf"))).all()


def test_a_block_that_the_kernel_cannot_cut_is_refused_when_forced_and_taken_by_torch_otherwise():
    q = random(12, 1, 1, 48, 16).float()
    with pytest.raises(ValueError, match="groups of stride=8"):
        block_scores.antidiagonal_scores(q, q, block=24, stride=8, scale=1.0, impl="triton")
    assert block_scores.antidiagonal_scores(q, q, block=24, stride=8, scale=1.0).shape == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="does not divide"):
        block_scores.antidiagonal_scores(q, q, block=24, stride=7, scale=1.0)


# -- pooled scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "minmax"])
@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_pooled_scores_are_the_formula_and_minus_infinity_in_the_future(pool, reduce, causal):
    q, k = random(13, 1, 4, 21, 8), random(14, 1, 2, 26, 8)
    found = block_scores.pooled_scores(
        q, k, block_q=8, block_k=4, scale=0.5, q_offset=5, causal=causal, reduce=reduce, pool=pool
    )
    wide = 8 if reduce == "mean" else 1
    assert found.shape == (1, 4, -(-21 // wide), 7)
    for h, m, n in itertools.product(range(4), range(found.shape[2]), range(7)):
        row = q[0, h, m * wide : m * wide + wide].mean(0)
        keys = k[0, h // 2, 4 * n : 4 * n + 4]
        bound = torch.maximum(row * keys.amin(0), row * keys.amax(0)).sum()
        score = 0.5 * (row @ keys.mean(0) if pool == "mean" else bound)
        last = 5 + min(m * wide + wide, 21) - 1
        wanted = score if not causal or 4 * n <= last else torch.tensor(float("-inf"), dtype=q.dtype)
        torch.testing.assert_close(found[0, h, m, n].cpu(), wanted.cpu(), rtol=1e-12, atol=1e-12)


def test_the_minmax_score_bounds_every_product_of_the_block():
    q, k = random(15, 1, 1, 9, 8), random(16, 1, 1, 32, 8)
    bound = block_scores.pooled_scores(
        q, k, block_q=1, block_k=16, scale=1.0, causal=False, reduce="none", pool="minmax"
    )
    assert (bound + 1e-9 >= (q @ k.mT).unflatten(3, (2, 16)).amax(-1)).all()


@pytest.mark.parametrize("pool", ["mean", "minmax"])
def test_pooled_scores_of_the_kernels_keep_the_budget(pool):
    options = {"block_q": 32, "block_k": 16, "scale": 0.3, "causal": False, "pool": pool}
    compare(
        ["score"],
        lambda q, k: [block_scores.pooled_scores(q, k, impl="torch", **options)],
        lambda q, k: [block_scores.pooled_scores(q, k, impl="triton", **options)],
        [random(17, 2, 4, 65, 16), random(18, 2, 2, 111, 16)],
        torch.float32,
    )


# -- selection ------------------------------------------------------------------------------------------------------


def mask_of(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """bool [B, H, nq, blocks] of indices padded with -1."""
    assert indices.dtype == torch.int32
    at = torch.where(indices < 0, blocks, indices).long()
    empty = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=indices.device)
    return empty.scatter(-1, at, True)[..., :-1]


def read(name: str):
    """(getter of tensors, config) of one golden file."""
    file = safe_open(str(GOLDEN / f"{name}.safetensors"), "pt")
    with file as f:
        return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["config"])


def moba(q, k, block, topk):
    scores = block_scores.pooled_scores(q, k, block_q=1, block_k=block, scale=1.0, reduce="none")
    always = forced_blocks(*scores.shape[2:], block_q=1, block_k=block)
    return mask_of(select_topk(scores, topk, always=always), scores.shape[3])


def test_moba_selects_the_blocks_that_the_original_selects():
    tensors, c = read("moba__hf_gqa")
    assert torch.equal(moba(tensors["in.q"], tensors["in.k"], c["block"], c["topk"]), tensors["out.selected"])
    for name in ("moba__varlen", "moba__topk1_block_diagonal"):
        tensors, c = read(name)
        q, k = (tensors[x].transpose(0, 1)[None].split(c["lens"], 2) for x in ("in.q", "in.k"))
        for i, (q_part, k_part) in enumerate(zip(q, k)):
            found = moba(q_part, k_part, c["block"], c["topk"])
            assert torch.equal(found[0], tensors[f"out.selected_{i}"])


@pytest.mark.parametrize("kind, per", [("query_head", "query"), ("head_global", "head")])
def test_vmoba_selects_the_blocks_that_the_original_selects(kind, per):
    tensors, c = read("vmoba__selection")
    q, k = (torch.cat(tensors[x].transpose(0, 1)[None].split(c["lens"], 2)) for x in ("in.q", "in.k"))
    options = {"block_q": 1, "block_k": c["block"], "scale": 1.0, "reduce": "none", "causal": False}
    scores = block_scores.pooled_scores(q, k, **options)
    always = forced_blocks(*scores.shape[2:], block_q=1, block_k=c["block"])
    chunks = scores.shape[3]
    # there a head pools the whole packed batch: the sequences become rows of one
    scores, always = torch.cat(list(scores), 1)[None], torch.cat([always] * 2)
    for i, tau in enumerate(tensors["in.tau"].tolist()):
        found = select_threshold(scores, tau, always=always, per=per, masses="minmax", least=1)
        found = mask_of(found, chunks)[0].unflatten(1, (2, -1))  # [H, sequence, token, chunk]
        official = tensors[f"out.mask_{kind}_{i}"].unflatten(0, (2, chunks)).unflatten(3, (2, -1))
        for sequence in range(2):
            assert torch.equal(found[:, sequence], official[sequence, :, :, sequence].permute(1, 2, 0))


@pytest.fixture
def masses():
    """Masses [2, 2, 8, 8] of causal blocks, -inf in the future."""
    found = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return found.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf")).to(DEVICE)


@pytest.mark.parametrize("per", ["query", "head"])
def test_topk_takes_forced_blocks_first_and_never_a_forbidden_one(masses, per):
    always = forced_blocks(8, 8, block_q=4, block_k=4, sinks=1, recent=2, device=DEVICE)
    for k in (1, 3, 5, 99):
        chosen = mask_of(select_topk(masses, k, always=always, per=per), 8)
        possible = masses > float("-inf")
        assert not (chosen & ~possible).any() and (chosen | ~(always & possible)).all()
        if per == "query":
            wanted = torch.maximum(torch.full((8,), k, device=DEVICE), (always & possible[0, 0]).sum(-1))
            assert torch.equal(chosen.sum(-1), torch.minimum(wanted, possible.sum(-1)))
        else:
            wanted = min(max(8 * k, int((always & possible[0, 0]).sum())), 36)
            assert (chosen.sum((2, 3)) == wanted).all()
        worst = masses.masked_fill(~chosen | always, float("inf")).flatten(2)
        best_left = masses.masked_fill(chosen, float("-inf")).flatten(2)
        if per == "head":
            assert (worst.amin(-1) >= best_left.amax(-1)).all()
        else:
            assert (worst.unflatten(2, (8, 8)).amin(-1) >= best_left.unflatten(2, (8, 8)).amax(-1)).all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("per", ["query", "head"])
@pytest.mark.parametrize("sinks, recent", [(0, 0), (1, 1), (2, 3)])
def test_threshold_keeps_the_smallest_set_that_holds_tau(masses, tau, per, sinks, recent):
    always = forced_blocks(8, 8, block_q=4, block_k=4, sinks=sinks, recent=recent, device=DEVICE)
    chosen = mask_of(select_threshold(masses, tau, always=always, per=per), 8)
    real = masses.masked_fill(masses < 0, 0)
    always = always & (masses >= 0)
    assert (chosen | ~always).all() and not (chosen & (masses < 0)).any()
    pool = (lambda x: x) if per == "query" else (lambda x: x.flatten(2))
    share = pool(real * chosen).sum(-1) / pool(real).sum(-1)
    assert (share >= tau - 1e-12).all()
    extra = pool(chosen & ~always)
    least = pool(real.masked_fill(~chosen | always, float("inf"))).amin(-1)
    without = share - least / pool(real).sum(-1)
    assert (~extra.any(-1) | (without < tau)).all()


def test_a_threshold_of_one_keeps_everything_and_rows_without_blocks_keep_nothing(masses):
    masses = masses.clone()
    masses[1, 0, 5] = float("-inf")
    masses[0, 1, 3, :2] = 0.0
    for kind in ("given", "softmax", "minmax"):
        for per in ("query", "head"):
            chosen = mask_of(select_threshold(masses, 1.0, per=per, masses=kind), 8)
            assert torch.equal(chosen, masses > float("-inf"))
            chosen = mask_of(select_threshold(masses, 0.5, per=per, masses=kind), 8)
            assert not chosen[1, 0, 5].any() and chosen.any()


def test_logits_are_refused_as_masses_and_unknown_words_too(masses):
    with pytest.raises(ValueError, match="masses='softmax'"):
        select_threshold(masses - 1, 0.5)
    with pytest.raises(ValueError, match="unknown"):
        select_threshold(masses, 0.5, masses="soft")
    with pytest.raises(ValueError, match="per="):
        select_topk(masses, 1, per="heads")
    with pytest.raises(ValueError, match="one of topk and threshold"):
        block_selection.layout_from_scores(masses, 64, 64, block_q=8, block_k=32)


def test_forced_blocks_are_sinks_and_those_that_end_with_the_own_positions():
    found = forced_blocks(3, 8, block_q=8, block_k=4, q_offset=6, sinks=1, recent=1)
    # positions 6..13, 14..21, 22..29
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]]
    none = forced_blocks(2, 2, block_q=4, block_k=4, recent=0)
    assert not none.any()


@pytest.mark.parametrize("length", [1, 65, 130])
def test_a_layout_from_scores_reads_the_chosen_blocks_and_all_of_them_at_tau_one(length):
    q, k = random(19, 2, 4, length, 16).float(), random(20, 2, 2, length, 16).float()
    scores = block_scores.antidiagonal_scores(q, k, block=32, stride=8, scale=0.25)
    same = {"block_q": 32, "block_k": 32}
    causal = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    everything = block_selection.layout_from_scores(scores, length, length, threshold=1.0, **same)
    assert everything.heads == 4 and everything.batch == 2
    assert torch.equal(everything.dense(), causal.expand(2, 4, -1, -1))
    some = block_selection.layout_from_scores(scores, length, length, topk=2, sinks=1, **same)
    chosen = mask_of(
        select_topk(scores, 2, always=forced_blocks(*scores.shape[2:], sinks=1, device=DEVICE, **same)),
        scores.shape[3],
    )
    tokens = chosen.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :length, :length]
    assert torch.equal(some.dense(), tokens & causal)


# -- as torch operations --------------------------------------------------------------------------------------------


def test_operations_pass_opcheck():
    x, starts = random(21, 2, 2, 19, 16).float(), starts_of(0, 3)
    torch.library.opcheck(pooling.block_means, (x, 8, starts))
    torch.library.opcheck(pooling.block_extremes, (x, 8))
    torch.library.opcheck(antidiagonal_ops.antidiagonal, (x, x[:, :1], 16, 4, 0.5, 0, True, starts))


def test_what_the_kernels_cannot_take_is_refused_when_forced_and_taken_by_torch_otherwise():
    for x in (random(23, 1, 1, 8, 16), random(23, 1, 1, 8, 320).float()):
        assert block_scores.block_means(x, 4).shape == (1, 1, 2, x.shape[3])
        with pytest.raises(RuntimeError, match="up to 256 and no float64"):
            block_scores.block_means(x, 4, impl="triton")
    with pytest.raises(ValueError, match="impl='cuda' is unknown"):
        block_scores.block_means(x, 4, impl="cuda")


def test_no_gradient_flows_through_scores():
    q = random(22, 1, 1, 33, 16).float().requires_grad_()
    for impl in ("torch", "triton"):
        assert not block_scores.antidiagonal_scores(
            q, q, block=16, stride=4, scale=1.0, impl=impl
        ).requires_grad
        assert not block_scores.pooled_scores(
            q, q, block_q=16, block_k=16, scale=1.0, impl=impl
        ).requires_grad
