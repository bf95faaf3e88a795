"""Cases of layout attention: full causal (forward, backward), sparse, INT8 scores, ragged queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.rules import Rule, SinkWindow
from hf_attn_patch.kernels.layout import BlockLayout
from hf_attn_patch.kernels.triton.configs import config
from hf_attn_patch.kernels.triton.int8 import quantise
from hf_attn_patch.kernels.triton.layout_attention import layout_attention
from hf_attn_patch.kernels.triton.ragged_queries import ragged_query_attention, token_lists

from .case import Case, Context, Prepared
from .competitors import block_mask, flex, sdpa

D, H, HKV = 128, 32, 8
DENSITIES = (0.05, 0.1, 0.25, 0.5)


def sizes(context: Context) -> tuple[int, int, int]:
    """(query heads, KV heads, head dimension)."""
    return (2, 1, 16) if context.tiny else (H, HKV, D)


def blocks_of(context: Context, kernel: str = "layout") -> tuple[int, int]:
    """Block sizes that layouts of a kernel are built with."""
    chosen = config(kernel, context.on, sizes(context)[2], context.dtype)
    return chosen.block_q, chosen.block_k


def causal_layout(context: Context, L: int, rule: Rule | None = None, kernel: str = "layout") -> BlockLayout:
    block_q, block_k = blocks_of(context, kernel)
    return BlockLayout.from_rule(
        rule, L, L, causal=True, block_q=block_q, block_k=block_k, device=context.device
    )


def causal_flops(B: int, heads: int, L: int, dim: int) -> float:
    """1e12 operations of QK^T and PV over the pairs that causality leaves."""
    return 4 * B * heads * dim * (L * (L + 1) / 2) / 1e12


def causal_mask(context: Context, L: int, block: int = 128) -> Any:
    """FlexAttention's mask of full causal attention."""
    n = -(-L // block)
    tril = torch.ones(n, n, dtype=torch.bool, device=context.device).tril()
    partly = torch.eye(n, dtype=torch.bool, device=context.device)
    return block_mask(partly[None, None], (tril & ~partly)[None, None], block, L, lambda b, h, q, k: k <= q)


# -- full causal -------------------------------------------------------------------------------------------


def full(context: Context, L: int, B: int, backward: bool) -> Prepared:
    heads, kv_heads, dim = sizes(context)
    q, k, v = context.qkv(B, heads, kv_heads, L, dim)
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    layout = causal_layout(context, L)
    cotangent = context.heads(B, heads, L, dim)

    def gradients(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...] = (q, k, v)) -> Callable[[], Any]:
        if not backward:
            return forward
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    def flat(grads: tuple[Tensor, ...]) -> Tensor:
        """Gradients as one vector; those of repeated K and V are summed over the query heads of a group."""
        dq, *rest = grads
        return torch.cat([dq.flatten(), *(g.unflatten(1, (kv_heads, -1)).sum(2).flatten() for g in rest)])

    ours = lambda: layout_attention(q, k, v, layout, scale=dim**-0.5)[0]
    found = Prepared({"ours": gradients(ours)})
    found.work["ours"] = causal_flops(B, heads, L, dim) * (2.5 if backward else 1.0)
    for backend in ("flash", "cudnn"):
        found.compete(f"sdpa {backend}", lambda b=backend: gradients(*sdpa(context, b, q, k, v, True)))
    found.compete("flex", lambda: gradients(flex(context, q, k, v, lambda: causal_mask(context, L))))
    if not context.clock.gpu:
        found.compete("sdpa auto", lambda: gradients(*sdpa(context, "auto", q, k, v, True)))
    if backward:
        found.view = dict.fromkeys(found.calls, flat)
    return found


# -- sparse ------------------------------------------------------------------------------------------------


def random_blocks(context: Context, heads: int, n: int, density: float) -> Tensor:
    """bool [heads, n, n]: the diagonal and random earlier blocks, `density` of the causal ones in all."""
    torch.manual_seed(1)
    possible = n * (n + 1) / 2
    share = max(density * possible - n, 0) / max(possible - n, 1)
    drawn = torch.rand(heads, n, n, device=context.device) < share
    return (drawn | torch.eye(n, dtype=torch.bool, device=context.device)).tril()


def sparse_random(context: Context, L: int, density: float) -> Prepared:
    """A block mask per query head. Blocks are at least 128 tokens, which FlexAttention's kernels can cut as well."""
    heads, kv_heads, dim = sizes(context)
    block_q, block_k = blocks_of(context)
    grain = max(block_q, block_k, 32 if context.tiny else 128)
    blocks = random_blocks(context, heads, -(-L // grain), density)
    fine = blocks.repeat_interleave(grain // block_q, 1).repeat_interleave(grain // block_k, 2)
    fine = fine[:, : -(-L // block_q), : -(-L // block_k)]
    build = lambda: BlockLayout.from_block_mask(fine, L, L, causal=True, block_q=block_q, block_k=block_k)

    def mask() -> Any:
        diagonal = torch.eye(blocks.shape[1], dtype=torch.bool, device=context.device)
        seen = lambda b, h, q, k: blocks[h, q // grain, k // grain] & (k <= q)
        return block_mask((blocks & diagonal)[None], (blocks & ~diagonal)[None], grain, L, seen)

    n = blocks.shape[1]
    return _sparse(context, L, build, mask, float(blocks.sum()) / (heads * n * (n + 1) / 2))


def sparse_window(context: Context, L: int, density: float) -> Prepared:
    """Sinks and a window with the given share of the causal pairs, one layout for all heads."""
    rule = SinkWindow(4, max(1, round(L * (1 - math.sqrt(1 - density)))))
    build = lambda: causal_layout(context, L, rule)

    def mask() -> Any:
        coarse = BlockLayout.from_rule(rule, L, L, causal=True, block_q=128, block_k=128).picture()
        seen = lambda b, h, q, k: (k <= q) & ((k < 4) | (k > q - rule.of(0)[1]))
        return block_mask((coarse == 1).to(context.device), (coarse == 2).to(context.device), 128, L, seen)

    return _sparse(context, L, build, mask, build().density()[1])


def _sparse(
    context: Context, L: int, build: Callable[[], BlockLayout], mask: Callable[[], Any], density: float
) -> Prepared:
    heads, kv_heads, dim = sizes(context)
    q, k, v = context.qkv(1, heads, kv_heads, L, dim)
    layout, dense = build(), causal_layout(context, L)
    attend = lambda layout: lambda: layout_attention(q, k, v, layout, scale=dim**-0.5)[0]
    found = Prepared({"ours": attend(layout), "dense": attend(dense)})
    seen = layout.visible_count() * (heads // layout.heads)
    found.work = {"ours": 4 * dim * seen / 1e12, "dense": causal_flops(1, heads, L, dim)}
    found.compete("flex", lambda: flex(context, q, k, v, mask))
    found.extra = {"density": density, "build_ms": context.clock.host(build).json()}
    return found


# -- INT8 scores and ragged queries ------------------------------------------------------------------------


def int8(context: Context, L: int) -> Prepared:
    """Scores from int8 queries and keys (keys smoothed), values in bf16."""
    heads, kv_heads, dim = sizes(context)
    q, k, v = context.qkv(1, heads, kv_heads, L, dim)
    layout, block, scale = causal_layout(context, L), 64, dim**-0.5

    def quantised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*quantise(q, block), *quantise(k, block, k.float().mean(2, keepdim=True)))

    q8, qs, k8, ks = quantised()

    def whole() -> Tensor:
        q8, qs, k8, ks = quantised()
        return layout_attention(q8, k8, v, layout, scale=scale, quantised=(qs, ks, block))[0]

    found = Prepared({
        "ours": lambda: layout_attention(q8, k8, v, layout, scale=scale, quantised=(qs, ks, block))[0],
        "with quantisation": whole,
        "bf16": lambda: layout_attention(q, k, v, layout, scale=scale)[0],
    })  # fmt: skip
    found.work["ours"] = causal_flops(1, heads, L, dim)
    found.same, found.tolerance = ("with quantisation", "bf16"), 0.1  # int8 rounds coarser than bf16
    return found


def ragged(context: Context, L: int, share: float) -> Prepared:
    """Random (head, token) pairs are active; everybody else's output is 0 (mixture-of-head attention)."""
    heads, kv_heads, dim = sizes(context)
    q, k, v = context.qkv(1, heads, kv_heads, L, dim)
    active = torch.rand(1, L, heads, device=context.device) < share
    tokens, offsets, longest = token_lists(active)
    layout, gate = causal_layout(context, L), active.to(context.dtype)
    scale = dim**-0.5
    found = Prepared({
        "ours": lambda: ragged_query_attention(q, k, v, tokens, offsets, longest, scale=scale),
        "dense": lambda: layout_attention(q, k, v, layout, scale=scale)[0],
        "gated dense": lambda: layout_attention(q, k, v, layout, scale=scale, head_gate=gate)[0],
    })  # fmt: skip
    columns = torch.arange(1, L + 1, device=context.device, dtype=torch.float64)
    pairs = float((active.sum(2)[0].double() * columns).sum())
    whole = causal_flops(1, heads, L, dim)
    found.work = {"ours": 4 * dim * pairs / 1e12, "dense": whole, "gated dense": whole}
    found.same = ("gated dense",)
    found.extra = {
        "active": float(active.float().mean()),
        "lists_ms": context.clock.host(lambda: token_lists(active)).json(),
    }
    return found


def cases(tiny: bool) -> Iterator[Case]:
    """All cases of this file."""
    lengths = (96,) if tiny else (8192, 16384, 32768, 65536)
    for name in ("forward", "backward"):
        for L in lengths:
            # tokens are constant, except that a 64k sequence is one sequence
            B = 1 if tiny else max(1, 32768 // L)
            run = lambda c, L=L, B=B, back=name == "backward": full(c, L, B, back)
            yield Case(f"full {name}", "causal", {"L": L, "B": B}, run)
    long = 128 if tiny else 32768
    for density in (0.5,) if tiny else DENSITIES:
        run = lambda c, d=density: sparse_random(c, long, d)
        yield Case("sparse", "random per head", {"L": long, "density": density}, run)
    for density in (0.5,) if tiny else DENSITIES:
        run = lambda c, d=density: sparse_window(c, long, d)
        yield Case("sparse", "sinks and window", {"L": long, "density": density}, run)
    for share in (0.5,) if tiny else (0.25, 0.5, 0.75, 1.0):
        half = 64 if tiny else 16384
        yield Case(
            "gate", "ragged queries", {"L": half, "active": share}, lambda c, L=half, s=share: ragged(c, L, s)
        )
    yield Case("int8", "scores", {"L": long}, lambda c: int8(c, long))
