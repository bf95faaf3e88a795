"""From a `Program`'s mask and rules to what the layout kernels read: one `BlockLayout`, and the padding of each row.

Rules speak of positions from the first real token, so a left-padded row is a shorter row: rows that start at the
same position share one layout, others get their own, stacked into one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...call.mask import Mask
from ...call.program import Program
from ...call.rules import ChosenBlocks, ChosenCells, ColumnsDiagonals, Rule
from ..kept import kept
from ..layout import KEPT, BlockLayout
from ..layout import layout_for as cached_layout
from ..tracing import described, known, rebuilt
from .layout_attention import Padding


def layout_for(rule: Rule | None, *shape: Any) -> BlockLayout:
    """`kernels.layout.layout_for`; a constant where torch.compile traces, since a layout depends on shapes only."""
    if torch.compiler.is_compiling():
        return _traced_layout(described(rule), *shape)
    return cached_layout(rule, *shape)


@torch.compiler.assume_constant_result
def _traced_layout(rule: Any, *shape: Any) -> BlockLayout:
    return cached_layout(rebuilt(rule), *shape)


@dataclass(frozen=True)
class Row:
    """One row of a batch as a layout sees it: queries, keys, position of the first query."""

    q_len: int
    kv_len: int
    q_offset: int


def why_not(program: Program) -> str | None:
    """Reason mask and rules of `program` cannot become a layout, or None."""
    mask, rule = program.mask, program.rule
    if not known(mask.q_offset):
        return "the length of a static cache is not known while torch.compile traces"
    if not mask.arithmetic:
        hint = ""
        if torch.compiler.is_compiling():
            hint = " (while torch.compile traces, transformers adds a rule for packed sequences to every call that has "
            hint += "neither attention_mask nor cache: pass attention_mask)"
        return (
            "the model brought a mask of its own (a tensor or a custom rule), which is no arithmetic of positions"
            + hint
        )
    if rule is not None and rule.dynamic:
        if isinstance(rule, ColumnsDiagonals):
            return (
                "columns and diagonals were chosen for this call, and a layout of blocks would read far more"
            )
        if isinstance(rule, ChosenCells):
            return (
                "cells of a token grid were chosen for this call; kernels take blocks of consecutive tokens"
            )
        if not isinstance(rule, ChosenBlocks):
            return "blocks chosen for this call, combined with another rule or on some heads only"
        if rule.block_q % 32 or rule.block_k % 32:
            return (
                f"blocks of {rule.block_q} x {rule.block_k} tokens were chosen; kernels need multiples of 32"
            )
    if torch.compiler.is_compiling() and mask.padding is not None:
        simple = mask.causal and mask.q_offset == mask.kv_offset == 0 and mask.q_len == mask.kv_len
        return (
            None
            if simple
            else "padding while torch.compile traces, other than in a causal forward without a cache"
        )
    spans = mask.real_spans
    if spans is None:
        return "the padding has holes inside a row"
    if rule is not None and mask.kv_offset:
        return "rules over a sliding cache that dropped its first keys"
    left = any(first > mask.kv_offset for first, _ in spans)
    if left and not mask.causal and (rule is not None or mask.window is not None):
        return "left padding of a bidirectional model under a rule or window"
    if mask.has_padding and rule is not None and rule.required_len() is not None:
        return "padding under a rule that is tied to a grid"
    if mask.causal and mask.q_offset < mask.kv_offset:
        return "queries before the first key of the cache"
    return None


def resolve(program: Program, block_q: int, block_k: int) -> tuple[BlockLayout, Padding]:
    """Layout and padding of a program that `why_not` accepts."""
    mask = program.mask
    if torch.compiler.is_compiling() and mask.padding is not None:
        return _traced(program, block_q, block_k)
    spans = mask.real_spans
    assert spans is not None
    L, offset = mask.q_len, mask.q_offset - mask.kv_offset
    rows, query_first, key_first, key_length = [], [], [], []
    for first, end in spans:
        first, end = first - mask.kv_offset, end - mask.kv_offset
        before = min(max(first - offset, 0), L) if mask.causal else 0
        rows.append(Row(L - before, end - first, max(offset - first, 0) if mask.causal else offset))
        query_first.append(before)
        key_first.append(first)
        key_length.append(end - first)
    shared = _shared(rows)
    device = program.query.device
    window = mask.window
    if isinstance(program.rule, ChosenBlocks):
        layout = _chosen_layout(program.rule, shared, mask, block_q, block_k)
    elif len(set(shared)) == 1:
        row = shared[0]
        shape = (row.q_len, row.kv_len, row.q_offset, mask.causal, window, block_q, block_k, device)
        layout = layout_for(program.rule, *shape)
    else:
        layout = stacked(program.rule, tuple(shared), mask.causal, window, block_q, block_k, device)
    # a key behind the end of a row must be checked for, unless no query of the row is late enough to see it
    exposed = any(
        row.kv_len < wide.kv_len and (not mask.causal or row.q_offset + row.q_len > row.kv_len)
        for row, wide in zip(rows, shared)
    )
    # keys behind the end of a row are in memory, share its last tile and may hold NaN: they must not be loaded
    exposed = exposed or any(end - mask.kv_offset < mask.kv_len for _, end in spans)

    def numbers(values: list[int], needed: bool) -> Tensor | None:
        return on_device(mask, values, device) if needed else None

    return layout, Padding(
        numbers(query_first, any(query_first)),
        numbers(key_first, any(key_first)),
        numbers(key_length, exposed),
    )


def _chosen_layout(
    rule: ChosenBlocks, rows: list[Row], mask: Mask, block_q: int, block_k: int
) -> BlockLayout:
    """Layout of blocks that were chosen for this call, in kernel blocks of which each lies within one chosen block."""
    block_q, block_k = math.gcd(block_q, rule.block_q), math.gcd(block_k, rule.block_k)
    layouts = []
    for item, row in enumerate(rows):
        chosen = rule.chosen[min(item, rule.chosen.shape[0] - 1)]
        m = torch.arange(-(-row.q_len // block_q), device=chosen.device) * block_q // rule.block_q
        n = torch.arange(-(-row.kv_len // block_k), device=chosen.device) * block_k // rule.block_k
        blocks = chosen[:, m.clamp(max=chosen.shape[1] - 1)][:, :, n.clamp(max=chosen.shape[2] - 1)]
        shape = (row.q_len, row.kv_len, row.q_offset, mask.causal, mask.window, block_q, block_k)
        layouts.append(BlockLayout.from_block_mask(blocks, *shape))
    return layouts[0] if len(layouts) == 1 else joined(layouts)


def _traced(program: Program, block_q: int, block_k: int) -> tuple[BlockLayout, Padding]:
    """`resolve` for a padded causal prefill whose padding is not known while torch.compile traces: facts stay tensors,
    and that no row has holes is asserted on the device."""
    mask, L = program.mask, program.mask.q_len
    assert mask.padding is not None
    real = mask.padding[:, :L].expand(mask.batch, -1).bool()
    first, count = real.to(torch.int8).argmax(-1), real.sum(-1)
    columns = torch.arange(L, device=real.device)
    solid = (columns >= first[:, None]) & (columns < (first + count)[:, None])
    torch._assert_async((solid == real).all(), "padding with holes inside a row, under torch.compile")
    layout = layout_for(program.rule, L, L, 0, True, mask.window, block_q, block_k, program.query.device)
    first, count = first.int(), count.int()
    return layout, Padding(first, first, count)


def on_device(mask: Mask, values: list[int], device: torch.device) -> Tensor:
    """int32 tensor of facts about a mask, made once per forward: the layers share their mask."""
    key = f"triton {values} {device}"
    if key not in mask._native:
        mask._native[key] = torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
    return mask._native[key]


def ends_of_rows(mask: Mask, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(first real column, column after the last) of each row, int32 [B] each; None where every key is real."""
    assert mask.real_spans is not None
    whole = (mask.kv_offset, mask.kv_offset + mask.kv_len)
    if all(span == whole for span in mask.real_spans):
        return None, None
    starts, ends = zip(*mask.real_spans)
    return on_device(mask, list(starts), device), on_device(mask, list(ends), device)


def _shared(rows: list[Row]) -> list[Row]:
    """Per row the (larger) row whose layout it can use: those that start at the same position share one."""
    widest: dict[int, Row] = {}
    for row in rows:
        known = widest.get(row.q_offset, row)
        widest[row.q_offset] = Row(max(row.q_len, known.q_len), max(row.kv_len, known.kv_len), row.q_offset)
    return [widest[row.q_offset] for row in rows]


@kept(KEPT)
def stacked(
    rule: Rule | None, rows: tuple[Row, ...], causal: bool, window: int | None, block_q: int, block_k: int,
    device: torch.device,
) -> BlockLayout:  # fmt: skip
    """One layout with batch = len(rows) from the layouts of the rows."""
    shapes = [(r.q_len, r.kv_len, r.q_offset, causal, window, block_q, block_k, device) for r in rows]
    return joined([layout_for(rule, *shape) for shape in shapes])


def joined(parts: list[BlockLayout]) -> BlockLayout:
    """Layouts of one batch item each as the items of one layout."""
    device = parts[0].device
    longest = max(parts, key=lambda part: part.q_blocks)
    pointers, full, index, tile, bits = [torch.zeros(1, dtype=torch.int32, device=device)], [], [], [], []
    entries = tiles = 0
    for part in parts:
        # a shorter row has empty block rows at the end of each head
        missing = longest.q_blocks - part.q_blocks
        counts = part.row_ptr.diff().reshape(part.heads, part.q_blocks)
        counts = torch.nn.functional.pad(counts, (0, missing)).reshape(-1)
        pointers.append((counts.cumsum(0) + entries).int())
        full.append(
            torch.nn.functional.pad(part.full_count.reshape(part.heads, -1), (0, missing)).reshape(-1)
        )
        index.append(part.index)
        tile.append(torch.where(part.tile >= 0, part.tile + tiles, part.tile))
        bits.append(part.bits)
        entries, tiles = entries + part.entries, tiles + part.bits.shape[0]
    return replace(
        longest,
        batch=len(parts),
        q_len=max(part.q_len for part in parts),
        kv_len=max(part.kv_len for part in parts),
        row_ptr=torch.cat(pointers),
        full_count=torch.cat(full),
        index=torch.cat(index),
        tile=torch.cat(tile).int(),
        bits=torch.cat(bits),
        cached={},
    )
