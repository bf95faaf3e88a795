"""The Triton executor: layout attention, split-KV decoding and key-class accumulation on a GPU.

It only chooses the kernel and says, for programs no kernel can run, why. Kernels know tensors and layouts; what a
`Program` means for them is decided here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call.program import Heads, MassTransfer, Program, head_selector
from ...call.rules import Rule
from .. import reference
from ..layout import BlockLayout
from . import geometry
from .classes import MAX_CLASSES, class_attention
from .configs import config
from .decoding import decoded, decodes
from .int8 import quantise
from .launch import is_available
from .layout_attention import MAX_EDITS, Padding
from .layout_attention import layout_attention as attend_layout
from .ragged_queries import ragged_query_attention, token_lists

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
    if decodes(program):
        return None
    if program.ragged:
        return "edits, gradients or per-query-head rules over a cache with a span per KV head"
    if program.mass_edits and max(e.classes for e in program.mass_edits) > MAX_CLASSES:
        return f"mass edits over more than {MAX_CLASSES} key classes"
    if program.mass_edits and _needs_grad(program):
        return "gradients through mass edits"
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
    for blend in program.blends:
        if isinstance(blend.target, Rule) and (reason := why_not(program.reading(blend.target))) is not None:
            return f"a blend with what {blend.target} gives: {reason}"
    return geometry.why_not(program)


def run(program: Program) -> tuple[Tensor, None]:
    """Execute `program`: (output [B, H, L, Dv], None)."""
    if decodes(program):
        return decoded(program), None
    if program.mass_edits:
        return _finish(program, _by_class(program))
    if _routed(program):
        return _finish(program, _by_lists(program))
    value = program.value
    assert isinstance(value, Tensor)
    # the epilogue is fused where nothing has to be differentiated through it
    layout, padding = _layout(program, "layout")
    plain = not _needs_grad(program)
    blend = _own_value_blend(program) if plain and padding.query_first is None else None
    fused = blend is not None or (plain and program.head_gate is not None and not program.blends)
    query, key, quantised = _quantised(program) if _in_int8(program) else (program.query, program.key, None)
    out, _ = attend_layout(
        query, key, value, layout, padding=padding, key_class=_key_class(program), quantised=quantised,  # type: ignore[arg-type]
        head_gate=program.head_gate if fused else None, blend=blend,
        own_shift=program.mask.q_offset - program.mask.kv_offset, **_scores(program),
    )  # fmt: skip
    return (out, None) if fused else _finish(program, out)


def _own_value_blend(program: Program) -> Tensor | None:
    """Amounts float32 [B|1, H|1, L|1] of the only blend, if it mixes in the query's own value; else None."""
    if len(program.blends) != 1 or program.blends[0].target != "value":
        return None
    return _amount(program, program.blends[0].amount, program.blends[0].heads, None, 0.0)


def _in_int8(program: Program) -> bool:
    """True if INT8 scores are allowed and plain: taking the mean key out shifts every score of a row by one number."""
    plain = not program.score_edits and program.position_bias is None
    return (
        program.allow_int8
        and plain
        and program.softcap is None
        and program.sink_logits is None
        and not _needs_grad(program)
    )


def _quantised(program: Program) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, int]]:
    """INT8 query and (smoothed) key with their scales, blocks of 64 tokens."""
    key = program.key
    assert isinstance(key, Tensor)
    query8, query_scales = quantise(program.query, 64)
    key8, key_scales = quantise(key, 64, mean=key.float().mean(2, keepdim=True))
    return query8, key8, (query_scales, key_scales, 64)


def _needs_grad(program: Program) -> bool:
    tensors = (program.query, program.key, program.value, program.head_gate, program.sink_logits)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _layout(program: Program, kernel: str) -> tuple[BlockLayout, Padding]:
    value = program.value
    chosen = config(kernel, value.device, max(program.query.shape[3], value.shape[3]), value.dtype)  # type: ignore[arg-type]
    return geometry.resolve(program, chosen.block_q, chosen.block_k)


def _scores(program: Program) -> dict[str, Any]:
    """What both layout kernels take about scores."""
    classed = program.key_class is not None
    return dict(
        scale=program.scale,
        query_scale=program.query_scale,
        softcap=program.softcap,
        bias=program.position_bias,
        edits=[(e.kind, e.key_class if classed else None) for e in program.score_edits],
        amounts=stacked_amounts(program),
        sink_logits=program.sink_logits,
    )


def _by_class(program: Program) -> Tensor:
    """Output with mass edits applied: in the kernel's epilogue if there is one `MassTransfer`, else on its parts."""
    edits, device = program.mass_edits, program.query.device
    layout, padding = _layout(program, "classes")
    classes = max(edit.classes for edit in edits)
    first = edits[0]
    targets = [_target(program, edit.heads, edit.rows) for edit in edits]
    transfer = first.weights if len(edits) == 1 and isinstance(first.weights, MassTransfer) else None
    key_class = _key_class(program)
    assert key_class is not None, "a mass edit needs key classes: the patch must call program.classify first"
    out, masses, counts, _ = class_attention(
        program.query, program.key, program.value, layout, key_class, classes, padding=padding,  # type: ignore[arg-type]
        transfer=transfer, edited=targets[0] if transfer else None, **_scores(program),
    )  # fmt: skip
    if transfer:
        return out
    columns = torch.arange(program.mask.q_offset, program.mask.q_offset + program.q_len, device=device)
    factors, number = torch.ones_like(masses), counts.to(masses.dtype)
    for edit, target in zip(edits, targets):
        now = edit.weights((masses * factors)[..., : edit.classes], number[..., : edit.classes], columns)
        now = torch.nn.functional.pad(now, (0, classes - edit.classes), value=1.0)
        factors = factors * (
            now if target is None else torch.where(target[..., None], now, torch.ones_like(now))
        )
    return torch.einsum("cbhld,bhlc->bhld", out.float(), factors).to(out.dtype)


def _target(program: Program, heads: Heads, rows: Tensor | None) -> Tensor | None:
    """bool, broadcastable to [B, H, L]: where an edit applies; None = everywhere."""
    chosen = head_selector(heads, program.num_heads, program.query.device)
    found = None if chosen is None else chosen[..., 0]
    if rows is not None:
        found = rows[:, None, :] if found is None else found & rows[:, None, :]
    return found


def _routed(program: Program) -> bool:
    """True if only some (head, token) pairs are to be computed, and nothing else is edited."""
    mask = program.mask
    return (
        program.gate_is_sparse
        and program.rule is None
        and not mask.kv_offset
        and not (program.score_edits or program.blends or program.sink_logits is not None)
        and program.softcap is None
        and program.position_bias is None
    )


def _by_lists(program: Program) -> Tensor:
    """Output of the pairs whose gate is open, before the gate."""
    mask, gate = program.mask, program.head_gate
    assert gate is not None
    shape = (program.batch, program.q_len, program.num_heads)
    tokens, offsets, longest = token_lists((gate != 0).expand(shape))
    starts, ends = geometry.ends_of_rows(mask, gate.device)
    return ragged_query_attention(
        program.query, program.key, program.value, tokens, offsets, longest, scale=program.scale,  # type: ignore[arg-type]
        q_offset=mask.q_offset, causal=mask.causal, starts=starts, ends=ends, window=mask.window,
        query_scale=program.query_scale,
    )  # fmt: skip


def _finish(program: Program, out: Tensor) -> tuple[Tensor, None]:
    """Blends and gate in torch."""
    mean = own = None
    key, value = program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if any(b.target == "mean_value" for b in program.blends):
        layout, padding = _layout(program, "layout")
        mean, _ = attend_layout(program.query, key, value, layout, scale=1.0, padding=padding, uniform=True)
    if any(b.target == "value" for b in program.blends):
        own = reference.own_values(program, value)
    by_rule = [run(program.reading(b.target))[0] for b in program.blends if isinstance(b.target, Rule)]
    return reference.finish(program, out, mean, own, by_rule).to(value.dtype), None


def _key_class(program: Program) -> Tensor | None:
    """int8 [B, S] of the keys that are there."""
    if program.key_class is None or not (program.score_edits or program.mass_edits):
        return None
    first = program.mask.kv_offset
    classes = program.key_class[:, first : first + program.mask.kv_len]
    return classes.to(torch.int8).expand(program.batch, -1).contiguous()


def _amount(
    program: Program, amount: float | Tensor, heads: Heads, rows: Tensor | None, neutral: float
) -> Tensor:
    """An amount as float32 [B|1, H|1, L|1], `neutral` where it does not apply."""
    found = torch.as_tensor(amount, dtype=torch.float32, device=program.query.device)
    found = found.reshape((1,) * (4 - found.ndim) + tuple(found.shape))[..., 0]
    target = _target(program, heads, rows)
    return found if target is None else torch.where(target, found, neutral)


def stacked_amounts(program: Program) -> Tensor | None:
    """Amounts of the score edits, float32 [E, B|1, H|1, L|1]; the neutral amount where an edit does not apply."""
    if not program.score_edits:
        return None
    amounts = [
        _amount(program, e.amount, e.heads, e.rows, 1.0 if e.kind == "multiply" else 0.0)
        for e in program.score_edits
    ]
    shape = torch.broadcast_shapes(*(a.shape for a in amounts))
    return torch.stack([a.expand(shape) for a in amounts]).contiguous()


__all__ = ["is_available", "run", "why_not"]
