"""Linear attention on Triton: chunked forward, backward and final state, and the recurrent step of decoding.

Formulas, shapes and meaning of the arguments: `kernels.linear`, which checks them before it calls this file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .aot import Case, sizes
from .configs import Config
from .launch import launch, power_of_two
from .linear_backward import backward
from .linear_chunks import forward, rows_contiguous, tile

State = tuple[Tensor, Tensor]

# block_k: columns of the state per step of the loop over Dv
configs.rows("linear_step", other=[(128, 4, Config(16, 32, 4, 1)), (256, 4, Config(16, 16, 4, 1))])


@triton.jit
def _linear_step(
    FQ, FK, V, KV, Z, OUT, q_b, q_h, k_b, k_h, v_b, v_h, HEADS, EPS,
    GROUP: tl.constexpr, V_DIV: tl.constexpr, NORMALISE: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    WHOLE_F: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token. A program owns one state, so that nobody reads what it overwrites. Grid: (B * HEADS,)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    slot = batch * HEADS + head
    f = tl.arange(0, WHOLE_F)
    keep = f < F
    k = tl.load(FK + batch * k_b + head * k_h + f, mask=keep, other=0.0).to(tl.float32)
    z = tl.load(Z + slot * F + f, mask=keep, other=0.0) + k
    tl.store(Z + slot * F + f, z, mask=keep)
    for first in range(0, DV, BV):
        d = first + tl.arange(0, BV)
        at = slot * F * DV + f[:, None] * DV + d[None, :]
        ok = keep[:, None] & (d < DV)[None, :]
        v = tl.load(V + batch * v_b + (head // V_DIV) * v_h + d, mask=d < DV, other=0.0).to(tl.float32)
        kv = tl.load(KV + at, mask=ok, other=0.0) + k[:, None] * v[None, :]
        tl.store(KV + at, kv, mask=ok)
        for g in range(GROUP):
            h = head * GROUP + g
            q = tl.load(FQ + batch * q_b + h * q_h + f, mask=keep, other=0.0).to(tl.float32)
            out = tl.sum(q[:, None] * kv, 0)
            if NORMALISE:
                total = tl.sum(q * z, 0)
                out = tl.where(total == 0.0, 0.0, out / tl.where(total == 0.0, 1.0, total + EPS))
            tl.store(OUT + (batch * HEADS * GROUP + h) * DV + d, out.to(OUT.dtype.element_ty), mask=d < DV)


def _linear_step_impl(
    fq: Tensor, fk: Tensor, value: Tensor, kv: Tensor, k_sum: Tensor, normalise: bool, eps: float
) -> Tensor:
    fq, fk, value = (rows_contiguous(x) for x in (fq, fk, value))
    B, H, _, F = fq.shape
    Hf, DV = fk.shape[1], value.shape[3]
    chosen = configs.config("linear_step", fq.device, max(F, DV), fq.dtype)
    out = torch.empty((B, H, 1, DV), dtype=value.dtype, device=value.device)
    launch(
        _linear_step, (B * Hf,),
        fq, fk, value, kv, k_sum, out, *fq.stride()[:2], *fk.stride()[:2], *value.stride()[:2], Hf, float(eps),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        GROUP=H // Hf, V_DIV=Hf // value.shape[1], NORMALISE=normalise, F=F, DV=DV,
        WHOLE_F=power_of_two(F), BV=tile(DV, chosen.block_k),
    )  # fmt: skip
    return out


@torch.library.custom_op("hf_attn_patch::linear_step", mutates_args=("kv", "k_sum"))
def linear_step(
    fq: Tensor, fk: Tensor, value: Tensor, kv: Tensor, k_sum: Tensor, normalise: bool, eps: float
) -> Tensor:
    """out [B, H, 1, Dv]; `kv` and `k_sum` (fp32, contiguous) take the token in, in place. No gradient."""
    return _linear_step_impl(fq, fk, value, kv, k_sum, normalise, eps)


@linear_step.register_fake
def _(fq, fk, value, kv, k_sum, normalise, eps):
    return value.new_empty((*fq.shape[:3], value.shape[3]))


def _initial(kv: Tensor | None, k_sum: Tensor | None) -> State | None:
    return None if kv is None or k_sum is None else (kv, k_sum)


def _linear_forward_impl(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    causal: bool,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, inverse, kv_end, k_sum_end = forward(
        fq, fk, value, mask, _initial(kv, k_sum), causal, normalise, eps
    )
    return out, inverse, kv_end.contiguous(), k_sum_end.contiguous()


@torch.library.custom_op("hf_attn_patch::linear_attention", mutates_args=())
def _linear_attention(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    causal: bool,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, 1 / normaliser fp32 [B, H, L], final kv, final k_sum); mask: uint8 [B, S] contiguous."""
    return _linear_forward_impl(fq, fk, value, mask, kv, k_sum, causal, normalise, eps)


@_linear_attention.register_fake
def _(fq, fk, value, mask, kv, k_sum, causal, normalise, eps):
    B, H, L, F = fq.shape
    Hf, DV = fk.shape[1], value.shape[3]
    new = lambda *shape: fq.new_empty(shape, dtype=torch.float32)
    return value.new_empty((B, H, L, DV)), new(B, H, L), new(B, Hf, F, DV), new(B, Hf, F)


def _linear_backward_impl(
    dout: Tensor,
    dkv: Tensor,
    dk_sum: Tensor,
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    causal: bool,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, dkv0, dz0 = backward(
        dout, dkv, dk_sum, fq, fk, value, mask, _initial(kv, k_sum), out, inverse, causal, normalise
    )
    return grads[0], grads[1], grads[2], dkv0.contiguous(), dz0.contiguous()


@torch.library.custom_op("hf_attn_patch::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    dout: Tensor,
    dkv: Tensor,
    dk_sum: Tensor,
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    causal: bool,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of fq, fk, value, kv, k_sum."""
    return _linear_backward_impl(
        dout, dkv, dk_sum, fq, fk, value, mask, kv, k_sum, out, inverse, causal, normalise
    )


@_linear_attention_backward.register_fake
def _(dout, dkv, dk_sum, fq, fk, value, mask, kv, k_sum, out, inverse, causal, normalise):
    new = lambda x: x.new_empty(x.shape)
    return new(fq), new(fk), new(value), new(dkv), new(dk_sum)


def _setup(ctx, inputs, output):
    fq, fk, value, mask, kv, k_sum, ctx.causal, ctx.normalise, _ = inputs
    out, inverse, *_ = output
    ctx.save_for_backward(fq, fk, value, mask, kv, k_sum, out, inverse)


def _backward(ctx, dout, _, dkv, dk_sum):
    fq, fk, value, mask, kv, k_sum, out, inverse = ctx.saved_tensors
    B, Hf, _, F = fk.shape
    shapes = (out.shape, (B, Hf, F, value.shape[3]), (B, Hf, F))
    dtypes = (out.dtype, torch.float32, torch.float32)
    # a missing gradient (None) is zero
    dout, dkv, dk_sum = (
        torch.zeros(s, dtype=t, device=out.device) if g is None else g
        for g, s, t in zip((dout, dkv, dk_sum), shapes, dtypes)
    )
    dfq, dfk, dv, dkv0, dz0 = _linear_attention_backward(
        dout, dkv, dk_sum, fq, fk, value, mask, kv, k_sum, out, inverse, ctx.causal, ctx.normalise
    )
    state = (None, None) if kv is None else (dkv0, dz0)
    return dfq, dfk, dv, None, *state, None, None, None


_linear_attention.register_autograd(_backward, setup_context=_setup)


def linear_attention(
    fq: Tensor,
    fk: Tensor,
    value: Tensor,
    causal: bool,
    normalise: bool,
    eps: float,
    key_mask: Tensor | None,
    initial_state: State | None,
) -> tuple[Tensor, State]:
    """`kernels.linear.linear_attention` on Triton, differentiable in features, values and initial state."""
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    kv, k_sum = (None, None) if initial_state is None else (s.float() for s in initial_state)
    out, _, kv_end, k_sum_end = _linear_attention(fq, fk, value, mask, kv, k_sum, causal, normalise, eps)
    return out, (kv_end, k_sum_end)


def aot_cases() -> list[Case]:
    """Every kernel a user can reach: forward and backward, causal or not, with and without mask and state; steps."""

    def meta(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(dtype, F, DV, causal, masked, normalise):
        B, H, Hkv, L, S = 2, 8, 2, 1024, 1024 if causal else 512
        fq, fk, value = meta(dtype, B, H, L, F), meta(dtype, B, Hkv, S, F), meta(dtype, B, Hkv, S, DV)
        mask = meta(torch.uint8, B, S) if masked else None
        state = (meta(torch.float32, B, Hkv, F, DV), meta(torch.float32, B, Hkv, F))
        before = state if masked else (None, None)
        forward: Any = _linear_forward_impl
        backward: Any = _linear_backward_impl
        out, inverse, *_ = forward(fq, fk, value, mask, *before, causal, normalise, 1e-12)
        backward(out, *state, fq, fk, value, mask, *before, out, inverse, causal, normalise)

    def step(dtype, F, DV):
        state = (meta(torch.float32, 2, 2, F, DV), meta(torch.float32, 2, 2, F))
        _linear_step_impl(
            meta(dtype, 2, 8, 1, F), meta(dtype, 2, 2, 1, F), meta(dtype, 2, 2, 1, DV), *state, True, 1e-12
        )

    cases = []
    for kind, dtype, dim, options in sizes():
        for F, DV in ((dim, dim), (2 * dim, dim)) if options else ((dim, dim),):
            name = f"{kind} F{F} Dv{DV}"
            for causal in (True, False) if options and F == DV else (True,):
                label = f"linear {'causal' if causal else 'full'} {name}{' mask state' if causal else ''}"
                run = functools.partial(call, dtype, F, DV, causal, causal, True)
                cases.append(Case(label, run, options and (F, DV) == (128, 64 if causal else 128)))
            if options and F == DV:
                cases.append(
                    Case(f"linear sum {name}", functools.partial(call, dtype, F, DV, True, False, False))
                )
            default = options and (F, DV) == (256, 128)
            cases.append(Case(f"linear step {name}", functools.partial(step, dtype, F, DV), default))
    return cases
