"""Who we compete with: torch SDPA by backend, compiled FlexAttention, flash-linear-attention.

Each function returns a call, or raises `NotAvailable` with the reason.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Context, NotAvailable


def sdpa(
    context: Context, backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(call, the query, key and value that it reads). backend: ``flash``, ``cudnn``, or ``auto`` (what torch chooses).

    K and V are repeated beforehand, outside of what is timed, where a backend does not take grouped heads.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend != "auto" and not context.clock.gpu:
        raise NotAvailable("SDPA backends need a GPU")
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.get(backend)
    grouped = q.shape[1] != k.shape[1]

    def attend(k: Tensor, v: Tensor, gqa: bool) -> Tensor:
        if chosen is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    if grouped:
        try:
            attend(k, v, True)
            return lambda: attend(k, v, True), (q, k, v)
        except RuntimeError:
            group, trained = q.shape[1] // k.shape[1], k.requires_grad
            k, v = (x.detach().repeat_interleave(group, 1).requires_grad_(trained) for x in (k, v))
    return lambda: attend(k, v, False), (q, k, v)


def block_mask(partly: Tensor, full: Tensor, block: int, length: int, mask_mod: Callable) -> Any:
    """FlexAttention's `BlockMask` from bool [B, H, n, n] grids of blocks that are visible in part and in full: what
    `create_block_mask` finds, without an L x L tensor."""
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(grid: Tensor) -> tuple[Tensor, Tensor]:
        grid = grid.int()
        return grid.sum(-1).int(), torch.argsort(grid, dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(
        *ordered(partly), *ordered(full), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def flex(context: Context, q: Tensor, k: Tensor, v: Tensor, mask: Callable[[], Any]) -> Callable[[], Tensor]:
    """Compiled FlexAttention under the `BlockMask` that `mask()` makes."""
    if not context.clock.gpu:
        raise NotAvailable("FlexAttention is not compiled on a CPU here")
    from torch.nn.attention.flex_attention import flex_attention

    # earlier cases must not use up the recompile limit (then the unfused implementation would run, silently), and a
    # backward that runs many times over one graph cannot donate its buffers
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    blocks, gqa = mask(), q.shape[1] != k.shape[1]
    return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=gqa)


def fla(context: Context, fq: Tensor, fk: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """`chunk_linear_attn` of flash-linear-attention, normalised, on features as they are."""
    if importlib.util.find_spec("fla") is None:
        raise NotAvailable("fla is not installed")
    from fla.ops.linear_attn import chunk_linear_attn

    options: dict[str, Any] = {"scale": 1.0, "normalize": True}
    if "head_first" in inspect.signature(chunk_linear_attn).parameters:
        options["head_first"] = False
    tokens_first = [x.transpose(1, 2) for x in (fq, fk, value)]
    return lambda: chunk_linear_attn(*tokens_first, **options)[0].transpose(1, 2)
