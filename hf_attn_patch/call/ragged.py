"""K/V with a different span per KV head, as a cache hands it to the attention function.

Heads with equal spans form a group and share one tensor, so a layer costs as much memory as its spans and not
as its longest head. `columns` say which token sits in each slot (-1: empty), which makes slot order free: a
ring buffer needs no rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KVGroup:
    """KV heads that keep the same tokens.

    heads: KV head indices, length n. key [B, n, S_g, D], value [B, n, S_g, Dv]. columns: int64 [B, S_g], or a function
    that makes them when somebody asks. whole: the slots are just what a query of the newest token reads by `span`
    (sinks, window), which the group was kept for.
    """

    def __init__(
        self,
        heads: tuple[int, ...],
        key: Tensor,
        value: Tensor,
        columns: Tensor | Callable[[], Tensor],
        whole: bool = False,
        span: tuple[int, int] | None = None,
    ):
        self.heads, self.key, self.value, self.whole, self.span = heads, key, value, whole, span
        self._columns = columns

    @property
    def columns(self) -> Tensor:
        if not isinstance(self._columns, Tensor):
            self._columns = self._columns()
        return self._columns

    def __repr__(self) -> str:
        return f"KVGroup(heads {list(self.heads)}, {self.key.shape[2]} slots)"


class RaggedKV:
    """Keys *and* values of one layer by groups; travels through a model in the place of both tensors.

    It is not a tensor on purpose: a model that computes with its keys after the cache would silently compute
    with the wrong ones.
    """

    def __init__(self, groups: list[KVGroup], seen: int):
        self.groups = groups
        self.seen = seen

    @property
    def shape(self) -> torch.Size:
        """[B, Hkv, tokens seen, D], the shape of the dense cache it stands for."""
        key = self.groups[0].key
        return torch.Size((key.shape[0], sum(len(g.heads) for g in self.groups), self.seen, key.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.groups[0].key.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys; the values' where the two differ (autocast), so that nobody takes it for plain."""
        return torch.promote_types(self.groups[0].key.dtype, self.groups[0].value.dtype)

    def as_dtype(self, dtype: torch.dtype) -> RaggedKV:
        """The same tokens in another dtype (what the cache holds stays as it is)."""
        return RaggedKV(
            [
                KVGroup(g.heads, g.key.to(dtype), g.value.to(dtype), g._columns, g.whole, g.span)
                for g in self.groups
            ],
            self.seen,
        )

    def size(self, dim: int) -> int:
        return self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            f"torch.{getattr(func, '__name__', func)} got keys of a per-head-span cache (RaggedKV). Either the cache "
            "was filled by a patched model and is now used by an unpatched one (start a new cache), or this "
            "model computes with its keys between cache and attention (patch it with cache='keep')."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"RaggedKV has no attribute {name!r}")
        return type(self).__torch_function__(getattr(Tensor, name), ())

    def __getitem__(self, index: Any) -> Any:
        return type(self).__torch_function__(Tensor.__getitem__, ())

    def __repr__(self) -> str:
        groups = ", ".join(f"{list(g.heads)}: {g.key.shape[2]}" for g in self.groups)
        return f"RaggedKV(slots per KV head {{{groups}}}, seen {self.seen})"
