"""Attention of the (head, token) pairs whose gate is open, for unedited softmax on a CPU: sparse head gates.

    o_i = softmax(scale q_i k^T over the keys i may see) v    where gate[b, i, h] != 0,    0 elsewhere

The open pairs of all query heads of one KV head form one list, ascending in position, and attend in runs: work follows
the share of open pairs, keys and values are read where they are, and a KV head that no pair needs is not read at all.
Every run has a part of its keys that all its rows see and a short masked end, merged by log-sum-exp: a mask over all
keys of a run would cost as much memory traffic as its scores. The backward pass keeps outputs and one number per row.
Heads that are open for every query run as plain attention, which is faster per pair (about 1.25x at L = 4096).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.program import Program
from .buckets import flash, flash_backward

ROWS = 256  # pairs per run
FEW_ROWS = 32  # with fewer queries than this only whole KV heads are worth leaving out, ...
FEW_KEYS = 4096  # ... and only from this many keys on (2 of 3 KV heads: 1.5x the time at 1024, 0.7x at 16384)
FEW_PAIRS = 1 << 20  # queries x keys below which gathering costs what it saves (benchmarked at 1024 x 1024)


def applies(program: Program) -> bool:
    """True if a program with unedited scores has closed pairs that can be left out here."""
    mask, gate = program.mask, program.head_gate
    if gate is None or not program.gate_is_sparse or program.rule is not None or program.ragged:
        return False
    if program.query.device.type != "cpu" or program.dropout or torch.compiler.is_compiling():
        return False
    if not mask.arithmetic or mask.kv_offset or not (mask.causal or not mask.has_padding):
        return False
    few = program.q_len < FEW_ROWS
    if mask.kv_len < FEW_KEYS if few else program.q_len * mask.kv_len < FEW_PAIRS:
        return False
    if mask.real_spans is None:
        return False
    opened = open_pairs(program)
    return not bool(opened.any(3).any(2).all() if few else opened.all())


def whole_heads(program: Program) -> list[int]:
    """Query heads that are open for every query: these are plain attention."""
    return (
        []
        if program.q_len < FEW_ROWS
        else open_pairs(program).all(2).all(0).flatten().nonzero()[:, 0].tolist()
    )


def open_pairs(program: Program) -> Tensor:
    """bool [B, Hkv, L, H / Hkv]: gates that are not 0."""
    gate = program.head_gate
    assert gate is not None
    gate = gate.reshape((1,) * (3 - gate.ndim) + tuple(gate.shape))
    opened = (gate != 0).expand(program.batch, program.q_len, program.num_heads)
    return opened.unflatten(2, (program.num_kv_heads, -1)).transpose(1, 2)


def run_open(program: Program, plain: Callable[[Program], Tensor]) -> Tensor:
    """Output [B, H, L, Dv] before the gate, 0 at closed pairs; `plain` runs heads that are open everywhere."""
    query, key, value = program.query, program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    B, H, L, _ = query.shape
    wide = value.shape[3] - key.shape[3]
    if wide > 0:  # the flash kernel wants one width; zeros add nothing to q . k
        query, key = F.pad(query, (0, wide)), F.pad(key, (0, wide))
    elif wide < 0:
        value = F.pad(value, (0, -wide))
    whole = whole_heads(program)
    runs = list(runs_of(program, set(whole)))
    out = query.new_zeros(B * H * L, value.shape[3])
    if runs:
        rows = torch.cat([run.rows for run in runs])
        part = _Attend.apply(
            query.reshape(B * H * L, -1).index_select(0, rows), key, value, runs, program.scale
        )
        out.index_copy_(0, rows, part)
    out = out.reshape(B, H, L, -1)
    out = out[..., :wide] if wide < 0 else out
    for kv, heads in _by_kv(whole, H // program.num_kv_heads).items():
        out[:, heads] = plain(_of_heads(program, kv, heads))
    return out


def _by_kv(heads: list[int], group: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for head in heads:
        found.setdefault(head // group, []).append(head)
    return found


def _of_heads(program: Program, kv: int, heads: list[int]) -> Program:
    """The program of some query heads of one KV head, without its gate."""
    scale = program.query_scale
    return replace(
        program,
        query=program.query[:, heads],
        key=program.key[:, kv : kv + 1],
        value=program.value[:, kv : kv + 1],
        query_scale=scale[:, heads]
        if scale is not None and scale.ndim == 4 and scale.shape[1] > 1
        else scale,
        head_gate=None,
        gate_is_sparse=False,
    )


@dataclass
class Run:
    """Pairs of one KV head of one item. rows: int64 [n] in [B * H * L]. pieces: (lo, hi, additive mask [n, hi - lo])"""

    item: int
    kv: int
    rows: Tensor
    pieces: list[tuple[int, int, Tensor | None]]

    def keys(self, x: Tensor, lo: int, hi: int) -> Tensor:
        return x[self.item : self.item + 1, self.kv : self.kv + 1, lo:hi]


def runs_of(program: Program, without: set[int]) -> Iterator[Run]:
    """The runs of a program, without those that see no key and those of the query heads `without`."""
    mask, L = program.mask, program.q_len
    opened = open_pairs(program)
    group = opened.shape[3]
    if without:
        kept = [[kv * group + i not in without for i in range(group)] for kv in range(opened.shape[1])]
        opened = opened & torch.tensor(kept)[:, None]
    assert mask.real_spans is not None
    for item, (first, end) in enumerate(mask.real_spans):
        for kv in range(opened.shape[1]):
            token, member = opened[item, kv].nonzero().unbind(1)
            if mask.causal:  # queries that are left padding see nothing
                real = token + mask.q_offset >= first
                token, member = token[real], member[real]
            if end == first or not token.numel():
                continue
            rows = ((item * opened.shape[1] + kv) * group + member) * L + token
            for part, columns in zip(rows.split(ROWS), (token + mask.q_offset).split(ROWS)):
                yield Run(item, kv, part, _pieces(program, columns, first, end))


def _pieces(program: Program, columns: Tensor, first: int, end: int) -> list[tuple[int, int, Tensor | None]]:
    """Stretches of the real keys [first, end) that queries at ascending `columns` see; every row sees some of each."""
    mask = program.mask
    if not mask.causal and mask.window is None:
        return [(first, end, None)]
    lo, hi, low = first, end, int(columns[0])
    if mask.window is not None:
        lo = max(first, low - mask.window + 1)
    if mask.causal:
        hi = min(end, int(columns[-1]) + 1)
    if mask.window is None or int(columns[-1]) - mask.window < lo:
        low = min(low, hi)
        if low >= hi - 1:
            return [(lo, hi, None)]
        pieces: list[tuple[int, int, Tensor | None]] = [(lo, low, None)] if low > lo else []
        return [*pieces, (low, hi, _additive(program, torch.arange(low, hi) <= columns[:, None]))]
    keys = torch.arange(lo, hi)
    allowed = keys > columns[:, None] - mask.window
    if mask.causal:
        allowed &= keys <= columns[:, None]
    return [(lo, hi, _additive(program, allowed))]


def _additive(program: Program, allowed: Tensor) -> Tensor:
    bias = torch.zeros(allowed.shape, dtype=program.query.dtype)
    return bias.masked_fill_(~allowed, float("-inf"))[None, None]


class _Attend(torch.autograd.Function):
    """[N, D] rows of all runs, one after the other -> [N, Dv]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, key: Tensor, value: Tensor, runs: list[Run], scale: float) -> Tensor:
        outs, sums = [], []
        for run, q in zip(runs, rows.split([r.rows.numel() for r in runs])):
            out = lse = None
            for lo, hi, bias in run.pieces:
                k, v = run.keys(key, lo, hi), run.keys(value, lo, hi)
                o, l = flash(q[None, None], k, v, 0.0, False, attn_mask=bias, scale=scale)
                if out is None or lse is None:
                    out, lse = o, l
                    continue
                share = torch.sigmoid(l - lse)[..., None].to(o.dtype)
                lse = torch.logaddexp(lse, l)
                out = torch.lerp(out, o, share)
            assert out is not None and lse is not None
            outs.append(out[0, 0])
            sums.append(lse)
        result = torch.cat(outs) if outs else rows.new_zeros(0, value.shape[3])
        ctx.save_for_backward(rows, key, value, result, *sums)
        ctx.runs, ctx.scale = runs, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, key, value, result, *sums = ctx.saved_tensors
        high = torch.promote_types(rows.dtype, torch.float32)  # several runs add to one key
        dq = torch.zeros(rows.shape, dtype=high)
        dk, dv = torch.zeros(key.shape, dtype=high), torch.zeros(value.shape, dtype=high)
        start = 0
        for run, lse in zip(ctx.runs, sums):
            mine = slice(start, start := start + run.rows.numel())
            q, o, g = (x[mine][None, None] for x in (rows, result, grad.contiguous()))
            for lo, hi, bias in run.pieces:
                k, v = run.keys(key, lo, hi), run.keys(value, lo, hi)
                part = flash_backward(g, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=ctx.scale)
                dq[mine] += part[0][0, 0]
                run.keys(dk, lo, hi).add_(part[1])
                run.keys(dv, lo, hi).add_(part[2])
        return dq.to(rows.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None
