"""The Triton executor: layout attention, split-KV decoding and key-class accumulation on a GPU.

It only chooses the kernel and says, for programs no kernel can run, why. Kernels know tensors and layouts; what a `Program`
means for them is decided here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...program import Program, head_selector
from .. import reference
from . import geometry
from .configs import config
from .launch import is_available
from .layout_attention import MAX_EDITS
from .layout_attention import layout_attention as attend_layout

MAX_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(program: Program) -> str | None:
    """Reason these kernels cannot run `program`, or None."""
    for name, tensor in (("query", program.query), ("key", program.key), ("value", program.value)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}; kernels take float32, float16 and bfloat16"
    if program.query.shape[3] > MAX_DIM or program.value.shape[3] > MAX_DIM:
        return f"head dimension {max(program.query.shape[3], program.value.shape[3])} > {MAX_DIM}"
    if program.operator != "softmax":
        return f"operator {program.operator!r} has no kernel in this executor"
    if program.dropout:
        return "attention dropout"
    if program.ragged:
        return "a cache with a span per KV head"
    if program.mass_edits:
        return "mass edits"
    for edit in program.score_edits:
        if edit.kind == "mean_abs":
            return "score edits by the mean over heads need every head's scores at once"
        if isinstance(edit.amount, Tensor) and edit.amount.requires_grad:
            return "a score edit whose amount is trained"
    if len(program.score_edits) > MAX_EDITS:
        return f"more than {MAX_EDITS} score edits"
    for name in ("query_scale", "position_bias"):
        tensor = getattr(program, name)
        if tensor is not None and tensor.requires_grad:
            return f"a {name.replace('_', ' ')} that is trained"
    return geometry.why_not(program)


def run(program: Program) -> tuple[Tensor, None]:
    """Execute `program`: (output [B, H, L, Dv], None)."""
    key, value = program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    chosen = config("layout", value.device, max(program.query.shape[3], value.shape[3]), value.dtype)
    layout, padding = geometry.resolve(program, chosen.block_q, chosen.block_k)
    amounts = stacked_amounts(program)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (program.query, key, value, program.head_gate)
    )
    # the epilogue is fused where nothing has to be differentiated through it
    gate = None if needs_grad or program.blends else program.head_gate
    out, _ = attend_layout(
        program.query, key, value, layout, scale=program.scale, padding=padding,
        query_scale=program.query_scale, softcap=program.softcap, bias=program.position_bias,
        edits=[(e.kind, e.key_class if program.key_class is not None else None) for e in program.score_edits],
        amounts=amounts, key_class=_key_class(program), sink_logits=program.sink_logits, head_gate=gate,
    )  # fmt: skip
    if gate is not None:
        return out, None
    mean = own = None
    if any(b.target == "mean_value" for b in program.blends):
        mean, _ = attend_layout(program.query, key, value, layout, scale=1.0, padding=padding, uniform=True)
    if any(b.target == "value" for b in program.blends):
        own = reference.own_values(program, value)
    return reference.finish(program, out, mean, own).to(value.dtype), None


def _key_class(program: Program) -> Tensor | None:
    """int8 [B, S] of the keys that are there."""
    if program.key_class is None or not program.score_edits:
        return None
    first = program.mask.kv_offset
    classes = program.key_class[:, first : first + program.mask.kv_len]
    return classes.to(torch.int8).expand(program.batch, -1).contiguous()


def stacked_amounts(program: Program) -> Tensor | None:
    """Amounts of the score edits, float32 [E, B|1, H|1, L|1]; the neutral amount where an edit does not apply."""
    if not program.score_edits:
        return None
    device = program.query.device
    amounts = []
    for edit in program.score_edits:
        amount = torch.as_tensor(edit.amount, dtype=torch.float32, device=device)
        amount = amount.reshape((1,) * (4 - amount.ndim) + tuple(amount.shape))[..., 0]
        neutral = 1.0 if edit.kind == "multiply" else 0.0
        chosen = head_selector(edit.heads, program.num_heads, device)
        if chosen is not None:
            amount = torch.where(chosen[..., 0], amount, neutral)
        if edit.rows is not None:
            amount = torch.where(edit.rows[:, None, :], amount, neutral)
        amounts.append(amount)
    shape = torch.broadcast_shapes(*(a.shape for a in amounts))
    return torch.stack([a.expand(shape) for a in amounts]).contiguous()


__all__ = ["is_available", "run", "why_not"]
