"""Attention calls whose rows are no plain sequences: packed rows, and rows with padding inside.

Methods count tokens from the start of a row. Where several sequences share a row, or padding lies between its tokens,
the call is cut into one call per sequence, each of which is a plain one; facts of the forward are cut alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call.mask import Mask
from ..errors import ModelMismatchError
from ..forward.conversation import Conversation
from ..forward.needs.base import needs_of
from ..forward.running import Running
from .site_patch import SitePatch


@dataclass
class Piece:
    """One sequence of one row: row of the batch, int64 [n] rows of the call, int64 [m] its keys."""

    item: int
    rows: Tensor
    keys: Tensor


def pieces_of(mask: Mask, sequences: Tensor | None) -> list[Piece]:
    """The sequences of a call, in order.

    sequences: int64 [B|1, L], which sequence of its row each query belongs to; None: rows are one sequence each, with
    padding inside.
    """
    found = []
    for item in range(mask.batch):
        end = min(mask.q_offset + mask.q_len, mask.kv_len) if mask.causal else mask.kv_len
        real = None if mask.padding is None else mask.padding.expand(mask.batch, -1)[item, :end]
        keys = torch.arange(end, device=mask.device) if real is None else real.nonzero()[:, 0]
        rows = keys[keys >= mask.q_offset] - mask.q_offset if mask.causal else keys
        if sequences is None:
            found.append(Piece(item, rows, keys))
            continue
        own = sequences.expand(mask.batch, -1)[item].to(rows.device)
        for number in own[rows].unique_consecutive():
            of_it = rows[own[rows] == number]
            found.append(Piece(item, of_it, of_it))
    return [piece for piece in found if piece.rows.numel()]


def assert_none(active: list[SitePatch], running: Running, mask: Mask, kwargs: dict[str, Any]) -> None:
    """While torch.compile traces: rows are plain sequences, or the compiled forward fails when it runs. Nobody can look
    at positions and padding then, and a call cannot be cut into pieces.

    Raises:
        ModelMismatchError: lengths of packed sequences were given, which no traced call follows.
    """
    if not any(patch.counts for patch in active):
        return
    if any(isinstance(kwargs.get(name), Tensor) for name in ("cu_seq_lens_q", "seq_idx")):
        raise ModelMismatchError(
            f"{active[0].entry.config.name}: packed rows (cu_seq_lens, seq_idx) are cut into their sequences, which "
            "torch.compile and torch.export cannot trace. Run this model uncompiled, or do not pack"
        )
    if running.restarts is not None:
        torch._assert_async(
            ~running.restarts,
            "hf_attn_patch: position_ids begin again inside a row (packed sequences), which a compiled forward cannot "
            "follow: run it uncompiled, or do not pack",
        )
        running.restarts = None  # once per forward
    if mask.causal and mask.padding is not None and any(patch.counts_itself for patch in active):
        real = mask.padding.bool()
        inside = real.long().cummax(-1).values * real.long().flip(-1).cummax(-1).values.flip(-1)
        torch._assert_async(
            ~(inside.bool() & ~real).any(),
            f"hf_attn_patch: {active[0].entry.config.name} counts tokens, and a row has padding inside, which a "
            "compiled forward cannot follow: run it uncompiled",
        )


def refuse(active: list[SitePatch], mask: Mask, sequences: Tensor | None) -> None:
    """Refuse what a piece cannot be told.

    Raises:
        ModelMismatchError: a method needs facts that are not known per sequence, or packed rows meet a filled cache.
    """
    what = (
        "this batch packs several sequences into one row (position ids restart, or their lengths were given)"
        if sequences is not None
        else "rows of this batch have padding between their tokens"
    )
    for patch in active:
        lacks = [need.says for _, config in patch.variants for need in needs_of(config) if not need.in_pieces]
        if lacks:
            raise ModelMismatchError(
                f"{patch.entry.config.name}: {what}, and {lacks[0]} is known for whole rows only. Put one sequence "
                "in each row, padded on one side"
            )
    if sequences is not None and (mask.q_offset or mask.kv_len > mask.q_len):
        raise ModelMismatchError(
            f"{active[0].entry.config.name}: {what}, and the cache already holds tokens; which of its sequences they "
            "belong to is unknown. Put one sequence in each row"
        )


def refuse_given_mask(active: list[SitePatch], mask: Mask, sequences: Tensor, running: Running) -> None:
    """Refuse packed rows that come with a 4-d mask (looked at once per forward): rules count from the start of a
    sequence, and the mask may hide more than the other sequences.

    Raises:
        ModelMismatchError: position ids begin again between real tokens.
    """
    key = ("packed under a given mask", id(mask.given))
    if key not in running.scratch:
        begins = sequences.diff(dim=1) != 0
        if mask.padding is not None:
            real = mask.padding[:, -mask.q_len :].to(begins.device)
            begins = begins & real[:, 1:] & real[:, :-1]
        running.scratch[key] = bool(begins.any())
    if running.scratch[key]:
        raise ModelMismatchError(
            f"{active[0].entry.config.name}: position ids begin again inside the rows of this batch (several sequences "
            "are packed into one), and a 4-d mask came along, which may hide anything. Pass packed rows with their "
            "position ids and without a mask, or one sequence in each row"
        )


class PieceOf(Running):
    """The running forward as one of its pieces sees it."""

    def __init__(self, whole: Running, piece: Piece, alone: bool):
        self.__dict__.update(copy.copy(whole).__dict__)
        self.piece, self.whole, self.alone = piece, whole, alone
        self.scratch, self.cache, self._own = {}, None, Conversation()
        rows = lambda x: x[piece.item : piece.item + 1, piece.rows.to(x.device)] if x.ndim > 1 else x
        self.layers = {
            path: {name: rows(x) for name, x in kept.items()} for path, kept in whole.layers.items()
        }
        length = whole.prompt_length
        self._length = len(piece.keys) if alone or length is None else int((piece.keys < length).sum())
        self.override = {k: v for k, v in whole.override.items() if k != "length"}

    @property
    def prompt_length(self) -> int | None:
        return self._length

    @property
    def first_prompt(self) -> int | None:
        first = self.whole.first_prompt
        return self._length if self.alone or first is None else int((self.piece.keys < first).sum())


def run(
    pieces: list[Piece],
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    running: Running,
    alone: bool,
    attend: Callable[[Running, Tensor, Tensor, Tensor, Mask], tuple[Tensor, Any]],
) -> tuple[Tensor, Any]:
    """Run `attend` on every piece; (output [B, L, H, Dv], what the last one returned). Padding gives 0."""
    output: Tensor | None = None
    last = None
    for piece in pieces:
        at, keys = piece.rows.to(query.device), piece.keys.to(query.device)
        one = slice(piece.item, piece.item + 1)
        small = Mask(
            1, len(at), len(keys), q_offset=len(keys) - len(at), causal=mask.causal, window=mask.window,
            device=query.device,
        )  # fmt: skip
        out, last = attend(
            PieceOf(running, piece, alone),
            query[one][:, :, at],
            key[one][:, :, keys],
            value[one][:, :, keys],
            small,
        )
        if output is None:
            output = out.new_zeros(query.shape[0], query.shape[2], *out.shape[2:])
        output = output.index_put((torch.full_like(at, piece.item), at), out[0])
    if output is None:
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return output, last
