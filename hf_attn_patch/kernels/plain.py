"""Unedited softmax attention: the fast ways of the torch executor on a CPU, and when they apply.

Rows of the batch with the same padding are cut out and run as shorter, unpadded rows (rules speak of positions from
the first real token, so a layout does not know about padding).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call.program import Program
from ..call.rules import ChosenCells, ColumnsDiagonals, Rule
from .buckets import attend_plan
from .chosen import run_chosen
from .chosen_cells import run_cells
from .columns_diagonals import run_columns_diagonals
from .kept import kept
from .layout import KEPT, BlockLayout, layout_for
from .plan import cost, plan_of
from .row_blocks import run_rows, sdpa

FEW_ROWS = 32  # below this many queries a layout is not worth it


def run_plain(program: Program) -> Tensor:
    """softmax(scale q k^T) v over the keys that mask and rule allow, [B, H, L, Dv]."""
    mask = program.mask
    if (
        torch.compiler.is_compiling()
    ):  # which keys rows read is a constant; buckets and gathers cannot be traced
        return run_rows(program)
    if program.rule is not None and program.rule.dynamic:
        runs = {ColumnsDiagonals: run_columns_diagonals, ChosenCells: run_cells}
        return runs.get(type(program.rule), run_chosen)(program)
    if not mask.arithmetic or mask.kv_offset or program.dropout or program.query.device.type != "cpu":
        return run_rows(program)
    spans = mask.real_spans
    if spans is None or program.q_len < FEW_ROWS:
        return run_rows(program)
    query, key, value = program.query, program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    if len(set(spans)) == 1:
        return _span(program, query, key, value, list(range(len(spans))), *spans[0])
    outputs: list[Tensor | None] = [None] * program.batch
    for span in dict.fromkeys(spans):
        items = [i for i, other in enumerate(spans) if other == span]
        part = _span(program, query[items], key[items], value[items], items, *span)
        for i, out in zip(items, part):
            outputs[i] = out
    return torch.stack(outputs)  # type: ignore[arg-type]


def _span(
    program: Program, query: Tensor, key: Tensor, value: Tensor, items: list[int], first: int, end: int
) -> Tensor:
    """Attention of batch items whose real keys are the columns [first, end)."""
    mask, rule = program.mask, program.rule
    L = mask.q_len
    if end == first:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    before = min(max(first - mask.q_offset, 0), L)  # queries that are left padding
    if not mask.causal and rule is None and mask.window is None:
        before = 0  # they see what everybody sees
    parts = []
    if before and mask.causal:
        parts.append(query.new_zeros(*query.shape[:2], before, value.shape[3]))
    elif before:
        parts.append(run_rows(_items(program, items), torch.arange(before)))
    if before < L:
        key, value = key[:, :, first:end], value[:, :, first:end]
        offset = max(mask.q_offset - first, 0)
        parts.append(
            attend(query[:, :, before:], key, value, rule, offset, mask.causal, mask.window, program.scale)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _items(program: Program, items: list[int]) -> Program:
    """The program of some rows of the batch."""
    mask = program.mask
    padding = None if mask.padding is None else mask.padding.expand(mask.batch, -1)[items]
    scale = program.query_scale
    return replace(
        program,
        query=program.query[items],
        key=program.key[items],
        value=program.value[items],
        mask=replace(mask, batch=len(items), padding=padding, arguments={}, _native={}),
        query_scale=scale[items] if scale is not None and scale.ndim == 4 and scale.shape[0] > 1 else scale,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule | None,
    q_offset: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of unpadded rows; query 0 has position `q_offset`, key 0 has position 0."""
    L, S = query.shape[2], key.shape[2]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not causal or q_offset >= S - 1:
            return sdpa(q, k, v, None, scale)
        if q_offset == 0:
            return sdpa(q, k, v, None, scale, causal=True)
        return attend_plan(q, k, v, plan_of(layout_for(None, L, S, q_offset, True, None, 256)), scale, None)

    if rule is None and (window is None or window >= q_offset + L):
        return whole(query, key, value)
    layout = best_layout(rule, L, S, q_offset, causal, window)
    return attend_plan(query, key, value, plan_of(layout), scale, whole)


@kept(KEPT)
def best_layout(
    rule: Rule | None, L: int, S: int, q_offset: int, causal: bool, window: int | None
) -> BlockLayout:
    """The layout of a rule with the block size that suits this executor.

    Fewer query rows per block waste fewer keys at the edges of a window, more rows make better products: 64 rows win
    up to about 1024 keys per query (see benchmarks/README.md).
    """
    if rule is not None and L == S == rule.required_len() and rule.token_order(64) is not None:
        layouts = [layout_for(rule, L, S, q_offset, causal, window, b, b) for b in (64, 128, 256)]
        return min(layouts, key=lambda layout: cost(plan_of(layout)))
    layout = layout_for(rule, L, S, q_offset, causal, window, 64, 64)
    if layout.visible_count() <= 1024 * L * layout.heads:
        return layout
    return layout_for(rule, L, S, q_offset, causal, window, 128, 64)
