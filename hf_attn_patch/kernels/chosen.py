"""Blocks of keys that were chosen for a call (`rules.ChosenBlocks`), the torch way: gather and attend, run by run.

A run reads, per head, the union of the blocks that its rows chose, so the work follows the choice as far as
neighbouring rows agree. Memory is O(rows of a run x keys gathered); differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.program import Program
from ..call.rules import ChosenBlocks
from .row_blocks import run_rows, sdpa

ROWS = 64
MOST = 0.7  # a union of more than this share of the keys is not worth the gather


def run_chosen(program: Program) -> Tensor:
    """softmax(scale q k^T) v over the chosen keys that the mask allows, [B, H, L, Dv]."""
    rule, mask = program.rule, program.mask
    if not isinstance(rule, ChosenBlocks) or not mask.arithmetic or program.dropout or program.q_len == 1:
        return run_rows(program)
    query = program.query
    if program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    outputs = []
    for run in torch.arange(program.q_len, device=query.device).split(ROWS):
        part = _gathered(program, rule, query[:, :, run], run)
        outputs.append(run_rows(program, run) if part is None else part)
    return torch.cat(outputs, 2)


def _gathered(program: Program, rule: ChosenBlocks, query: Tensor, run: Tensor) -> Tensor | None:
    """Output of a run of rows over the union of their blocks; None if that is most of the keys anyway."""
    mask, device = program.mask, query.device
    assert isinstance(program.key, Tensor) and isinstance(program.value, Tensor)
    B, H, L, _ = query.shape
    heads, S, start = rule.heads, mask.kv_len, mask.start.to(device)
    columns = run + mask.q_offset
    position = columns[None, :] - start[:, None]  # [B, L]
    row = (position - rule.origin.reshape(-1, 1)).div(rule.block_q, rounding_mode="floor")
    batch = torch.arange(rule.chosen.shape[0], device=device)
    row = row.clamp(0, rule.chosen.shape[2] - 1)
    chosen = (
        rule.chosen[batch[:, None], :, row].transpose(1, 2).expand(B, -1, -1, -1)
    )  # [B, heads, L, blocks]
    union = chosen.any(2)
    most = int(union.sum(-1).max())
    seen = min(int(columns[-1]) + 1 - mask.kv_offset, S) if mask.causal else S
    if most * rule.block_k > MOST * seen:
        return None
    if most == 0:
        return query.new_zeros(B, H, L, program.value.shape[3])
    there, block = union.to(torch.int8).sort(dim=-1, descending=True, stable=True)
    there, block = there[..., :most].bool(), block[..., :most]
    key_position = block[..., None] * rule.block_k + torch.arange(rule.block_k, device=device)
    column = (key_position + start[:, None, None, None]).flatten(2)  # [B, heads, K]
    index = column - mask.kv_offset
    inside = (index >= 0) & (index < S) & there.repeat_interleave(rule.block_k, -1)
    index = index.clamp(0, S - 1)
    allowed = torch.gather(chosen, 3, block[:, :, None, :].expand(-1, -1, L, -1))
    allowed = allowed.repeat_interleave(rule.block_k, -1) & inside[:, :, None, :]
    if mask.causal:
        allowed = allowed & (column[:, :, None, :] <= columns[:, None])
    if mask.window is not None:
        allowed = allowed & (column[:, :, None, :] > columns[:, None] - mask.window)
    if mask.has_padding:
        assert mask.padding is not None
        real = mask.padding.expand(B, -1)[:, None].expand(-1, heads, -1)
        allowed = allowed & torch.gather(real, 2, column.clamp(0, real.shape[2] - 1))[:, :, None, :]
    per_head = lambda x: x.repeat_interleave(H // x.shape[1], 1)
    index = per_head(index)
    kv_head = torch.arange(H, device=device)[None, :, None] // (H // program.num_kv_heads)
    item = torch.arange(B, device=device)[:, None, None]
    key, value = program.key[item, kv_head, index], program.value[item, kv_head, index]
    allowed = per_head(allowed)
    dead = ~allowed.any(-1, keepdim=True)
    return sdpa(query, key, value, allowed | dead, program.scale).masked_fill(dead, 0.0)
