"""Chosen columns and diagonals (`rules_dynamic.ColumnsDiagonals`), the torch way: gather and attend, run by run.

A run of rows reads, per head, the chosen columns and the keys that some row of it reaches on a diagonal, gathered, and
the keys beside itself. Which of them a row sees is an additive mask: a diagonal is constant in q - k, so its half of
the mask is a strided view of one vector per head. Rows run backwards, since strides cannot. An additive mask costs
`scaled_dot_product_attention` on a CPU a third of what a bool one does. Memory is O(rows of a run x keys gathered);
differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.program import Program
from ..call.rules import ColumnsDiagonals
from .row_blocks import run_rows, sdpa

ROWS = 64
MOST = 0.3  # if a head needs more than this share of the keys, a run takes them all: a mask is cheaper than a gather


def run_columns_diagonals(program: Program) -> Tensor:
    """softmax(scale q k^T) v over the chosen keys that the mask allows, [B, H, L, Dv]."""
    rule, mask = program.rule, program.mask
    simple = mask.arithmetic and mask.causal and mask.window is None and not mask.kv_offset
    if not isinstance(rule, ColumnsDiagonals) or not simple or program.dropout or program.q_len == 1:
        return run_rows(program)
    query = program.query
    if program.query_scale is not None:
        query = (query * program.query_scale).to(query.dtype)
    return torch.stack([_item(program, rule, query[b], b) for b in range(program.batch)])


@dataclass
class Lines:
    """The choice for one item of the batch, over its n positions.

    columns: bool [heads, n]. reach: int64 [heads, n + 1], how many chosen distances are below a distance. column_bias:
    [heads, n], 0 where chosen, else -inf. diagonal_bias: [heads, n + ROWS], the same for distances n - 1 down to 0,
    then -inf for the future. until: first position that reads everything.
    """

    columns: Tensor
    reach: Tensor
    column_bias: Tensor
    diagonal_bias: Tensor
    until: int

    @classmethod
    def of(cls, rule: ColumnsDiagonals, b: int, size: int, dtype: torch.dtype) -> Lines:
        pick = lambda x: x[b if x.shape[0] > 1 else 0]
        # what the rule does not name is not chosen
        fit = lambda x: F.pad(pick(x), (0, max(size - x.shape[2], 0)))[:, :size]
        columns, diagonals = fit(rule.columns), fit(rule.diagonals)
        bias = lambda chosen: torch.zeros_like(chosen, dtype=dtype).masked_fill(~chosen, -torch.inf)
        return cls(
            columns=columns,
            reach=F.pad(diagonals.cumsum(-1), (1, 0)),
            column_bias=bias(columns),
            diagonal_bias=F.pad(bias(diagonals.flip(-1)), (0, ROWS), value=-torch.inf),
            until=int(pick(rule.until)),
        )

    def diagonals(self, begin: int, end: int) -> Tensor:
        """View [heads, end - begin, end]: the bias of keys 0 .. end - 1 for positions end - 1 down to `begin`."""
        heads, width = self.diagonal_bias.shape
        first = self.columns.shape[1] - end
        return self.diagonal_bias.as_strided((heads, end - begin, end), (width, 1, 1), first)

    def needed(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """Keys before `begin` that rows at positions [begin, end) read: positions int64 [heads, K], and which of them
        are there (heads need different numbers of keys); None if that is most of them."""
        position = torch.arange(begin, device=self.columns.device)
        nearest, beyond = begin - position, (end - position).clamp(max=self.columns.shape[1])
        wanted = self.columns[:, :begin] | (self.reach[:, beyond] > self.reach[:, nearest])
        count = wanted.sum(-1)
        most = int(count.max()) if begin else 0
        if most > MOST * begin:
            return None
        head, found = wanted.nonzero(as_tuple=True)
        rank = torch.arange(len(found), device=found.device) - (count.cumsum(0) - count)[head]
        index = found.new_zeros(len(wanted), most)
        index[head, rank] = found
        return index, torch.arange(most, device=found.device) < count[:, None]


def _item(program: Program, rule: ColumnsDiagonals, query: Tensor, b: int) -> Tensor:
    """Output [H, L, Dv] of one item of the batch."""
    mask, device = program.mask, query.device
    assert isinstance(program.key, Tensor) and isinstance(program.value, Tensor)
    H, L, start = query.shape[0], query.shape[1], mask.starts[b]
    key, value = program.key[b, :, start:], program.value[b, :, start:]
    size = key.shape[1]
    lines = Lines.of(rule, b, size, query.dtype)
    padded = None
    if mask.has_padding and mask.padding is not None:
        real = mask.padding.expand(mask.batch, -1)[b, start : start + size].to(device).bool()
        padded = (
            None
            if bool(real.all())
            else torch.zeros(size, dtype=query.dtype, device=device).masked_fill(~real, -torch.inf)
        )
    first = mask.q_offset - start  # position of row 0
    edges = [
        e for e in (-first, lines.until - first) if 0 < e < L
    ]  # runs do not cross into padding, or out of the choice
    cuts = sorted({*range(0, L, ROWS), *edges, L})
    outputs = []
    for lo, hi in zip(cuts[:-1], cuts[1:]):
        begin, end = first + lo, first + hi
        if end <= 0:  # left padding
            outputs.append(query.new_zeros(H, hi - lo, value.shape[2]))
            continue
        k, v, bias = _keys(lines, key, value, begin, end, padded, H)
        dead = bias.amax(-1, keepdim=True) == -torch.inf
        if bool(dead.any()):
            bias = bias.masked_fill(dead, 0.0)
        out = sdpa(query[None, :, lo:hi].flip(2), k[None], v[None], bias[None], program.scale)[0]
        outputs.append(out.masked_fill(dead, 0.0).flip(1))
    return torch.cat(outputs, 1)


def _keys(
    lines: Lines, key: Tensor, value: Tensor, begin: int, end: int, padded: Tensor | None, H: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask [1|H, rows, K] of rows at positions end - 1 down to `begin` (key, value: [Hkv, n, D])."""
    rows = end - begin
    future = torch.ones(rows, rows, dtype=torch.bool, device=key.device).triu(1).flip(0)
    found = lines.needed(begin, end) if begin < lines.until else None
    if found is None:
        k, v = key[:, :end], value[:, :end]
        if begin < lines.until:
            view = lines.diagonals(begin, end)
            bias = torch.empty(
                view.shape, dtype=view.dtype, device=view.device
            )  # a result by itself has strides like
            torch.maximum(
                view, lines.column_bias[:, None, :end], out=bias
            )  # the view's, and sdpa copies such a mask
        else:
            bias = key.new_zeros(1, rows, end)
        bias[..., begin:].masked_fill_(future, -torch.inf)
        bias = bias if padded is None else bias + padded[:end]
        return k, v, _per_head(bias, H)
    index, there = found
    view = lines.diagonals(begin, end)
    far = view.gather(2, index[:, None].expand(-1, rows, -1))
    far = torch.maximum(far, lines.column_bias.gather(1, index)[:, None])
    near = torch.maximum(view[..., begin:], lines.column_bias[:, None, begin:end])
    near = near.masked_fill(future, -torch.inf)
    if not bool(there.all()):
        far = far.masked_fill_(~there[:, None], -torch.inf)
    if padded is not None:
        far, near = far + padded[index][:, None], near + padded[begin:end]
    place = index.repeat_interleave(H // len(index), 0)
    kv_head = torch.arange(H, device=key.device)[:, None] // (H // key.shape[0])
    tail = lambda x: x[:, begin:end].repeat_interleave(H // x.shape[0], 0)
    k = torch.cat([key[kv_head, place], tail(key)], 1)
    v = torch.cat([value[kv_head, place], tail(value)], 1)
    return k, v, _per_head(torch.cat([far, near], -1), H)


def _per_head(bias: Tensor, H: int) -> Tensor:
    return bias if bias.shape[0] in (1, H) else bias.repeat_interleave(H // bias.shape[0], 0)
