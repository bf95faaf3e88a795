"""`Conversation`: what outlives one forward, kept *on the cache object*.

A second decoding stream cannot overwrite it, and a copy of a cache takes it along. Without a cache it lives as long as
the forward. Values that belong to rows of the batch follow the rows when the cache reorders, selects or repeats them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MEMORY = "_attn_patch_memory"  # attribute of a cache: {token of a patched model: Conversation}


class Conversation(dict):
    """Facts by name. Those named in `of_the_rows` have one entry per row of the batch (`keep_rows`).

    Attributes:
        prompt_length: column behind the prompt of the current turn; None while it is unknown.
        first_prompt: the same for the first turn. parts: forwards that the prompt of the current turn came in, as far
            as nobody said its length. told: somebody said it (`hap.prompt`, ``generate``).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_the_rows: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """As new: the cache is empty."""
        self.clear()
        self.of_the_rows.clear()
        self.prompt_length: int | None = None
        self.first_prompt: int | None = None
        self.parts = 0
        self.told = False
        self.last_ids: Tensor | None = (
            None  # of the part before, when its last row was taken for the prompt's end
        )

    def learn(self, other: Conversation) -> None:
        """Take over what another one knows."""
        self.update(other)
        self.of_the_rows |= other.of_the_rows
        for name in ("prompt_length", "first_prompt", "parts", "told", "last_ids"):
            setattr(self, name, getattr(other, name))

    def change_rows(self, change: Any) -> None:
        """Apply `change` (a function of tensors) to everything that has rows."""
        for name in self.of_the_rows & self.keys():
            self[name] = _changed(self[name], change)
        self.last_ids = _changed(self.last_ids, change)


def keep_rows(memory: dict[str, Any], name: str, value: Any) -> None:
    """Keep a value that has one entry per row of the batch: a tensor [B, ...] (a first size of 1 stands for every row),
    or a dict of such. It follows the rows of its cache."""
    memory[name] = value
    if isinstance(memory, Conversation):
        memory.of_the_rows.add(name)


def of_rows(memory: dict[str, Any], name: str, batch: int) -> Any:
    """The value `name` for a batch of `batch` rows, None if there is none; beams repeat the rows of their prompt.

    Raises:
        CacheError: the number of rows changed in a way nobody told.
    """
    value = memory.get(name)
    return None if value is None else _changed(value, lambda x: for_batch(x, batch, name))


def for_batch(x: Tensor, batch: int, name: str) -> Tensor:
    """`x` [b, ...] for a batch of `batch` rows: b divides it, and neighbouring rows are beams of one prompt."""
    if x.shape[0] in (1, batch):
        return x
    if batch % x.shape[0]:
        from ..errors import CacheError

        raise CacheError(
            f"{name}: the cache was filled with {x.shape[0]} rows, this forward has {batch}. Change rows with the "
            "cache's own reorder_cache, batch_select_indices or batch_repeat_interleave, which take the facts of the "
            "patches along, or start with a fresh cache"
        )
    return x.repeat_interleave(batch // x.shape[0], 0)


def _changed(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.shape[0] == 1 else change(value)  # one row stands for all
    if isinstance(value, dict):
        return {k: _changed(v, change) for k, v in value.items()}
    return value


def conversation_of(cache: Any, token: str) -> Conversation:
    """The conversation that a patched model keeps on `cache`, made at first."""
    kept = cache.__dict__.setdefault(MEMORY, {})
    if token not in kept:
        kept[token] = Conversation()
        if not torch.compiler.is_compiling():
            _follow_rows(cache)
    return kept[token]


class _Follow:
    """A row operation of one cache object that takes conversations along (an object, so that copies of the cache get
    one of their own)."""

    def __init__(self, cache: Any, name: str):
        self.cache, self.name = cache, name

    def __call__(self, argument: Any) -> Any:
        result = getattr(type(self.cache), self.name)(self.cache, argument)
        for conversation in self.cache.__dict__.get(MEMORY, {}).values():
            conversation.change_rows(_CHANGES[self.name](argument))
        return result


_CHANGES = {
    "reorder_cache": lambda index: lambda x: x.index_select(0, torch.as_tensor(index, device=x.device)),
    "batch_select_indices": lambda index: (
        lambda x: x[index.to(x.device) if isinstance(index, Tensor) else index]
    ),
    "batch_repeat_interleave": lambda repeats: lambda x: x.repeat_interleave(repeats, 0),
}


def _follow_rows(cache: Any) -> None:
    for name in _CHANGES:
        if hasattr(type(cache), name) and name not in cache.__dict__:
            cache.__dict__[name] = _Follow(cache, name)
