"""Keys that no query may read: they may hold anything (an unfilled static cache, padding), and 0 * NaN is NaN.

Keys behind the last query of a causal call are cut off, which costs nothing. Others are set to 0 only where a result
shows that it is needed: a copy of all values in every decoded token would double what decoding has to read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call.program import Program
from ..call.ragged import KVGroup, RaggedKV
from . import reference

ROWS = 256  # queries whose visibility is looked at together


def trimmed(program: Program) -> Program:
    """The program without the keys behind the last query of a causal call (the unfilled part of a static cache)."""
    mask = program.mask
    length = mask.q_offset + mask.q_len - mask.kv_offset
    if not mask.causal or not 0 < length < mask.kv_len or not isinstance(program.key, Tensor):
        return program
    if "trimmed" not in mask._native:  # layers share a mask, and with it the facts that are computed once
        given = None if mask.given is None else mask.given[..., :length]
        mask._native["trimmed"] = replace(mask, kv_len=length, given=given, _native={})
    bias = program.position_bias
    if bias is not None and bias.shape[-1] > 1:
        bias = bias[..., :length]
    return replace(
        program, key=program.key[:, :, :length], value=program.value[:, :, :length], position_bias=bias,  # type: ignore[index]
        mask=mask._native["trimmed"],
    )  # fmt: skip


def poisoned(program: Program, output: Tensor) -> bool:
    """True if a NaN got into the output, or will get into gradients. False where asking would stall (accelerators)."""
    if output.device.type != "cpu" or torch.compiler.is_compiling() or not output.numel():
        return False
    tensors = [output]
    if output.requires_grad and isinstance(program.key, Tensor) and isinstance(program.value, Tensor):
        tensors += [program.key, program.value]
    return any(bool(t.detach().amax().isnan()) for t in tensors if t.numel())


def without_hidden(program: Program) -> Program:
    """The program with 0 in place of keys and values that no query of it may read."""
    mask, key, value = program.mask, program.key, program.value
    if isinstance(key, RaggedKV):
        groups = []
        for group in key.groups:
            seen = _seen(program, group.columns, list(group.heads))
            k, v = reference.readable(program, seen, group.key, group.value)
            groups.append(KVGroup(group.heads, k, v, group.columns))
        key = value = RaggedKV(groups, key.seen)
        return replace(program, key=key, value=value)
    assert isinstance(value, Tensor)
    seen = _seen(program, mask.key_columns)
    if any(
        blend.target == "value" for blend in program.blends
    ):  # the own value is read whatever the mask says
        seen = seen | (mask.key_columns[None] >= mask.q_offset) & (
            mask.key_columns[None] < mask.q_offset + mask.q_len
        )
    key, value = reference.readable(program, seen, key, value)
    return replace(program, key=key, value=value)


def _seen(program: Program, columns: Tensor, kv_heads: list[int] | None = None) -> Tensor:
    """bool [B, H|1, 1, S]: keys that some query may read, O(S) memory."""
    seen = None
    for rows in program.mask.query_columns.split(ROWS):
        part = reference.visible(program, rows, columns).any(2, keepdim=True)
        seen = part if seen is None else seen | part
    assert seen is not None
    if kv_heads is not None and seen.shape[1] > 1:
        size = program.num_heads // program.num_kv_heads
        seen = seen[:, [h * size + i for h in kv_heads for i in range(size)]]
    return seen
