"""`BlockLayout`: which key blocks each query block reads, as plain tensors (the sparse half of the house).

CSR over (batch or 1, layout head, query block). An entry is *full* (every key of the block is visible to every
query of the block) or points to a bit-packed tile of exact element visibility; the full entries of a row come
first, so a kernel runs two branch-free loops. Tiles are shared: a sliding window over 128k tokens has about
three of them. One structure therefore holds every rule, and no kernel is recompiled for a new mask.

Causality and a sliding window of the mask are *baked in* (full entries and tiles already respect them); padding
is not (rules speak of positions from the first real token, so a left-padded row is a shorter row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.rules import Everything, Rule
from .kept import kept
from .layout_rows import first_rows, shared_len
from .tiles import Pairs, Predicate, Shape, classify, mask_kind, ordered_pairs, pack, ranged_pairs, unpack


@dataclass(eq=False)
class BlockLayout:
    """Block-sparse visibility. R = batch * heads * q_blocks rows, N entries, T tiles.

    Attributes:
        q_len, kv_len: tokens. q_offset: position of the first query (key 0 has position 0).
        batch, heads: 1 or B; layout heads (1, Hkv or H).
        block_q, block_k: tokens per block; block_k is a multiple of 32.
        row_ptr: int32 [R + 1], entries of row r are ``row_ptr[r] .. row_ptr[r + 1]``.
        full_count: int32 [R], how many of them are full (they come first).
        index: int32 [N], key block. tile: int32 [N], row of `bits`, -1 for a full entry. Both parts of a row are
            sorted by key block.
        bits: int32 [T, block_q, block_k // 32]; key j of the block is bit ``j % 32`` of word ``j // 32``.
        order: int64 [q_blocks * block_q] token at each slot, -1 = hole; None = tokens in place. For queries and keys.
        causal, window: what was baked in (information only).

    A key out of range or in a hole is never visible, and a block with one is never full: the loop over full
    entries needs no bounds. A *query* out of range or in a hole has arbitrary bits; do not store its output.
    """

    q_len: int
    kv_len: int
    q_offset: int
    batch: int
    heads: int
    block_q: int
    block_k: int
    row_ptr: Tensor
    full_count: Tensor
    index: Tensor
    tile: Tensor
    bits: Tensor
    order: Tensor | None = None
    causal: bool = False
    window: int | None = None
    name: str = ""
    transposed: bool = False
    cached: dict[Any, Any] = field(default_factory=dict, repr=False)  # what executors derive from it (plans)

    # -- builders ---------------------------------------------------------------------------------------------

    @classmethod
    def from_rule(
        cls,
        rule: Rule | None,
        q_len: int,
        kv_len: int,
        q_offset: int = 0,
        causal: bool = False,
        window: int | None = None,
        block_q: int = 64,
        block_k: int = 64,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Layout of a static rule; elements are looked at only in blocks that the rule's bounds leave open.

        Args:
            rule: None reads everything that `causal` and `window` allow.
            q_offset: position of the first query. window: the mask's sliding window (own key included).

        Raises:
            ValueError: block_k is not a multiple of 32.
        """
        rule = Everything() if rule is None else rule
        shape = Shape(q_len, kv_len, q_offset, causal, window, block_q, block_k, rule.heads)
        order = None
        if q_offset == 0 and not causal and window is None and q_len == kv_len == rule.required_len():
            order = rule.token_order(max(block_q, block_k))
        if order is None:
            pairs = ranged_pairs(rule, shape)
            tokens = None
        else:
            tokens = torch.tensor(order, dtype=torch.long)
            shape = replace(shape, slots=len(order))
            pairs = ordered_pairs(rule, shape, tokens)
        return cls._assemble(shape, 1, pairs, rule, tokens, repr(rule)).to(device)

    @classmethod
    def from_predicate(
        cls,
        fn: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_len: int,
        kv_len: int,
        heads: int = 1,
        **options: Any,
    ) -> BlockLayout:
        """Layout of a vectorised predicate ``fn(head, q_position, k_position) -> bool`` (every block is evaluated,
        in pieces). `options` as in `from_rule`."""
        return cls.from_rule(Predicate(fn, heads), q_len, kv_len, **options)

    @classmethod
    def from_block_mask(
        cls,
        blocks: Tensor,
        q_len: int,
        kv_len: int,
        q_offset: int = 0,
        causal: bool = False,
        window: int | None = None,
        block_q: int = 64,
        block_k: int = 64,
    ) -> BlockLayout:
        """Layout from a boolean block mask [Hl, nq, nk] or [B, Hl, nq, nk]; blocks are cut by `causal`/`window`."""
        blocks = blocks[None] if blocks.ndim == 3 else blocks
        shape = Shape(q_len, kv_len, q_offset, causal, window, block_q, block_k, blocks.shape[1])
        if blocks.shape[2:] != (shape.nq, shape.nk):
            raise ValueError(f"block mask is {list(blocks.shape)}, {q_len} x {kv_len} tokens need "
                             f"[.., {shape.nq}, {shape.nk}] blocks of {block_q} x {block_k}")  # fmt: skip
        return cls._from_pairs(shape, blocks.shape[0], *blocks.nonzero(as_tuple=True))

    @classmethod
    def from_topk(
        cls,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        q_offset: int = 0,
        causal: bool = False,
        window: int | None = None,
        block_q: int = 64,
        block_k: int = 64,
    ) -> BlockLayout:
        """Layout from chosen key blocks, int [B, Hl, nq, K]; -1 = none, repeats count once (dynamic sparsity)."""
        shape = Shape(q_len, kv_len, q_offset, causal, window, block_q, block_k, indices.shape[1])
        batch, heads, nq, _ = indices.shape
        if nq != shape.nq:
            raise ValueError(f"indices have {nq} query blocks, {q_len} tokens need {shape.nq} of {block_q}")
        row = torch.arange(batch * heads * nq, device=indices.device).reshape(batch, heads, nq, 1)
        flat = (row * shape.nk + indices)[indices >= 0].unique()
        n, row = flat % shape.nk, flat // shape.nk
        b, h, m = row // (heads * nq), row // nq % heads, row % nq
        return cls._from_pairs(shape, batch, b, h, m, n)

    @classmethod
    def _from_pairs(cls, shape: Shape, batch: int, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> BlockLayout:
        q_lo, q_hi = shape.q_range(m)
        k_lo = n * shape.block_k
        k_hi = (k_lo + shape.block_k).clamp(max=shape.kv_len)
        keep, full = torch.ones_like(m, dtype=torch.bool), (k_lo + shape.block_k <= shape.kv_len)
        if shape.causal:
            keep, full = keep & (k_lo < q_hi), full & (k_hi <= q_lo + 1)
        if shape.window is not None:
            keep, full = keep & (k_hi > q_lo - shape.window + 1), full & (k_lo > q_hi - 1 - shape.window)
        pairs = Pairs(b, h, m, n, full, mask_kind(shape, q_lo, k_lo))
        pairs = Pairs(*(column[keep] for column in pairs))
        return cls._assemble(shape, batch, pairs, Everything(), None, "blocks")

    @classmethod
    def _assemble(
        cls, shape: Shape, batch: int, pairs: Pairs, rule: Rule, order: Tensor | None, name: str
    ) -> BlockLayout:
        pairs, tile, bits = classify(pairs, rule, shape, order)
        row = (pairs.b * shape.heads + pairs.h) * shape.nq + pairs.m
        rank = (row * 2 + (tile >= 0)) * shape.nk + pairs.n  # rows, full entries first, then by key block
        sort = rank.argsort()
        rows = batch * shape.heads * shape.nq
        counts = torch.bincount(row, minlength=rows)
        return cls(
            q_len=shape.q_len,
            kv_len=shape.kv_len,
            q_offset=shape.q_offset,
            batch=batch,
            heads=shape.heads,
            block_q=shape.block_q,
            block_k=shape.block_k,
            row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            full_count=torch.bincount(row[tile < 0], minlength=rows).int(),
            index=pairs.n[sort].int(),
            tile=tile[sort].int(),
            bits=bits,
            order=order,
            causal=shape.causal,
            window=shape.window,
            name=name,
        )

    # -- facts ------------------------------------------------------------------------------------------------

    @property
    def q_blocks(self) -> int:
        return self._count(self.q_len, self.block_q)

    @property
    def k_blocks(self) -> int:
        return self._count(self.kv_len, self.block_k)

    def _count(self, tokens: int, block: int) -> int:
        return -(-(tokens if self.order is None else self.order.numel()) // block)

    @property
    def entries(self) -> int:
        return self.index.numel()

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def rows(self) -> Tensor:
        """int64 [N], the row each entry belongs to."""
        counts = self.row_ptr.diff().long()
        return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on `device` (itself if it is there already)."""
        if torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, cached={})

    def dense(self) -> Tensor:
        """bool [Bl, Hl, L, S] in the original token order. O(L * S) memory: for tests and pictures."""
        nq, nk = self.q_blocks, self.k_blocks
        seen = torch.zeros(self.batch * self.heads * nq, nk, self.block_q, self.block_k, dtype=torch.bool)
        rows, index, tile = self.rows.cpu(), self.index.cpu().long(), self.tile.cpu().long()
        seen[rows, index] = True
        partial = tile >= 0
        seen[rows[partial], index[partial]] = unpack(self.bits.cpu())[tile[partial]]
        seen = seen.reshape(self.batch, self.heads, nq, nk, self.block_q, self.block_k).transpose(3, 4)
        seen = seen.reshape(self.batch, self.heads, nq * self.block_q, nk * self.block_k)
        if self.order is None:
            return seen[:, :, : self.q_len, : self.kv_len].to(self.device)
        slot = torch.empty(self.q_len, dtype=torch.long)
        order = self.order.cpu()
        slot[order[order >= 0]] = (order >= 0).nonzero()[:, 0]
        return seen[:, :, slot][..., slot].to(self.device)

    def visible_count(self) -> int:
        """Number of visible (query, key) elements over batch and layout heads."""
        m = self.rows % self.q_blocks
        slots = torch.arange(self.q_blocks * self.block_q, device=self.device)
        real = slots < self.q_len if self.order is None else self.order >= 0
        real = real.reshape(self.q_blocks, self.block_q)
        if self.transposed:  # holes sit on the query side, which are the columns here
            return self.transpose().visible_count()
        full = self.tile < 0
        count = int(real.sum(1)[m[full]].sum()) * self.block_k
        per_row = unpack(self.bits).sum(-1)  # [T, block_q]
        for part in (~full).nonzero()[:, 0].split(65536):
            count += int((per_row[self.tile[part].long()] * real[m[part]]).sum())
        return count

    def possible_count(self) -> int:
        """Number of (query, key) pairs that causality allows, per batch item and layout head."""
        if not self.causal:
            return self.q_len * self.kv_len
        q = torch.arange(self.q_offset, self.q_offset + self.q_len)
        return int((q + 1).clamp(max=self.kv_len).sum())

    def density(self) -> tuple[float, float]:
        """(elements, blocks): shares of what causality allows.

        elements: visible (q, k) pairs / pairs with ``k <= q`` (all L * S pairs if the layout is not causal).
        blocks: entries / blocks that hold at least one such pair: what a kernel of this block size reads.
        """
        if self.transposed:
            return self.transpose().density()
        copies = self.batch * self.heads
        if self.causal:
            last = torch.arange(self.block_q, self.q_len + self.block_q, self.block_q).clamp(max=self.q_len)
            last = last + self.q_offset - 1
            blocks = int((last // self.block_k + 1).clamp(max=self.k_blocks).sum())
        else:
            blocks = self.q_blocks * self.k_blocks
        possible = self.possible_count()
        return self.visible_count() / max(possible * copies, 1), self.entries / max(blocks * copies, 1)

    def transpose(self) -> BlockLayout:
        """Per key block, the query blocks that read it, full ones first (dK and dV walk this way).

        The result is a `BlockLayout` with the sides exchanged: its "queries" are the keys. Entries may now be full
        with inner tokens out of range or in holes; a backward kernel masks those *queries* by arithmetic.
        """
        nq, nk = self.q_blocks, self.k_blocks
        rows, n = self.rows, self.index.long()
        group, m = rows // nq, rows % nq
        new = group * nk + n
        sort = ((new * 2 + (self.tile >= 0)) * nq + m).argsort()
        counts = torch.bincount(new, minlength=self.batch * self.heads * nk)
        full = torch.bincount(new[self.tile < 0], minlength=counts.numel())
        if "transposed bits" not in self.cached:
            self.cached["transposed bits"] = pack(unpack(self.bits).transpose(1, 2))
        return replace(
            self,
            q_len=self.kv_len,
            kv_len=self.q_len,
            block_q=self.block_k,
            block_k=self.block_q,
            row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            full_count=full.int(),
            index=m[sort].int(),
            tile=self.tile[sort],
            bits=self.cached["transposed bits"],
            transposed=not self.transposed,
            cached={"transposed bits": self.bits},
        )

    # -- being looked at ----------------------------------------------------------------------------------------

    def picture(self) -> Tensor:
        """int8 [Bl, Hl, nq, nk]: 0 not read, 1 read through a tile, 2 full."""
        grid = torch.zeros(self.batch * self.heads * self.q_blocks, self.k_blocks, dtype=torch.int8)
        grid[self.rows.cpu(), self.index.cpu().long()] = torch.where(self.tile.cpu() < 0, 2, 1).to(torch.int8)
        return grid.reshape(self.batch, self.heads, self.q_blocks, self.k_blocks)

    def draw(self, path: str | Path | None = None) -> Any:
        """Draw the blocks of every layout head (dark: full, light: through a tile) and save them to `path`.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed (``str(layout)`` draws small grids in plain text).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("BlockLayout.draw needs matplotlib; print(layout) draws small grids") from error
        grid = self.picture().flatten(0, 1)
        figure = Figure(figsize=(3 * min(len(grid), 6) + 1, 3 * (-(-len(grid) // 6)) + 0.6))
        axes = figure.subplots(-(-len(grid) // 6), min(len(grid), 6), squeeze=False)
        for i, axis in enumerate(axes.flat):
            if i >= len(grid):
                axis.axis("off")
                continue
            axis.imshow(grid[i].numpy(), cmap="Greys", vmin=0, vmax=2, interpolation="nearest")
            axis.set_title(f"layout head {i % self.heads}", fontsize=8)
            axis.set_xlabel(f"key block ({self.block_k})", fontsize=7)
            axis.set_ylabel(f"query block ({self.block_q})", fontsize=7)
        figure.suptitle(f"{self.name}: {self.density()[0]:.1%} of elements", fontsize=9)
        if path is not None:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        return figure

    def __str__(self) -> str:
        if self.q_blocks > 64 or self.k_blocks > 96 or self.batch * self.heads > 8:
            return repr(self)
        heads = []
        for b, per_batch in enumerate(self.picture().tolist()):
            for h, rows in enumerate(per_batch):
                where = f"batch {b}, " if self.batch > 1 else ""
                text = "\n".join("  " + "".join(".+#"[cell] for cell in row) for row in rows)
                heads.append(f"{where}layout head {h}  (# full, + partly, . not read)\n{text}")
        return repr(self) + "\n" + "\n".join(heads)

    def __repr__(self) -> str:
        elements, blocks = self.density()
        baked = [
            w for w in ("causal" if self.causal else "", f"window={self.window}" if self.window else "") if w
        ]
        parts = [
            self.name or "blocks",
            f"L={self.q_len}@{self.q_offset} S={self.kv_len}",
            f"heads={self.heads}" + (f" batch={self.batch}" if self.batch > 1 else ""),
            f"blocks {self.block_q}x{self.block_k}",
            f"{self.entries} entries ({int(self.full_count.sum())} full)",
            f"{self.bits.shape[0]} tiles",
            f"density {elements:.3f} elements, {blocks:.3f} blocks",
            *baked,
            *(["token order"] if self.order is not None else []),
            *(["transposed"] if self.transposed else []),
        ]
        return f"BlockLayout({', '.join(parts)})"


KEPT = 1 << 30  # bytes of layouts, with the plans and masks that executors derive from them


@kept(KEPT)
def layout_for(
    rule: Rule | None,
    q_len: int,
    kv_len: int,
    q_offset: int = 0,
    causal: bool = False,
    window: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """`BlockLayout.from_rule`, cached (the layers of a model share one layout). Do not modify the result.

    Causal texts of different lengths share what was built for one of them (`layout_rows`).
    """
    longer = shared_len(rule, q_len, kv_len, q_offset, causal)
    if longer > q_len and not torch.compiler.is_compiling():
        whole = layout_for(rule, longer, q_offset + longer, q_offset, causal, window, block_q, block_k)
        return first_rows(whole, q_len).to(device)
    return BlockLayout.from_rule(rule, q_len, kv_len, q_offset, causal, window, block_q, block_k, device)
