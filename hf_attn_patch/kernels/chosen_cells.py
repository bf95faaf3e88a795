"""Cells of a token grid that were chosen for a call (`rules_dynamic.ChosenCells`), the torch way: gather and attend.

A run of queries (a query cell; where every query chooses for itself, the queries of one key cell) reads, per head, the
union of the cells that its rows chose. Runs go in batches of bounded memory; differentiable.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.program import Program
from ..call.rules import ChosenCells
from .row_blocks import rows_of_run, run_rows, sdpa

ELEMENTS = 1 << 22  # gathered elements of keys of one batch of runs
ROWS = 64  # rows of a run where nothing is gathered
MOST = 0.7  # a union of more than this share of the keys is not worth the gather


def members(cell: Tensor, cells: int) -> Tensor:
    """Tokens of each cell in rising order, int64 [cells, size of the largest]; -1 = none."""
    count = torch.bincount(cell, minlength=cells)
    order = cell.argsort(stable=True)
    first = count.cumsum(0) - count
    table = cell.new_full((cells, int(count.max())), -1)
    table[cell[order], torch.arange(len(cell), device=cell.device) - first[cell[order]]] = order
    return table


def cell_means(x: Tensor, cell: Tensor) -> Tensor:
    """Mean over the tokens of each cell, no gradient: [B, H, N, D], int64 [N] -> fp32 (or fp64) [B, H, cells, D]."""
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    sums = wide.new_zeros(*wide.shape[:2], int(cell.max()) + 1, wide.shape[3]).index_add(2, cell, wide)
    return sums / torch.bincount(cell)[:, None]


def run_cells(program: Program) -> Tensor:
    """softmax(scale q k^T) v over the chosen cells and the prefix, [B, H, L, Dv]."""
    rule, mask = program.rule, program.mask
    plain = isinstance(rule, ChosenCells) and not (mask.restricts or mask.kv_offset or program.dropout)
    if not plain or program.q_len != program.mask.kv_len:
        return run_rows(program)
    assert isinstance(rule, ChosenCells)
    parts = rule.alike()
    if len(parts) > 1:
        out = [run_cells(_heads(program, on, part)) for on, part in parts]
        size = program.num_heads // rule.heads
        order = torch.tensor([h * size + i for on, _ in parts for h in on for i in range(size)])
        return torch.cat(out, 1)[:, order.argsort().to(program.query.device)]
    rule = parts[0][1]
    return _run(program, rule)


def _heads(program: Program, on: list[int], rule: ChosenCells) -> Program:
    """The program of some layout heads, with a KV head for each of their query heads."""
    size, device = program.num_heads // len(program.rule.chosen[0]), program.query.device  # type: ignore[union-attr]
    heads = torch.tensor([h * size + i for h in on for i in range(size)], device=device)
    kv = heads * program.num_kv_heads // program.num_heads
    scale = program.query_scale
    return replace(
        program, query=program.query[:, heads], key=program.key[:, kv], value=program.value[:, kv], rules=[rule],
        query_scale=scale[:, heads] if scale is not None and scale.ndim == 4 and scale.shape[1] > 1 else scale,
    )  # fmt: skip


def _run(program: Program, rule: ChosenCells) -> Tensor:
    """Output of a program with one cut of the grid for all heads."""
    prefix, device = rule.prefix, program.query.device
    keys = members(rule.k_cell, rule.chosen.shape[3])
    alone = rule.chosen.shape[2] == rule.tokens  # every query is a cell of its own
    single = alone and keys.shape[1] == 1  # single keys for single queries: a gather costs more than it saves
    if single:
        runs = members(torch.arange(rule.tokens, device=device) // ROWS, -(-rule.tokens // ROWS))
    else:
        runs = keys if alone else members(rule.q_cell, rule.chosen.shape[2])
        runs = runs[(runs >= 0).any(1)]
    if program.query_scale is not None:
        query = (program.query * program.query_scale).to(program.query.dtype)
        program = replace(program, query=query, query_scale=None)
    # elements that a run gathers if its rows agree: a batch has as many runs as fit then
    usual = max(1, round(float(rule.chosen.double().mean()) * keys.numel()) + prefix)
    size = max(1, ELEMENTS // (program.batch * program.num_heads * program.query.shape[3] * usual))
    outputs = []
    for batch in runs.split(size):
        part = None if single else _gathered(program, rule, keys, batch, alone)
        outputs.append(_masked(program, rule, batch.flatten()) if part is None else part)
    slots = torch.empty(rule.tokens, dtype=torch.long, device=device)
    at = (runs.flatten() >= 0).nonzero()[:, 0]
    slots[runs.flatten()[at]] = at
    out = torch.cat(outputs, 2)[:, :, slots]
    if not prefix:
        return out
    return torch.cat([run_rows(program, torch.arange(prefix, device=device)), out], 2)


def _masked(program: Program, rule: ChosenCells, tokens: Tensor) -> Tensor:
    """Output [B, H, n, Dv] of some tokens of the grid (-1 = a row nobody wants) over all keys, under a mask."""
    assert isinstance(program.key, Tensor) and isinstance(program.value, Tensor)
    heads = program.num_heads // rule.heads
    in_order = rule.tokens == rule.chosen.shape[3] and torch.equal(rule.k_cell, rule.k_cell.sort().values)
    outputs = []
    per_row = program.batch * program.num_heads * program.key.shape[2]
    size = rows_of_run(tokens.device, per_row, program.query.element_size(), False)
    for part in tokens.clamp(min=0).split(size):
        allowed = rule.chosen[:, :, rule.q_cell[part]]
        allowed = allowed if in_order else allowed.index_select(3, rule.k_cell)
        allowed = F.pad(allowed, (rule.prefix, 0), value=True)
        dead = ~allowed.any(-1, keepdim=True)  # a row that reads nothing reads all here and is zeroed
        seen, dead = ((x.repeat_interleave(heads, 1)) for x in (allowed | dead, dead))
        out = sdpa(program.query[:, :, rule.prefix + part], program.key, program.value, seen, program.scale)
        outputs.append(out.masked_fill(dead, 0.0))
    return torch.cat(outputs, 2)


def _gathered(program: Program, rule: ChosenCells, keys: Tensor, runs: Tensor, alone: bool) -> Tensor | None:
    """Output [B, H, runs * m, Dv] of some runs over the union of their cells; None if that is most of the keys."""
    assert isinstance(program.key, Tensor) and isinstance(program.value, Tensor)
    B, H, prefix, device = program.batch, program.num_heads, rule.prefix, program.query.device
    rows = rule.q_cell[runs.clamp(min=0)]  # [runs, m]
    if alone:
        chosen = rule.chosen[:, :, rows] & (runs >= 0)[..., None]  # [B|1, heads, runs, m, cells]
    else:
        chosen = rule.chosen[:, :, rows[:, 0]].unsqueeze(3)  # all rows of a run alike
    union = chosen.any(3)
    most = int(union.sum(-1).max())
    if most * keys.shape[1] > MOST * rule.tokens:
        return None
    there, cell = union.to(torch.int8).sort(dim=-1, descending=True, stable=True)
    there, cell = there[..., :most].bool(), cell[..., :most]  # [B|1, heads, runs, most]
    token = keys[cell].flatten(3)  # [B|1, heads, runs, most * n]
    allowed = ((token >= 0) & there.repeat_interleave(keys.shape[1], 3)).unsqueeze(3)
    if alone:
        index = cell.unsqueeze(3).expand(*chosen.shape[:4], most)
        allowed = allowed & torch.gather(chosen, 4, index).repeat_interleave(keys.shape[1], -1)
    allowed = F.pad(allowed, (prefix, 0), value=True)
    first = torch.arange(prefix, device=device).expand(*token.shape[:3], prefix)
    token = torch.cat([first, prefix + token.clamp(min=0)], 3).repeat_interleave(H // rule.heads, 1)
    head = torch.arange(H, device=device) * program.num_kv_heads // H
    whose = torch.arange(B, device=device)[:, None] * program.num_kv_heads + head  # [B, H]
    token = (token + (whose * program.key.shape[2])[..., None, None]).flatten(1, 2)  # [B, H * runs, K]

    def take(x: Tensor) -> Tensor:
        return x.flatten(0, 2).index_select(0, token.flatten()).unflatten(0, tuple(token.shape))

    query = program.query[:, :, prefix + runs.clamp(min=0)].flatten(1, 2)  # [B, H * runs, m, D]
    seen, dead = None, None
    if not bool(allowed.all()):
        dead = ~allowed.any(-1, keepdim=True)
        per_head = lambda x: x.repeat_interleave(H // rule.heads, 1).flatten(1, 2)
        seen, dead = per_head(allowed | dead), per_head(dead)
    out = sdpa(query, take(program.key), take(program.value), seen, program.scale)
    out = out if dead is None else out.masked_fill(dead, 0.0)
    return out.unflatten(1, (H, -1)).flatten(2, 3)
