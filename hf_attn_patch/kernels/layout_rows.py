"""The first rows of a layout: texts of many lengths share the layout of one that is a little longer.

Which keys a causal query sees does not depend on what follows it, so nothing has to be evaluated again for a new
length, and on a GPU building a layout would otherwise be most of the time of a short prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..call.rules import Rule

if TYPE_CHECKING:
    from .layout import BlockLayout


def shared_len(rule: Rule | None, q_len: int, kv_len: int, q_offset: int, causal: bool) -> int:
    """Number of queries of the layout that one of `q_len` queries is cut from: up to an eighth more, or `q_len` itself
    where nothing can be shared (later tokens matter, the rule is one of a grid, or keys follow the last query)."""
    static = rule is None or (not rule.dynamic and rule.required_len() is None)
    if not (causal and static and kv_len == q_offset + q_len and q_len > 0):
        return q_len
    step = max(64, 1 << max(q_len.bit_length() - 4, 0))
    return -(-q_len // step) * step


def first_rows(layout: BlockLayout, q_len: int) -> BlockLayout:
    """The first `q_len` queries of a causal layout on the CPU, and the keys up to the last of them, as a layout.

    Tiles are shared. Queries of the last block that are not there keep bits of their own: they have no output.
    """
    kv_len = layout.q_offset + q_len
    nq, nk = -(-q_len // layout.block_q), -(-kv_len // layout.block_k)
    pointers, index = layout.row_ptr.numpy(), layout.index.numpy()
    counts = np.diff(pointers).reshape(layout.heads, layout.q_blocks)[:, :nq].copy()
    pieces = []
    for head in range(layout.heads):
        first = head * layout.q_blocks
        begin, end = pointers[first + nq - 1], pointers[first + nq]
        # entries are sorted by key block, and those behind the last key can only be tiles of the last block of queries
        late = int(np.count_nonzero(index[begin:end] >= nk))
        counts[head, -1] -= late
        pieces.append(slice(int(pointers[first]), int(end) - late))
    join = lambda x: x[pieces[0]] if len(pieces) == 1 else torch.cat([x[piece] for piece in pieces])
    row_ptr = np.zeros(layout.heads * nq + 1, np.int32)
    np.cumsum(counts.reshape(-1), out=row_ptr[1:])
    return replace(
        layout,
        q_len=q_len,
        kv_len=kv_len,
        row_ptr=torch.from_numpy(row_ptr),
        full_count=layout.full_count.reshape(layout.heads, -1)[:, :nq].reshape(-1),
        index=join(layout.index),
        tile=join(layout.tile),
        cached={},
    )
