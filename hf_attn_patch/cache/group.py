"""Tokens that the KV heads of one span keep: sinks and a ring of recent tokens, or chosen slots.

Token c (its column) of a group with window W lives in ring slot ``c % W`` once the group is *wrapped*. Slots of all
rows of a batch are aligned, left padding included, so one decoded token is one in-place write. A group wraps when it
holds more than sinks and window together: until then it is a plain run of columns and never larger than a dense
cache.
Order in the ring is free: keys are already rotated and softmax does not care.

Rows with padding between their tokens have rings of different lengths; such a group keeps a column per slot instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.ragged import KVGroup
from ..errors import CacheError

Span = tuple[int, int]  # (sinks, window) in tokens; a window of 0 keeps everything


class Group:
    """KV heads `heads`, which share (sinks, window). Keys [B, n, slots, D]: sinks first, then the ring."""

    def __init__(self, heads: tuple[int, ...], span: Span):
        self.heads = heads
        self.span = span
        self.sinks, self.window = span
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.wrapped = False
        self.chosen: Tensor | None = (
            None  # int64 [B, slots], column of every slot, of rows with padding inside
        )

    @property
    def keeps_all(self) -> bool:
        return self.window == 0

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.key, self.value) if t is not None]

    def apply(self, change: Any) -> None:
        """Change what has a row for every row of the batch."""
        if self.key is not None and self.value is not None:
            self.key, self.value = change(self.key), change(self.value)

    def clear(self) -> None:
        self.key = self.value = self.chosen = None
        self.wrapped = False

    def fits(self, total: int, last_start: int) -> bool:
        """Whether `total` columns are few enough to be kept as they are."""
        return self.keeps_all or total <= self.sinks + self.window + last_start

    def columns(self, seen: int, start: Tensor) -> Tensor:
        """Column of every slot after `seen` tokens, int64 [B, slots]; -1 = empty. start: first real columns [B]."""
        if self.chosen is not None:
            return self.chosen
        if not self.wrapped:
            return torch.arange(seen, device=start.device).expand(start.shape[0], -1)
        slots = torch.arange(self.window, device=start.device)
        ring = ((seen - 1) - ((seen - 1 - slots) % self.window)).expand(start.shape[0], -1)
        if self.sinks == 0:
            return ring
        return torch.cat([start[:, None] + torch.arange(self.sinks, device=start.device), ring], 1)

    # -- taking tokens in ----------------------------------------------------------------------------------------

    def first(self, key: Tensor, value: Tensor, start: Tensor, last_start: int) -> None:
        """Keep what is needed of the first tokens [B, n, L, D]."""
        if self.fits(key.shape[2], last_start):
            self.key, self.value = key.clone(), value.clone()
            return
        self.key, self.value = (self._survivors(t, start) for t in (key, value))
        self.wrapped = True

    def update(self, key: Tensor, value: Tensor, seen: int, start: Tensor, last_start: int) -> KVGroup:
        """Take in tokens [B, n, L, D] behind `seen` others; what their queries may read."""
        assert self.key is not None and self.value is not None
        new, total = key.shape[2], seen + key.shape[2]
        if self.wrapped and new == 1:
            self._write(key, value, seen)
            return KVGroup(
                self.heads, self.key, self.value, lambda: self.columns(total, start), True, self.span
            )
        if not self.wrapped:
            self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
            if self.fits(total, last_start):
                whole = new == 1 and last_start == 0
                return KVGroup(
                    self.heads, self.key, self.value, lambda: self.columns(total, start), whole, self.span
                )
            columns = torch.arange(total, device=start.device).expand(start.shape[0], -1)
            group = KVGroup(self.heads, self.key, self.value, columns)
            self.key, self.value = (self._survivors(t, start) for t in (self.key, self.value))
            self.wrapped = True
            if new > 1:
                return group
            return KVGroup(
                self.heads, self.key, self.value, lambda: self.columns(total, start), True, self.span
            )
        # a chunk of several queries reads what was kept before it, plus itself
        fresh = torch.arange(seen, total, device=start.device).expand(start.shape[0], -1)
        columns = torch.cat([self.columns(seen, start), fresh], 1)
        group = KVGroup(self.heads, torch.cat([self.key, key], 2), torch.cat([self.value, value], 2), columns)
        self._write(key, value, seen)
        return group

    def _survivors(self, tensor: Tensor, start: Tensor) -> Tensor:
        """Sinks and last `window` tokens of columns 0..L-1 of [B, n, L, D], in slot order."""
        new = tensor.shape[2]
        ring = torch.roll(tensor[:, :, new - self.window :], (new - self.window) % self.window, 2)
        if self.sinks == 0:
            return ring.contiguous()
        sink = (start[:, None] + torch.arange(self.sinks, device=start.device)).clamp(max=new - 1)
        index = sink[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return torch.cat([torch.gather(tensor, 2, index), ring], 2)

    def _write(self, key: Tensor, value: Tensor, seen: int) -> None:
        new = key.shape[2]
        for name, fresh in (("key", key), ("value", value)):
            buffer = getattr(self, name)
            if torch.is_grad_enabled() and (buffer.requires_grad or fresh.requires_grad):
                buffer = buffer.clone()  # autograd still needs the old values
                setattr(self, name, buffer)
            if new == 1:
                buffer[:, :, self.sinks + seen % self.window] = fresh[:, :, 0]
                continue
            kept = min(new, self.window)
            slots = torch.arange(seen + new - kept, seen + new, device=fresh.device) % self.window
            buffer[:, :, self.sinks + slots] = fresh[:, :, new - kept :]

    # -- rows with padding inside --------------------------------------------------------------------------------

    def choose(self, seen: int, start: Tensor, real: Tensor) -> None:
        """From now on keep a column per slot. real: bool [B, >= seen], True = real token.

        Raises:
            CacheError: tokens that a row still needs went with its padding.
        """
        columns = self.columns(seen, start)
        held = (columns >= 0) & torch.gather(real, 1, columns.clamp(min=0))
        if self.wrapped:
            position = real[:, :seen].long().cumsum(1) - 1
            needed = real[:, :seen] & ((position < self.sinks) | (position > position[:, -1:] - self.window))
            if bool((held.sum(1) < needed.sum(1)).any()):
                raise CacheError(
                    "rows of this batch have padding between their tokens, and tokens that their windows still reach "
                    "were dropped with it. Start with a fresh cache, or patch with cache='keep'"
                )
        self.chosen = torch.where(held, columns, -1)
        self.wrapped = True

    def update_chosen(self, key: Tensor, value: Tensor, seen: int, real: Tensor) -> KVGroup:
        """`update` for rows with padding inside. real: bool [B, seen + L]."""
        assert self.key is not None and self.value is not None and self.chosen is not None
        total = seen + key.shape[2]
        fresh = torch.arange(seen, total, device=key.device).expand(key.shape[0], -1)
        columns = torch.cat([self.chosen, torch.where(real[:, seen:total], fresh, -1)], 1)
        group = KVGroup(self.heads, torch.cat([self.key, key], 2), torch.cat([self.value, value], 2), columns)
        position = real[:, :total].long().cumsum(1) - 1
        own = torch.gather(position, 1, columns.clamp(min=0))
        kept = columns >= 0
        if not self.keeps_all:
            kept = kept & ((own < self.sinks) | (own > position[:, -1:] - self.window))
        size = max(int(kept.sum(1).max()), 1)
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        pick = lambda t: torch.gather(t, 2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
        self.key, self.value = pick(group.key), pick(group.value)
        self.chosen = torch.gather(torch.where(kept, columns, -1), 1, order)
        return group
