"""KV-cache layers that keep a different span per KV head: sinks + a ring of recent tokens, really freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..call.ragged import KVGroup, RaggedKV
from ..errors import CacheError
from .group import Group, Span

__all__ = ["Span", "SpanLayer"]


class SpanLayer(DynamicLayer):
    """Cache layer that keeps, per KV head, `sinks` first and `window` last tokens.

    Args:
        spans: (sinks, window) for each KV head; window 0 keeps everything.
        start: int64 [B], column of the first real token of each row (left padding), or None for no padding.
        wait: drop nothing until `settle` has heard that the attention function got just the keys that were cached: a
            model that computes with its keys behind the cache, or caches others than it attends to, keeps them all.

    The first `update` returns the new keys themselves (a prompt attends within itself, the layout says to what); later
    ones return a `RaggedKV`.
    ``get_seq_length()`` is the number of tokens *seen*: positions derive from it.

    Attributes:
        kept_whole: why nothing is dropped after all, or "".
    """

    is_croppable = False

    def __init__(self, spans: list[Span], start: Tensor | None = None, wait: bool = False):
        super().__init__()
        by_span: dict[Span, list[int]] = {}
        for head, span in enumerate(spans):
            by_span.setdefault(span, []).append(head)
        self.groups = [Group(tuple(heads), span) for span, heads in by_span.items()]
        self.seen = 0
        self.wait = wait
        self.kept_whole = ""
        self.pending: tuple[Tensor, Tensor] | None = None
        self.real: Tensor | None = None
        self.set_start(start)

    def set_start(self, start: Tensor | None) -> None:
        """Columns of the first real tokens; may still move for rows that saw nothing but padding so far."""
        self.start = start
        self.last_start = 0 if start is None else int(start.max())

    def set_real(self, real: Tensor) -> None:
        """Rows have padding between their tokens. real: bool [B, columns], True = real token; told in every forward."""
        if self.real is None and self.seen and self.start is not None and not self.kept_whole:
            self._settled()
            for group in self.groups:
                group.choose(self.seen, self.start, real.to(self.start.device))
        self.real = real

    @property
    def waiting(self) -> bool:
        """True while a row of the batch has seen nothing but padding."""
        return self.last_start >= self.seen

    @property
    def spans(self) -> list[Span]:
        """(sinks, window) per KV head."""
        return [s for _, s in sorted((h, (g.sinks, g.window)) for g in self.groups for h in g.heads)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # -- taking tokens in ----------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take in [B, Hkv, L, D] and return what the queries of these tokens may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        if self.start is None:
            self.start = torch.zeros(batch, dtype=torch.long)
        if self.start.shape[0] != batch or self.start.device != key_states.device:
            self.start = self.start.to(key_states.device).expand(batch)
        if self.pending is not None:  # nobody said that its attention got them as they were
            self.keep_whole("its attention module was not called with the keys that it cached")
        seen = self.seen
        self.seen += key_states.shape[2]
        if self.kept_whole:
            return self._whole(key_states, value_states)
        if self.groups[0].key is None:
            if key_states.shape[1] != sum(len(g.heads) for g in self.groups):
                self.kept_whole = f"it caches {key_states.shape[1]} heads, not those of its keys"
                return self._whole(key_states, value_states)
            self.pending = (key_states, value_states)
            if not self.wait or torch.compiler.is_compiling():
                self._settled()
            return key_states, value_states
        parts = []
        for group in self.groups:
            heads = list(group.heads)
            every = len(heads) == key_states.shape[1]
            key = key_states if every else key_states[:, heads]
            value = value_states if every else value_states[:, heads]
            if self.real is not None:
                parts.append(group.update_chosen(key, value, seen, self.real.to(key.device)))
            else:
                parts.append(group.update(key, value, seen, self.start, self.last_start))
        ragged = RaggedKV(parts, self.seen)
        return ragged, ragged

    def settle(self, key: Any, value: Any) -> None:
        """The attention function was called with `key` and `value` behind the first update."""
        if self.pending is None:
            return
        if key is self.pending[0] and value is self.pending[1]:
            self._settled()
        else:
            self.keep_whole("its attention module computes with keys and values behind the cache")

    def _settled(self) -> None:
        """Drop what the first tokens do not need."""
        if self.pending is None:
            return
        (key, value), self.pending = self.pending, None
        assert self.start is not None
        for group in self.groups:
            heads = list(group.heads)
            every = len(heads) == key.shape[1]
            own = (key, value) if every else (key[:, heads], value[:, heads])
            if self.real is None:
                group.first(*own, self.start, self.last_start)
            else:
                group.key, group.value = own[0].clone(), own[1].clone()
                group.choose(self.seen, self.start, self.real.to(key.device))

    def keep_whole(self, reason: str) -> None:
        """Drop nothing from now on, like a dense layer."""
        self.kept_whole = reason
        if self.pending is not None:
            (key, value), self.pending = self.pending, None
            self.groups[0].key, self.groups[0].value = key, value

    def _whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        group = self.groups[0]
        if group.key is not None and group.value is not None:
            key, value = torch.cat([group.key, key], 2), torch.cat([group.value, value], 2)
        group.key, group.value = key, value
        return key, value

    # -- what code that handles caches asks ----------------------------------------------------------------------

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """What is held, for code that looks into caches: it gets an error with a way out instead of a wrong tensor."""
        return self._held("key", 0)

    @keys.setter
    def keys(self, value: Any) -> None:
        """`CacheLayerMixin` sets it to None at first; nothing else may."""
        if value is not None:
            raise CacheError("the keys of a per-head-span cache cannot be replaced; patch with cache='keep'")

    @property
    def values(self) -> Any:  # type: ignore[override]
        """As `keys`."""
        return self._held("value", 1)

    @values.setter
    def values(self, value: Any) -> None:
        """As `keys`."""
        if value is not None:
            raise CacheError(
                "the values of a per-head-span cache cannot be replaced; patch with cache='keep'"
            )

    def _held(self, name: str, number: int) -> Any:
        if self.pending is not None:
            return self.pending[number]
        if self.kept_whole:
            return getattr(self.groups[0], name)
        held = []
        for g in self.groups:
            if self.start is None or g.key is None or g.value is None:
                return None
            held.append(KVGroup(g.heads, g.key, g.value, g.columns(self.seen, self.start)))
        return RaggedKV(held, self.seen)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks speak of columns, as if nothing had been evicted."""
        return self.seen + int(query_length), 0

    def nbytes(self) -> int:
        """Bytes held for keys and values."""
        held = list(self.pending or ()) + [t for g in self.groups for t in g.tensors()]
        return sum(t.untyped_storage().nbytes() for t in held)

    def reset(self) -> None:
        self.seen, self.is_initialized, self.pending, self.real = 0, False, None, None
        self.kept_whole = ""
        self.set_start(None)
        for group in self.groups:
            group.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            CacheError: tokens that would have to come back were evicted.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if remove == 0:
            return
        if not self.kept_whole:
            self._settled()
            if any(g.wrapped for g in self.groups):
                raise CacheError(
                    f"cannot take back {remove} tokens: this cache already evicted tokens that would become visible "
                    "again (assisted or contrastive decoding needs that). Patch with cache='keep'"
                )
        for group in self.groups:
            group.apply(lambda t: t[:, :, : self.seen - remove])
        self.seen -= remove

    def _rows(self, change: Any) -> None:
        if not self.kept_whole:
            self._settled()
        for group in self.groups:
            group.apply(change)
            if group.chosen is not None:
                group.chosen = change(group.chosen)
        if self.start is not None and self.start.shape[0] > 1:
            self.start = change(self.start)
        if self.real is not None and self.real.shape[0] > 1:
            self.real = change(self.real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices, ...])

    def offload(self) -> None:
        raise CacheError("cache offloading and per-head spans do not combine; patch with cache='keep'")

    def __repr__(self) -> str:
        if self.kept_whole:
            return f"SpanLayer(everything kept: {self.kept_whole}; seen {self.seen})"
        spans = ", ".join(f"{list(g.heads)}: {g.sinks}+{g.window or 'all'}" for g in self.groups)
        return f"SpanLayer(kept per KV head {{{spans}}}, seen {self.seen})"
