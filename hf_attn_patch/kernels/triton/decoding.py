"""When a `Program` is decoding, and what the split-KV kernel is told about it.

Padding, causality, windows and sinks stay arithmetic, so time follows the span of a head. Any other mask or rule
becomes a byte per (row, key), which is little beside the keys themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call.program import Program
from ...call.ragged import RaggedKV
from ...call.rules import SinkWindow
from .. import reference
from .decode import decode, decode_ragged
from .geometry import ends_of_rows, on_device

LONGEST = 1 << 30  # tokens
FEW_ROWS = 16  # query tokens; above, a layout saves more than the split brings


def decodes(program: Program) -> bool:
    """True if the split-KV kernel runs `program`: few rows (or a cache by KV head), no edits, no gradients."""
    tensors = (program.query, program.head_gate, program.query_scale, program.sink_logits)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    if program.score_edits or program.mass_edits or program.blends or program.position_bias is not None:
        return False
    if program.ragged:
        rule = program.rule
        return program.mask.arithmetic and (rule is None or rule.heads in (1, program.num_kv_heads))
    if program.q_len > FEW_ROWS or program.mask.given is not None and program.mask.given.dtype != torch.bool:
        return False
    return not (program.key.requires_grad or program.value.requires_grad) or not torch.is_grad_enabled()  # type: ignore[union-attr]


def decoded(program: Program) -> Tensor:
    """Output [B, H, L, Dv] of a program that `decodes`."""
    mask, rule, device = program.mask, program.rule, program.query.device
    options: dict[str, Any] = dict(
        scale=program.scale, q_columns=mask.q_offset, causal=mask.causal, query_scale=program.query_scale,
        softcap=program.softcap, sink_logits=program.sink_logits, head_gate=program.head_gate,
    )  # fmt: skip
    spans = mask.real_spans if mask.arithmetic else None
    arithmetic = spans is not None and (mask.window is None or mask.causal)
    if arithmetic:
        options["window"] = None if mask.window is None else min(mask.window, LONGEST)
        if mask.has_padding:
            options["starts"], options["ends"] = ends_of_rows(mask, device)
    plain_rule = rule is None or (
        isinstance(rule, SinkWindow) and mask.causal and rule.heads in (1, program.num_kv_heads)
    )
    if plain_rule and isinstance(rule, SinkWindow):
        heads = program.num_kv_heads
        pairs = [rule.of(h if rule.heads > 1 else 0) for h in range(heads)]
        # columns are int32 in the kernel: what is longer than any text is cut before it overflows
        sinks, windows = zip(*((min(s, LONGEST), min(w, LONGEST)) for s, w in pairs))
        options["sinks"], options["spans"] = (on_device(mask, list(v), device) for v in (sinks, windows))
        if mask.has_padding and "starts" not in options:
            options["starts"] = mask.start.int()
    rows = mask.query_columns.to(device)
    exact = arithmetic and plain_rule
    if isinstance(program.key, RaggedKV):
        allowed = []
        if not exact:
            for group in program.key.groups:
                seen = reference.visible(program, rows, group.columns)
                allowed.append(seen[:, list(group.heads)] if seen.shape[1] > 1 and rule is not None else seen)
        return decode_ragged(program.query, program.key, allowed=allowed, **options)[0]
    options["kv_offset"] = mask.kv_offset
    if not exact:
        options["allowed"] = reference.visible(program, rows, mask.key_columns.to(device))
    return decode(program.query, program.key, program.value, **options)[0]  # type: ignore[arg-type]
