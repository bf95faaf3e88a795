"""Layout attention as a custom op with gradients: `layout_attention(query, key, value, layout, ...)`.

The op takes a `BlockLayout` as plain tensors, so that torch.compile and autograd see nothing but tensors. It computes
softmax over visible keys of edited scores, the log-sum-exp of every row, and on request the epilogue (own-value
blend, head gate). See `hf_attn_patch.program` for the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..layout import BlockLayout
from .aot import Case, sizes
from .configs import Config, config, rows
from .launch import launch, split_dim
from .layout_backward import _layout_delta, _layout_dkv, _layout_dq
from .layout_forward import _layout_forward

KINDS = {"add": 0, "abs": 1, "multiply": 2}
MAX_EDITS = 7  # eight bits each in one int64

# without tensor cores (fp32 products are exact) a product lives in registers: small blocks, many warps
_FP32 = [(256, 4, Config(32, 32, 8, 1))]
_WIDE = (
    256,
    2,
    Config(64, 32, 8, 2),
)  # 32 keys: dK and dV of 64 keys by 256 dimensions do not fit in registers
# four warps on gfx942 have 512 registers per thread, eight 256
rows("layout", gfx942=[(128, 2, Config(128, 64, 4, 2)), (256, 2, Config(64, 32, 4, 1)), (256, 4, Config(32, 32, 4, 1))],
     other=[(128, 2, Config(128, 64, 8, 3)), _WIDE, *_FP32])  # fmt: skip
# blocks are the forward's; block_k of dQ and block_q of dK/dV are the tokens per step inside one entry; 64 leave
# no registers for a bias, a query scale or a token order at D = 128 (dQ on sm80, dK/dV everywhere)
rows("layout_dq", gfx942=[(128, 2, Config(0, 32, 4, 2)), (256, 4, Config(0, 32, 4, 1))],
     sm80=[(256, 2, Config(0, 32, 8, 2)), (256, 4, Config(0, 32, 8, 1))],
     other=[(128, 2, Config(0, 64, 8, 2)), (256, 2, Config(0, 32, 8, 2)), (256, 4, Config(0, 32, 8, 1))])  # fmt: skip
rows("layout_dkv", gfx942=[(256, 2, Config(32, 0, 4, 2)), (256, 4, Config(32, 0, 4, 1))],
     sm80=[(256, 2, Config(32, 0, 8, 2)), (256, 4, Config(32, 0, 8, 1))],
     other=[(64, 2, Config(64, 0, 8, 2)), (256, 2, Config(32, 0, 8, 2)), (64, 4, Config(32, 0, 8, 1)),
            (96, 4, Config(32, 0, 16, 1)), (256, 4, Config(32, 0, 8, 1))])  # fmt: skip


@dataclass
class Padding:
    """Where the real tokens of each row of the batch are, int32 [B] each, None = 0 (or everything).

    query_first: row of `query` that is slot 0 of the layout; rows before it give 0. key_first: key at position 0.
    key_length: keys from there on; needed only where causality does not hide the others.
    """

    query_first: Tensor | None = None
    key_first: Tensor | None = None
    key_length: Tensor | None = None


def pack_edits(kinds: Iterable[tuple[str, int | None]]) -> int:
    """Kinds and key classes of score edits in one integer, eight bits each (class None = every key)."""
    packed = 0
    for i, (kind, key_class) in enumerate(kinds):
        packed |= (KINDS[kind] | (0 if key_class is None else key_class + 1) << 2) << (8 * i)
    return packed


def layout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float,
    padding: Padding | None = None,
    query_scale: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edits: Sequence[tuple[str, int | None]] = (),
    amounts: Tensor | None = None,
    key_class: Tensor | None = None,
    sink_logits: Tensor | None = None,
    head_gate: Tensor | None = None,
    blend: Tensor | None = None,
    own_shift: int = 0,
    uniform: bool = False,
    quantised: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of a layout.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]; float32, float16 or bfloat16, D and Dv <= 256.
        layout: heads 1, Hkv or H; batch 1 or B; block sizes powers of two.
        query_scale: broadcastable to [B, H, L, 1]. bias: additive, broadcastable to [B, H, L, S], not differentiated.
        edits, amounts: score edits in order as (kind, key class), and their amounts float32 [E, B|1, H|1, L|1].
        key_class: int8 [B|1, S]. sink_logits: [H]. head_gate: broadcastable to [B, L, H]; query blocks whose gates are
            all 0 are skipped. blend: float32 [B|1, H|1, L|1], u of ``(1 - u) o + u v``, v the value at key
            ``row + own_shift``.
        uniform: every visible key weighs the same (mean of values), query and key are not read.
        quantised: (query scales fp32 [B, H, blocks], key scales fp32 [B, Hkv, blocks], tokens per block); query and
            key are then int8.

    Returns:
        (output [B, H, L, Dv], natural log-sum-exp of edited scores float32 [B, H, L], -inf for rows that see nothing).
        Differentiable in query, key, value and sink_logits, unless `head_gate`, `blend` or `quantised` are given.
    """
    padding = padding or Padding()
    q8, k8, quantised_block = quantised or (None, None, 0)
    return _layout_attention(
        query, key, value, layout.row_ptr, layout.full_count, layout.index, layout.tile, layout.bits, layout.order,
        padding.query_first, padding.key_first, padding.key_length, query_scale, bias, amounts, key_class,
        sink_logits, head_gate, blend, q8, k8,
        [layout.q_len, layout.kv_len, layout.block_q, layout.block_k, layout.batch, layout.heads,
         int(layout.causal), -1 if layout.window is None else layout.window, layout.q_offset],
        pack_edits(edits), len(edits), softcap or 0.0, scale, own_shift, uniform, quantised_block,
    )  # fmt: skip


def _four(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def _strides(x: Tensor | None, *dims: int) -> tuple[int, ...]:
    """Strides of the listed dimensions, 0 where the tensor broadcasts."""
    return tuple(0 if x is None or x.shape[d] == 1 else x.stride(d) for d in dims)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _forward_impl(
    query: Tensor, key: Tensor, value: Tensor,
    row_ptr: Tensor, full_count: Tensor, entries: Tensor, tiles: Tensor, bits: Tensor, order: Tensor | None,
    query_first: Tensor | None, key_first: Tensor | None, key_length: Tensor | None,
    query_scale: Tensor | None, bias: Tensor | None, amounts: Tensor | None, key_class: Tensor | None,
    sink_logits: Tensor | None, head_gate: Tensor | None, blend: Tensor | None, q8: Tensor | None, k8: Tensor | None,
    layout: Sequence[int], kinds: int, edits: int, softcap: float, scale: float, own_shift: int, uniform: bool,
    quantised_block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_len, _, block_q, block_k, layout_batch, layout_heads = layout[:6]
    query, key, value = map(_last_contiguous, (query, key, value))
    B, H, L, D = query.shape
    Hkv, E = key.shape[1], value.shape[3]
    # [B, L, H, Dv] in memory: what the output projection of every model reads
    shape = (B, L, H, E)
    if query_first is not None:
        out, lse = value.new_zeros(shape), torch.full_like(query[..., 0], float("-inf"), dtype=torch.float32)
    else:
        out, lse = value.new_empty(shape), torch.empty_like(query[..., 0], dtype=torch.float32)
    out, lse = out.transpose(1, 2), lse.contiguous()
    q_blocks = -(-(q_len if order is None else order.shape[0]) // block_q)
    query_scale, bias = _four(query_scale), _four(bias)
    gate = (
        None if head_gate is None else head_gate.reshape((1,) * (3 - head_gate.ndim) + tuple(head_gate.shape))
    )
    D1, D2 = split_dim(D)
    E1, E2 = split_dim(E)
    chosen = config("layout", value.device, max(D, E), value.dtype)
    launch(
        _layout_forward, (B * H * q_blocks,),
        query, key, value, out, lse, row_ptr, full_count, entries, tiles, bits, order,
        query_first, key_first, key_length, query_scale, bias, amounts, key_class, sink_logits, gate, blend, q8, k8,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *_strides(query_scale, 0, 1, 2), *_strides(bias, 0, 1, 2, 3), *_strides(amounts, 0, 1, 2, 3),
        *_strides(key_class, 0), *_strides(gate, 0, 1, 2), *_strides(blend, 0, 1, 2),
        scale, H, H // Hkv, L, key.shape[2], q_blocks, layout_batch, H // layout_heads, layout_heads, own_shift,
        quantised_block, 0 if q8 is None else q8.shape[2], 0 if k8 is None else k8.shape[2],
        BLOCK_Q=block_q, BLOCK_K=block_k, D=D, D1=D1, D2=D2, E=E, E1=E1, E2=E2, CAP=float(softcap), EDITS=edits,
        KINDS=kinds, UNIFORM=uniform, CHECK_KEYS=key_length is not None, PRECISION=_precision(value),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return out, lse


_layout_attention = torch.library.custom_op("hf_attn_patch::layout_attention", _forward_impl, mutates_args=())


@_layout_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, H, L, _d = query.shape
    out = value.new_empty(B, L, H, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(B, H, L, dtype=torch.float32)


# -- backward -------------------------------------------------------------------------------------------------------

_transposed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _transpose(
    row_ptr: Tensor, full_count: Tensor, index: Tensor, tile: Tensor, bits: Tensor, order: Tensor | None,
    layout: Sequence[int],
) -> BlockLayout:  # fmt: skip
    """Transposed layout, computed once per layout and kept as long as its `row_ptr` lives."""
    known = _transposed.get(row_ptr)
    if known is None:
        q_len, kv_len, block_q, block_k, batch, heads, causal, window, q_offset = layout
        known = BlockLayout(
            q_len, kv_len, q_offset, batch, heads, block_q, block_k, row_ptr, full_count, index, tile, bits, order,
            bool(causal), None if window < 0 else window,
        ).transpose()  # fmt: skip
        _transposed[row_ptr] = known
    return known


def _backward_impl(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    row_ptr: Tensor, full_count: Tensor, entries: Tensor, tiles: Tensor, bits: Tensor, order: Tensor | None,
    query_first: Tensor | None, key_first: Tensor | None, key_length: Tensor | None,
    query_scale: Tensor | None, bias: Tensor | None, amounts: Tensor | None, key_class: Tensor | None,
    layout: Sequence[int], kinds: int, edits: int, softcap: float, scale: float, uniform: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q_len, kv_len, block_q, block_k, layout_batch, layout_heads = layout[:6]
    query, key, value, grad = map(_last_contiguous, (query, key, value, grad))
    B, H, L, D = query.shape
    Hkv, S, E = key.shape[1], key.shape[2], value.shape[3]
    D1, D2 = split_dim(D)
    E1, E2 = split_dim(E)
    q_blocks = -(-(q_len if order is None else order.shape[0]) // block_q)
    k_blocks = -(-(kv_len if order is None else order.shape[0]) // block_k)
    delta = torch.empty_like(lse)
    blocks = -(-L // 32)
    launch(
        _layout_delta, (B * H * blocks,), out, grad, delta, *out.stride()[:3], *grad.stride()[:3], H, L, blocks,
        E=E, E1=E1, E2=E2, BLOCK_Q=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    if grad_lse is not None:
        delta -= grad_lse
    fresh = torch.zeros_like if query_first is not None or uniform else torch.empty_like
    dq = fresh(query)
    covered = kv_len == S and key_first is None and key_length is None
    dk = torch.empty_like(key) if covered else torch.zeros_like(key)
    dv = torch.empty_like(value) if covered else torch.zeros_like(value)
    query_scale, bias = _four(query_scale), _four(bias)
    shared = (
        *_strides(query_scale, 0, 1, 2), *_strides(bias, 0, 1, 2, 3), *_strides(amounts, 0, 1, 2, 3),
        *_strides(key_class, 0),
    )  # fmt: skip
    constants = dict(
        BLOCK_Q=block_q, BLOCK_K=block_k, D=D, D1=D1, D2=D2, E=E, E1=E1, E2=E2, CAP=float(softcap), EDITS=edits,
        KINDS=kinds, UNIFORM=uniform, PRECISION=_precision(value),
    )  # fmt: skip
    if not uniform:
        chosen = config("layout_dq", value.device, max(D, E), value.dtype)
        launch(
            _layout_dq, (B * H * q_blocks,),
            query, key, value, grad, dq, lse, delta, row_ptr, full_count, entries, tiles, bits, order,
            query_first, key_first, key_length, query_scale, bias, amounts, key_class,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], *shared,
            scale, H, H // Hkv, L, key.shape[2], q_blocks, layout_batch, H // layout_heads, layout_heads,
            **constants, STEP=min(chosen.block_k, block_k), CHECK_KEYS=key_length is not None,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    turned = _transpose(row_ptr, full_count, entries, tiles, bits, order, layout)
    chosen = config("layout_dkv", value.device, max(D, E), value.dtype)
    launch(
        _layout_dkv, (B * Hkv * k_blocks,),
        query, key, value, grad, dk, dv, lse, delta,
        turned.row_ptr, turned.full_count, turned.index, turned.tile, turned.bits, order,
        query_first, key_first, key_length, query_scale, bias, amounts, key_class,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3], *dk.stride()[:3],
        *dv.stride()[:3], *shared,
        scale, H, H // Hkv, L, S, k_blocks, layout_batch, H // layout_heads, layout_heads,
        **constants, STEP=min(chosen.block_q, block_q), num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    if uniform:
        dk.zero_()
    return dq, dk, dv, delta


_layout_attention_backward = torch.library.custom_op(
    "hf_attn_patch::layout_attention_backward", _backward_impl, mutates_args=()
)


@_layout_attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(lse)


_SAVED = 16  # query … key_class: what the backward op reads again
_SINKS, _GATE, _Q8 = 16, 17, 19


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    if inputs[_GATE] is not None or inputs[_GATE + 1] is not None or inputs[_Q8] is not None:
        ctx.refused = "head_gate, blend or quantised scores"
    else:
        ctx.refused = None
    ctx.save_for_backward(*output, *inputs[:_SAVED], inputs[_SINKS])
    layout, kinds, edits, softcap, scale, _, uniform, _ = inputs[21:]
    ctx.numbers = (layout, kinds, edits, softcap, scale, uniform)


def _backward(ctx, grad: Tensor, grad_lse: Tensor | None):  # type: ignore[no-untyped-def]
    if ctx.refused:
        raise RuntimeError(f"layout attention with {ctx.refused} has no backward; apply them after the op")
    out, lse, *saved, sinks = ctx.saved_tensors
    dq, dk, dv, delta = _layout_attention_backward(grad, grad_lse, out, lse, *saved, *ctx.numbers)
    dsinks = None
    if (
        sinks is not None
    ):  # the extra logit takes probability p and has value 0: its score gradient is -p * delta
        p = torch.exp(sinks.float()[None, :, None] - lse)
        dsinks = -(torch.where(lse == float("-inf"), 0.0, p) * delta).sum((0, 2)).to(sinks.dtype)
    return (dq, dk, dv, *[None] * (_SINKS - 3), dsinks, *[None] * 12)


_layout_attention.register_autograd(_backward, setup_context=_setup_context)


# -- what `aot` compiles ----------------------------------------------------------------------------------------------


def _case(label: str, dtype: torch.dtype, D: int, E: int, default: bool = False, **given: bool) -> list[Case]:
    """Forward and backward of one combination of features, on meta tensors."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def number(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return empty(*shape, dtype=dtype) if given.get(name) else None

    def inputs() -> tuple[list, list]:
        B, H, Hkv, L, int32 = (
            (1, 1, 1, 4096, torch.int32) if given.get("one") else (2, 32, 8, 4096, torch.int32)
        )
        copies, heads = (B, H) if given.get("per_head") else (1, 1)
        scores = torch.int8 if given.get("int8") else dtype
        chosen = config("layout", torch.device("meta"), max(D, E), dtype)
        q_blocks, words = L // chosen.block_q, chosen.block_k // 32
        layout = [empty(q_blocks + 1, dtype=int32), empty(q_blocks, dtype=int32), empty(999, dtype=int32),
                  empty(999, dtype=int32), empty(9, chosen.block_q, words, dtype=int32)]  # fmt: skip
        padding = [number(n, B, dtype=int32) for n in ("left", "left", "right")]
        edits = given.get("edits")
        tensors = [
            empty(B, H, L, D, dtype=scores), empty(B, Hkv, L, D, dtype=scores), empty(B, Hkv, L, E), *layout,
            number("order", L, dtype=torch.int64), *padding, number("query_scale", B, 1, L, 1),
            number("bias", 1, H, L, L), empty(2, B, H, L, dtype=torch.float32) if edits else None,
            empty(B, L, dtype=torch.int8) if edits else None,
        ]  # fmt: skip
        numbers = [
            [L, L, chosen.block_q, chosen.block_k, copies, heads, 1, -1, 0],
            pack_edits([("add", 1), ("abs", 2)]) if edits else 0, 2 if edits else 0,
            30.0 if given.get("softcap") else 0.0, 0.125,
        ]  # fmt: skip
        return tensors, numbers

    def forward() -> None:
        tensors, numbers = inputs()
        epilogue = [
            number("sinks", 32), number("gate", 2, 4096, 32), number("blend", 2, 32, 4096, 1),
            number("int8", 2, 32, 32), number("int8", 2, 8, 32),
        ]  # fmt: skip
        run: Any = _forward_impl
        run(*tensors, *epilogue, *numbers, 0, bool(given.get("uniform")), 128)

    def backward() -> None:
        tensors, numbers = inputs()
        B, H, L, _ = tensors[0].shape
        out, lse = empty(B, L, H, E).transpose(1, 2), empty(B, H, L, dtype=torch.float32)
        sizes = numbers[0]
        row_ptr, full, index, tile, bits, order = tensors[3:9]
        turned = torch.empty(bits.shape[0], sizes[3], sizes[2] // 32, dtype=torch.int32, device="meta")
        _transposed[row_ptr] = BlockLayout(
            L, L, 0, sizes[4], sizes[5], sizes[3], sizes[2], row_ptr, full, index, tile, turned, order, transposed=True
        )  # fmt: skip
        run: Any = _backward_impl
        run(out, None, out, lse, *tensors, *numbers, bool(given.get("uniform")))

    cases = [Case(f"{label} forward", forward, default)]
    if not any(given.get(name) for name in ("gate", "blend", "int8", "sinks")):
        cases.append(Case(f"{label} backward", backward, default))
    return cases


def aot_cases() -> list[Case]:
    """Every head dimension and dtype, and every feature at two head dimensions."""
    features = {
        "padded": dict(left=True, right=True), "edits": dict(edits=True), "softcap": dict(softcap=True),
        "bias": dict(bias=True), "query scale": dict(query_scale=True), "order": dict(order=True),
        "mean values": dict(uniform=True), "sinks": dict(sinks=True), "gate and blend": dict(gate=True, blend=True),
        "int8": dict(int8=True), "per head and item": dict(per_head=True), "one head": dict(one=True),
        "everything": dict(left=True, right=True, edits=True, softcap=True, bias=True, query_scale=True),
    }  # fmt: skip
    cases = _case("bf16 192x128", torch.bfloat16, 192, 128)
    for name, dtype, D, options in sizes():
        cases += _case(f"{name} {D}", dtype, D, D, default=options)
        for feature, given in features.items() if options else ():
            default = D == 128 and feature in ("edits", "per head and item")
            cases += _case(f"{name} {D} {feature}", dtype, D, D, default, **given)
    return cases
