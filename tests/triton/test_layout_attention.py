"""The layout op itself: dynamic layouts, log-sum-exp, INT8 scores, and what torch.library asks of an op."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels.layout import BlockLayout
from hf_attn_patch.kernels.triton.int8 import quantise
from hf_attn_patch.kernels.triton.layout_attention import layout_attention, pack_edits
from tests.kernels.budget import check_budget

from .conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")


def inputs(B=2, H=4, Hkv=2, L=100, D=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype).to(DEVICE)
    return rand(B, H, L, D), rand(B, Hkv, L, D), rand(B, Hkv, L, D)


def formula(q, k, v, seen, scale):
    """(output, log-sum-exp) of softmax attention over `seen`, bool [B|1, H|1, L, S]; rows that see nothing are 0."""
    G = q.shape[1] // k.shape[1]
    seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1) if seen.shape[1] > 1 else seen
    s = (q @ k.repeat_interleave(G, 1).mT * scale).masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1)
    p = torch.exp(s - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return p @ v.repeat_interleave(G, 1), lse


def random_blocks(batch, heads, L, causal, seed=1):
    """A layout that differs per batch item and head, with empty rows of blocks."""
    g = torch.Generator().manual_seed(seed)
    n = -(-L // 32)
    blocks = torch.rand(batch, heads, n, n, generator=g) < 0.5
    blocks[:, 0, 1] = False
    return BlockLayout.from_block_mask(blocks, L, L, causal=causal, block_q=32, block_k=32).to(DEVICE)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_layouts_per_batch_item_and_head(batch, heads, causal):
    q, k, v = inputs(L=111)
    layout = random_blocks(batch, heads, 111, causal)
    seen = layout.dense()
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    results = []
    for dtype, kernel in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        leaves = [x.to(dtype).requires_grad_(True) for x in (q, k, v)]
        out, lse = layout_attention(*leaves, layout, scale=0.25) if kernel else formula(*leaves, seen, 0.25)
        grads = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)
        results.append([out, lse.masked_fill(lse == float("-inf"), 0.0), *grads])
    check_budget(("output", "lse", "dq", "dk", "dv"), *results, torch.float32)
    dead = ~seen.any(-1).expand(2, -1, -1).repeat_interleave(4 // heads, 1)
    assert dead.any() and not results[2][0][dead].any() and not results[2][2][dead].any()


def test_top_k_indices_make_a_layout_that_the_kernel_runs():
    q, k, v = inputs(B=1, L=130)
    scores = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    layout = BlockLayout.from_topk(
        scores.topk(3).indices.to(DEVICE), 130, 130, causal=True, block_q=32, block_k=32
    )
    truth = formula(q.double(), k.double(), v.double(), layout.dense(), 0.25)
    plain, got = formula(q, k, v, layout.dense(), 0.25), layout_attention(q, k, v, layout, scale=0.25)
    clean = lambda pair: [pair[0], pair[1].masked_fill(pair[1] == float("-inf"), 0.0)]
    check_budget(("output", "lse"), clean(truth), clean(plain), clean(got), torch.float32)


def test_the_gradient_of_the_log_sum_exp():
    q, k, v = inputs(L=65)
    layout = BlockLayout.from_rule(
        SinkWindow(3, 20), 65, 65, causal=True, block_q=32, block_k=32, device=DEVICE
    )
    results = []
    for dtype, kernel in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        leaves = [x.to(dtype).requires_grad_(True) for x in (q, k, v)]
        out, lse = (
            layout_attention(*leaves, layout, scale=0.25)
            if kernel
            else formula(*leaves, layout.dense(), 0.25)
        )
        results.append(torch.autograd.grad(out.pow(2).sum() + lse.pow(2).sum(), leaves))
    check_budget(("dq", "dk", "dv"), *results, torch.float32)


def test_a_layout_without_an_entry_gives_zero():
    q, k, v = (x.requires_grad_(True) for x in inputs(B=1, L=40))
    blocks = torch.zeros(1, 2, 2, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(blocks, 40, 40, block_q=32, block_k=32).to(DEVICE)
    out, lse = layout_attention(q, k, v, layout, scale=1.0)
    assert not out.any() and (lse == float("-inf")).all()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("smooth", [False, True])
def test_int8_scores_stay_within_their_error_bound(block, smooth):
    """|score error| <= scale * sum_d (|q| dk + |k| dq + dq dk) with d = half a quantisation step, row by row.

    The bound on the output follows: probabilities change by at most a factor exp(2 bound), values are averages.
    """
    q, k, v = inputs(B=1, L=130, D=32)
    k = k + 3.0  # a common offset, which smoothing takes out
    mean = k.float().mean(2, keepdim=True) if smooth else None
    q8, qs = quantise(q, block)
    k8, ks = quantise(k, block, mean=mean)
    layout = BlockLayout.from_rule(None, 130, 130, causal=True, block_q=32, block_k=32, device=DEVICE)
    scale = 0.1
    out, _ = layout_attention(q8, k8, v, layout, scale=scale, quantised=(qs, ks, block))
    truth, _ = formula(q.double(), k.double(), v.double(), layout.dense(), scale)
    centred = (k - mean if smooth else k).double()
    spread = lambda s: s.repeat_interleave(block, 2)[:, :, :130, None].double() / 2
    dq, dk = spread(qs), spread(ks).repeat_interleave(2, 1)
    kk = centred.repeat_interleave(2, 1)
    error = scale * (q.double().abs() @ dk.expand_as(kk).mT + dq.expand_as(q) @ (kk.abs() + dk).mT)
    error = error.masked_fill(~layout.dense(), 0.0).amax(-1)
    bound = (torch.exp(2 * error) - 1) * v.double().abs().amax()
    difference = (out.double() - truth).abs().amax(-1)
    assert (difference <= bound + 1e-6).all()
    assert difference.max() > 0, "nothing was quantised"
    if smooth:
        rough = layout_attention(*(quantise(q, block)[0], quantise(k, block)[0]), v, layout, scale=scale,
                                 quantised=(qs, quantise(k, block)[1], block))[0]  # fmt: skip
        assert (out - truth).abs().mean() < (rough - truth).abs().mean(), (
            "smoothing must help keys with an offset"
        )


def arguments(requires_grad):
    q, k, v = (x.requires_grad_(requires_grad) for x in inputs(B=1, H=2, Hkv=1, L=40))
    layout = BlockLayout.from_rule(
        SinkWindow(3, 20), 40, 40, causal=True, block_q=32, block_k=32, device=DEVICE
    )
    amounts = torch.rand(1, 1, 2, 40, device=DEVICE)
    key_class = torch.zeros(1, 40, dtype=torch.int8, device=DEVICE)
    tensors = (
        q,
        k,
        v,
        layout.row_ptr,
        layout.full_count,
        layout.index,
        layout.tile,
        layout.bits,
        None,
        None,
        None,
        None,
    )
    sizes = [40, 40, 32, 32, 1, 1, 1, -1, 0]
    return (*tensors, None, None, amounts, key_class, torch.zeros(2, device=DEVICE), None, None, None, None, sizes,
            pack_edits([("add", 0)]), 1, 5.0, 0.25, 0, False, 0)  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_op_passes_opcheck(requires_grad):
    torch.library.opcheck(torch.ops.hf_attn_patch.layout_attention, arguments(requires_grad))


def test_the_backward_op_passes_opcheck():
    given = arguments(False)
    out, lse = torch.ops.hf_attn_patch.layout_attention(*given)
    tensors, numbers = given[:16], given[21:]
    torch.library.opcheck(
        torch.ops.hf_attn_patch.layout_attention_backward,
        (torch.ones_like(out), None, out, lse, *tensors, *numbers[:5], False),
    )


def test_a_backward_that_does_not_exist_says_so():
    q, k, v = (x.requires_grad_(True) for x in inputs(B=1, L=40))
    layout = BlockLayout.from_rule(None, 40, 40, causal=True, block_q=32, block_k=32, device=DEVICE)
    out, _ = layout_attention(q, k, v, layout, scale=1.0, head_gate=torch.ones(4, device=DEVICE))
    with pytest.raises(RuntimeError, match="head_gate, blend or quantised scores has no backward"):
        out.sum().backward()


def test_a_layout_is_transposed_once_for_all_layers_and_steps(monkeypatch):
    made = []
    original = BlockLayout.transpose
    monkeypatch.setattr(BlockLayout, "transpose", lambda self: made.append(self) or original(self))
    layout = BlockLayout.from_rule(
        SinkWindow(3, 20), 65, 65, causal=True, block_q=32, block_k=32, device=DEVICE
    )
    for seed in range(3):
        q, k, v = (x.requires_grad_(True) for x in inputs(L=65, seed=seed))
        layout_attention(q, k, v, layout, scale=0.25)[0].sum().backward()
    assert len(made) == 1
