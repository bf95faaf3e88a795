"""Any `Program`, a run of query rows at a time: each run reads only the keys that mask and rule can let it see.

This is the general path of the torch executor: padding with holes, opaque and given masks, edited scores and
masses, per-KV-head caches, decoding. It needs memory O(rows of a run x keys read), and it is differentiable.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.program import Program
from ..call.rules import Everything
from . import reference
from .tracing import known, merged, ranges_of

# Scores (or mask elements) of one run; on a CPU as many as its caches like.
ELEMENTS, ELEMENTS_CPU = 1 << 25, 1 << 21
# Rows that a run has all the same if memory allows: each run reads all K and V, and costs a dozen calls. Edited scores
# of a large batch are fastest around 8 rows on a CPU (16 x 32 heads x 4096 keys: 1 row 1.8 s, 8 1.45 s, 64 1.7 s).
FEW, FEW_EDITED_CPU, MANY = 64, 8, 256
COPIES = 6  # tensors of the size of the scores that are alive at once
SHARE = 0.25  # of the free memory
UNKNOWN_MEMORY = 1 << 30


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` on its flash path also where the value width differs from the key width.

    query [N, H, L, D], key [N, Hkv, S, D], value [N, Hkv, S, Dv] -> [N, H, L, Dv].
    """
    wide = value.shape[3] - key.shape[3]
    if wide > 0:  # zeros add nothing to q . k
        query, key = F.pad(query, (0, wide)), F.pad(key, (0, wide))
    elif wide < 0:
        value = F.pad(value, (0, -wide))
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[..., :wide] if wide < 0 else out


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can be had now, as far as it tells (what torch holds and does not use counts)."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not every system tells
            pass
    return UNKNOWN_MEMORY


def rows_of_run(device: torch.device, per_row: int, itemsize: int, edited: bool) -> int:
    """Query rows that are worked on at once, if one takes `per_row` scores of `itemsize` bytes.

    Their number does not depend on the batch unless memory is short: a step per token would cost more than it saves.
    """
    size = (ELEMENTS_CPU if device.type == "cpu" else ELEMENTS) // max(per_row, 1)
    few = FEW_EDITED_CPU if edited and device.type == "cpu" else FEW
    if size < few:  # only then is it worth asking
        size = min(few, int(SHARE * free_bytes(device)) // (per_row * itemsize * COPIES))
    return max(1, min(MANY, size))


def runs_of_rows(program: Program, rows: Tensor, edited: bool) -> list[Tensor]:
    """Split row numbers into runs that are worked on at once (all of them, while torch.compile traces)."""
    heads = program.num_heads if edited or program.dropout else program.num_heads // program.num_kv_heads
    per_row = program.batch * heads * max(program.key.shape[2], 1)
    if rows.numel() == 1:  # a decoded token asks nobody
        return [rows]
    return list(rows.split(rows_of_run(program.query.device, per_row, program.query.element_size(), edited)))


def key_runs(program: Program, runs: list[Tensor]) -> list[list[tuple[int, int]]]:
    """Per run of rows the key indices it may see, as sorted disjoint ranges [lo, hi)."""
    mask, rule = program.mask, program.rule
    S = mask.kv_len
    if torch.compiler.is_compiling():
        return _traced_key_runs(program, [run.numel() for run in runs])
    if rule is None:  # plain numbers: this is a decoded token's whole share of work here
        end = mask.kv_offset + S
        found = []
        for run in runs:
            top, bottom = int(run[0]) + mask.q_offset, int(run[-1]) + mask.q_offset + 1
            left = max(0 if mask.window is None else top - mask.window + 1, mask.kv_offset)
            right = min(bottom, end) if mask.causal else end
            found.append([(left - mask.kv_offset, right - mask.kv_offset)])
        return found
    first = torch.tensor([int(r[0]) for r in runs]) + mask.q_offset
    last = torch.tensor([int(r[-1]) for r in runs]) + mask.q_offset + 1
    end = mask.kv_offset + S
    if mask.holes:  # positions are not columns less a constant: every key the mask shows is looked at
        rule, starts = Everything(), [0]
    else:
        starts = list(set(mask.starts))
    found = merged(rule, starts, first, last, end, mask.causal, mask.window, mask.kv_offset)
    return [[(a - mask.kv_offset, b - mask.kv_offset) for a, b in ranges] for ranges in found]


def _traced_key_runs(program: Program, sizes: list[int]) -> list[list[tuple[int, int]]]:
    """`key_runs` of all rows, in runs of `sizes`, while torch.compile traces: from shapes and rules only."""
    mask, rule = program.mask, program.rule
    everything = [(0, mask.kv_len)]
    if not known(mask.q_offset) or (rule is None and not mask.causal and mask.window is None):
        return [everything] * len(sizes)
    runs, top = [], int(mask.q_offset)
    for size in sizes:
        runs.append((top, top + int(size)))
        top += int(size)
    if rule is None or rule.dynamic or mask.padding is not None:  # where positions begin is in a tensor
        rule = Everything()
    left = int(mask.kv_offset)
    found = ranges_of(rule, tuple(runs), left + int(mask.kv_len), mask.causal, mask.window, left)
    return [[(a - left, b - left) for a, b in ranges] for ranges in found]


def take(x: Any, ranges: list[tuple[int, int]], dim: int = 2) -> Tensor:
    """Concatenated slices of a tensor (a view if there is only one)."""
    parts = [x.narrow(dim, a, b - a) for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def plain(
    program: Program,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    rows: Tensor,
    cols: Tensor,
    heads: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + given bias) v over allowed keys for a run of rows; arguments as `reference.attend`."""
    B, H, L, _ = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(B, kv_heads, H // kv_heads * L, -1)
    bias = program.mask.bias(rows, cols)
    if bias is not None and heads is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    dead = None
    tracing = torch.compiler.is_compiling()
    if query.device.type == "cpu" and bias is None and not tracing and bool(allowed.all()):
        mask = None
    else:
        # a row that may see nothing sees everything here and is zeroed below: no NaN, also not in gradients
        dead = ~allowed.any(-1, keepdim=True)
        mask = allowed | dead
        if bias is not None:
            mask = torch.zeros_like(bias).masked_fill(~mask, float("-inf")) + bias
            mask = mask.to(query.dtype)
        if mask.shape[1] == 1:
            mask = mask.expand(-1, H // kv_heads, -1, -1).reshape(mask.shape[0], 1, -1, mask.shape[3])
        else:
            mask = mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[3])
    out = sdpa(packed, key, value, mask, program.scale, program.dropout).reshape(B, H, L, -1)
    return out if dead is None else out.masked_fill(dead, 0.0)


def run_rows(program: Program, rows: Tensor | None = None, edited: bool = False) -> Tensor:
    """Attention output, before blend and gate, of rows of a program.

    Args:
        rows: int64 [n] sorted row numbers, default all. edited: apply score and mass edits, soft cap, sinks and
            position bias (else the caller knows that these rows have none).

    Returns:
        [B, H, n, Dv].
    """
    device = program.query.device
    rows = torch.arange(program.q_len, device=device) if rows is None else rows
    runs = runs_of_rows(program, rows, edited)
    outputs = []
    query = program.query
    if not edited and program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    everything = len(runs) == 1 and rows.numel() == program.q_len
    for run, ranges in zip(runs, key_runs(program, runs)):
        q = query if everything else query[:, :, run]
        if not ranges:
            outputs.append(q.new_zeros(*q.shape[:3], program.value.shape[3]))
            continue
        key, value = take(program.key, ranges), take(program.value, ranges)
        cols = take(program.mask.key_columns, ranges, 0)
        columns = run + program.mask.q_offset
        allowed = reference.visible(program, columns, cols)
        # on a CPU a NaN in the output is noticed (`hidden_keys`), unless torch.compile traces
        if torch.compiler.is_compiling() or (q.device.type != "cpu" and run.numel() > 1):
            key, value = reference.readable(program, allowed, key, value)
        if edited:
            out, _ = reference.attend(program, q, key, value, allowed, columns, cols, row_index=run)
        else:
            out = plain(program, q, key, value, allowed, columns, cols)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def mean_values(program: Program) -> Tensor:
    """Mean of the values each query may see, [B, H, L, Dv]."""
    H, kv_heads = program.num_heads, program.num_kv_heads
    runs = runs_of_rows(program, torch.arange(program.q_len, device=program.query.device), True)
    means = []
    for run, ranges in zip(runs, key_runs(program, runs)):
        ranges = ranges or [(0, 1)]
        value, cols = take(program.value, ranges), take(program.mask.key_columns, ranges, 0)
        allowed = reference.visible(program, run + program.mask.q_offset, cols).to(value.dtype)
        share = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        if share.shape[1] == 1:
            mean = reference.per_query_head(share @ value, H)
        else:
            mean = share.reshape(len(share), kv_heads, -1, share.shape[3]) @ value
        means.append(mean.reshape(program.batch, H, run.numel(), -1))
    return torch.cat(means, 2)


def run_ragged(program: Program, edited: bool) -> Tensor:
    """Output [B, H, L, Dv] over a cache that keeps a different span per KV head, group by group."""
    query, mask = program.query, program.mask
    if not edited and program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    size = program.num_heads // program.num_kv_heads
    pieces: dict[int, Tensor] = {}
    for group in program.key.groups:  # type: ignore[union-attr]
        numbers = [g * size + i for g in group.heads for i in range(size)]
        heads = torch.tensor(numbers, device=query.device)
        per_row = max(1, program.batch * len(numbers) * group.key.shape[2])
        step = 1 if program.q_len == 1 else rows_of_run(query.device, per_row, query.element_size(), edited)
        outputs = []
        for run in torch.arange(program.q_len, device=query.device).split(step):
            columns = run + mask.q_offset
            allowed = reference.visible(program, columns, group.columns)
            allowed = allowed[:, heads] if allowed.shape[1] > 1 else allowed
            q = query[:, heads][:, :, run]
            if edited:
                out, _ = reference.attend(
                    program,
                    q,
                    group.key,
                    group.value,
                    allowed,
                    columns,
                    group.columns,
                    row_index=run,
                    heads=heads,
                )
            else:
                out = plain(program, q, group.key, group.value, allowed, columns, group.columns, heads)
            outputs.append(out)
        for head, out in zip(numbers, torch.cat(outputs, 2).unbind(1)):
            pieces[head] = out
    return torch.stack([pieces[head] for head in range(program.num_heads)], 1)
