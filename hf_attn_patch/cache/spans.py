"""KV-cache layers that keep a different span per KV head: sinks + a ring of recent tokens, really freed.

Token c (its column) of a group with window W lives in ring slot ``c % W``. Slots of all rows of a batch are
aligned, left padding included, so one decoded token is one in-place write. Sinks, the first *real* tokens of
each row, get slots of their own once the ring starts to overwrite them; until then they are read from the ring.
Order in the ring is free: keys are already rotated and softmax does not care.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..call.ragged import KVGroup, RaggedKV
from ..errors import CacheError

Span = tuple[int, int]  # (sinks, window) in tokens; a window of 0 keeps everything


class _Group:
    """Tokens of the KV heads `heads`, which share (sinks, window). Keys [B, n, slots, D]: sinks first, then ring."""

    def __init__(self, heads: tuple[int, ...], span: Span):
        self.heads = heads
        self.sinks, self.window = span
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.wrapped = False
        self.last_start = 0  # largest column of a first real token in the batch

    @property
    def keeps_all(self) -> bool:
        return self.window == 0

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.key, self.value) if t is not None]

    def apply(self, change: Any) -> None:
        if self.key is not None and self.value is not None:
            self.key, self.value = change(self.key), change(self.value)

    def ring_columns(self, seen: int, device: torch.device) -> Tensor:
        """Column held by each ring slot after `seen` tokens, int64 [slots]; before wrapping slot = column."""
        if not self.wrapped:
            return torch.arange(seen, device=device)
        slots = torch.arange(self.window, device=device)
        return (seen - 1) - ((seen - 1 - slots) % self.window)

    def columns(self, seen: int, start: Tensor) -> Tensor:
        """Column of every slot, [B, slots]; -1 where a slot is empty or repeats a token of the ring."""
        ring = self.ring_columns(seen, start.device).expand(start.shape[0], -1)
        if not self.wrapped or self.sinks == 0:
            return ring
        sink = start[:, None] + torch.arange(self.sinks, device=start.device)
        oldest = seen - self.window
        return torch.cat([torch.where(sink < oldest, sink, -1), ring], 1)

    def update(self, key: Tensor, value: Tensor, seen: int, start: Tensor) -> KVGroup | None:
        """Take in new tokens [B, n, L, D]; returns what their queries may read (None on the first call: the new
        tokens themselves, which the caller already has)."""
        new = key.shape[2]
        total = seen + new
        if self.key is None or self.value is None:
            self._store_first(key, value, start)
            return None
        if self.keeps_all or total <= self.window:
            self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
            columns = torch.arange(total, device=start.device).expand(start.shape[0], -1)
            return KVGroup(self.heads, self.key, self.value, columns)
        if new == 1:
            if not self.wrapped:
                self._wrap(seen, start)
            self._write(key, value, seen, start)
            return KVGroup(self.heads, self.key, self.value, self.columns(total, start))
        # a chunk of several queries reads what was kept before it, plus itself
        columns = torch.cat(
            [
                self.columns(seen, start),
                torch.arange(seen, total, device=start.device).expand(start.shape[0], -1),
            ],
            1,
        )
        group = KVGroup(self.heads, torch.cat([self.key, key], 2), torch.cat([self.value, value], 2), columns)
        if not self.wrapped:
            self._wrap(seen, start)
        self._write(key, value, seen, start)
        return group

    def _store_first(self, key: Tensor, value: Tensor, start: Tensor) -> None:
        new = key.shape[2]
        if self.keeps_all or new <= self.window:
            self.key, self.value = key.clone(), value.clone()
            return
        self.key, self.value = (self._survivors(t, start) for t in (key, value))
        self.wrapped = True

    def _survivors(self, tensor: Tensor, start: Tensor) -> Tensor:
        """Sinks and last `window` tokens of [B, n, L, D] in slot order."""
        new = tensor.shape[2]
        ring = torch.roll(tensor[:, :, new - self.window :], (new - self.window) % self.window, 2)
        if self.sinks == 0:
            return ring.contiguous()
        return torch.cat([self._at(tensor, start), ring], 2)

    def _at(self, tensor: Tensor, start: Tensor) -> Tensor:
        """The sink tokens of each row out of columns 0..L-1 of [B, n, L, D]."""
        sink = start[:, None] + torch.arange(self.sinks, device=start.device)
        sink = sink.clamp(max=tensor.shape[2] - 1)  # a later token will overwrite a slot that is not due yet
        index = sink[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return torch.gather(tensor, 2, index)

    def _wrap(self, seen: int, start: Tensor) -> None:
        """Before the first overwrite: give sinks slots of their own and fix the ring size.

        The ring holds columns 0..seen-1 in order (seen <= window), so it only has to be extended.
        """

        def extended(tensor: Tensor) -> Tensor:
            room = tensor.new_zeros(*tensor.shape[:2], self.window - seen, tensor.shape[3])
            sinks = [self._at(tensor, start)] if self.sinks else []
            return torch.cat([*sinks, tensor, room], 2)

        self.key, self.value = extended(self.key), extended(self.value)  # type: ignore[arg-type]
        self.wrapped = True

    def _write(self, key: Tensor, value: Tensor, seen: int, start: Tensor) -> None:
        new = key.shape[2]
        kept = min(new, self.window)
        columns = torch.arange(seen + new - kept, seen + new, device=key.device)
        slots = self.sinks + columns % self.window
        for name, fresh in (("key", key), ("value", value)):
            buffer = getattr(self, name)
            if torch.is_grad_enabled() and (buffer.requires_grad or fresh.requires_grad):
                buffer = buffer.clone()  # autograd still needs the old values
            buffer[:, :, slots] = fresh[:, :, new - kept :]
            if (
                self.sinks and self.last_start + self.sinks > seen
            ):  # some row's first tokens are among the new
                self._write_late_sinks(buffer, fresh, seen, start)
            setattr(self, name, buffer)

    def _write_late_sinks(self, buffer: Tensor, fresh: Tensor, seen: int, start: Tensor) -> None:
        index = start[:, None] + torch.arange(self.sinks, device=start.device) - seen  # [B, sinks] into fresh
        due = (index >= 0) & (index < fresh.shape[2])
        safe = index.clamp(0, fresh.shape[2] - 1)[:, None, :, None]
        picked = torch.gather(fresh, 2, safe.expand(-1, fresh.shape[1], -1, fresh.shape[3]))
        old = buffer[:, :, : self.sinks]
        buffer[:, :, : self.sinks] = torch.where(due[:, None, :, None], picked, old)


class SpanLayer(DynamicLayer):
    """Cache layer that keeps, per KV head, `sinks` first and `window` last tokens.

    Args:
        spans: (sinks, window) for each KV head; window 0 keeps everything.
        start: int64 [B], column of the first real token of each row (left padding), or None for no padding.

    The first `update` returns the new keys themselves (a prompt attends within itself, the layout says to what);
    later ones return a `RaggedKV`. ``get_seq_length()`` is the number of tokens *seen*: positions derive from it.
    """

    is_croppable = False

    def __init__(self, spans: list[Span], start: Tensor | None = None):
        super().__init__()
        by_span: dict[Span, list[int]] = {}
        for head, span in enumerate(spans):
            by_span.setdefault(span, []).append(head)
        self.groups = [_Group(tuple(heads), span) for span, heads in by_span.items()]
        self.seen = 0
        self.set_start(start)

    def set_start(self, start: Tensor | None) -> None:
        """Columns of the first real tokens; may still move for rows that saw nothing but padding so far."""
        self.start = start
        last = 0 if start is None else int(start.max())
        for group in self.groups:
            group.last_start = last

    @property
    def waiting(self) -> bool:
        """True while a row of the batch has seen nothing but padding."""
        return any(g.last_start >= self.seen for g in self.groups)

    @property
    def spans(self) -> list[Span]:
        """(sinks, window) per KV head."""
        return [s for _, s in sorted((h, (g.sinks, g.window)) for g in self.groups for h in g.heads)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take in [B, Hkv, L, D] and return what the queries of these tokens may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        if self.start is None:
            self.start = torch.zeros(batch, dtype=torch.long, device=key_states.device)
        start = self.start.to(key_states.device).expand(batch)
        parts = []
        for group in self.groups:
            heads = list(group.heads)
            every = len(heads) == key_states.shape[1]
            key = key_states if every else key_states[:, heads]
            value = value_states if every else value_states[:, heads]
            parts.append(group.update(key, value, self.seen, start))
        self.seen += key_states.shape[2]
        if any(part is None for part in parts):
            return key_states, value_states
        ragged = RaggedKV(parts, self.seen)  # type: ignore[arg-type]
        return ragged, ragged

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """What is held, for code that looks into caches: it gets an error with a way out instead of a wrong tensor."""
        held = []
        for g in self.groups:
            if self.start is None or g.key is None or g.value is None:
                return None
            held.append(KVGroup(g.heads, g.key, g.value, g.columns(self.seen, self.start)))
        return RaggedKV(held, self.seen)

    @keys.setter
    def keys(self, value: Any) -> None:
        """`CacheLayerMixin` sets it to None at first; nothing else may."""
        if value is not None:
            raise CacheError("the keys of a per-head-span cache cannot be replaced; patch with cache='keep'")

    values = keys  # type: ignore[assignment]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks speak of columns, as if nothing had been evicted."""
        return self.seen + int(query_length), 0

    def nbytes(self) -> int:
        """Bytes held for keys and values."""
        return sum(t.untyped_storage().nbytes() for g in self.groups for t in g.tensors())

    def reset(self) -> None:
        self.seen, self.is_initialized = 0, False
        self.set_start(None)
        for group in self.groups:
            group.key = group.value = None
            group.wrapped = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            CacheError: tokens that would have to come back were evicted.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if remove == 0:
            return
        if any(g.wrapped for g in self.groups):
            raise CacheError(
                f"cannot take back {remove} tokens: this cache already evicted tokens that would become visible "
                "again (assisted or contrastive decoding needs that). Patch with cache='keep'"
            )
        for group in self.groups:
            group.apply(lambda t: t[:, :, : self.seen - remove])
        self.seen -= remove

    def _rows(self, change: Any) -> None:
        for group in self.groups:
            group.apply(change)
        if self.start is not None and self.start.shape[0] > 1:
            self.start = change(self.start)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices, ...])

    def offload(self) -> None:
        raise CacheError("cache offloading and per-head spans do not combine; patch with cache='keep'")

    def __repr__(self) -> str:
        spans = ", ".join(f"{list(g.heads)}: {g.sinks}+{g.window or 'all'}" for g in self.groups)
        return f"SpanLayer(kept per KV head {{{spans}}}, seen {self.seen})"
