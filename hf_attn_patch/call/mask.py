"""`Mask`: who may see whom in one forward, kept as O(L + S) facts instead of an L x S tensor.

transformers asks a *mask function* for a mask once per forward (``masking_utils.create_causal_mask`` and
friends) and passes what it returns, untouched, to every attention module. Ours returns a `Mask`. Executors ask
it for the small pieces they need (`Mask.block`); the dense tensor exists only if somebody insists.

Coordinates are *columns*: index of a token in the padded sequence, counted over everything the cache has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .guest import Guest
from .transformers_rules import facts_of, is_packed, remapped, rule_parts


def first_true(flags: Tensor) -> Tensor:
    """Index of the first True of each row of [B, S], int64 [B]; S where there is none."""
    return torch.where(flags.any(-1), flags.to(torch.int8).argmax(-1), flags.shape[-1])


def _seen(given: Tensor) -> Tensor:
    """A given mask, bool or additive float, as visibility."""
    return given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2


def _unseen_left(given: Tensor, batch: int) -> Tensor | None:
    """Padding [B|1, S] that a given causal mask [B|1, H|1, L, S] implies: the columns at the left end of a row that no
    query sees (positions, and with them sinks, count from the first real token); None if there are none."""
    if given.shape[0] not in (1, batch):
        return None
    start = first_true(_seen(given).flatten(1, 2).any(1))
    if not bool(start.any()):
        return None
    return torch.arange(given.shape[-1], device=given.device) >= start[:, None]


class fact:
    """A property computed once. (Before Python 3.12 `functools.cached_property` holds a lock, which torch.compile
    cannot trace.)"""

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = self.compute(instance)
        instance.__dict__[self.name] = value
        return value


@dataclass(eq=False)  # == on a guest compares elements, as on the tensor it stands for
class Mask(Guest):
    """Visibility of keys for queries, as facts.

    Attributes:
        batch: B.
        q_len, kv_len: L and S of the attention call.
        q_offset: column of the first query; kv_offset: column of the first key.
        causal: a query sees no later key. window: at most this many keys, its own included (sliding layers).
        padding: bool [B, >= kv_offset + kv_len], True = real token; None = no padding.
        rule: transformers' mask function (b, h, q, kv) -> bool when causal/window do not say everything.
        given: a 4-D mask that a model or user brought along, [B|1, H|1, L, S], bool or additive float.
    """

    batch: int
    q_len: int
    kv_len: int
    q_offset: int = 0
    kv_offset: int = 0
    causal: bool = False
    window: int | None = None
    padding: Tensor | None = None
    rule: Callable | None = None
    given: Tensor | None = None
    device: torch.device | str = "cpu"
    flavour: str = "sdpa"
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    _native: dict[str, Any] = field(default_factory=dict, repr=False)

    # -- construction ---------------------------------------------------------------------------------------

    @classmethod
    def from_transformers(cls, flavour: str = "sdpa", **arguments: Any) -> Mask:
        """Build from the keyword arguments that transformers hands to a mask function."""
        # a static cache tells its length by a tensor that its next update changes in place: copy facts when read
        counts = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim == 0}
        arguments = {**arguments, **counts}
        rule = arguments.get("mask_function")
        causal, window, opaque = facts_of(rule)
        padding = arguments.get("attention_mask")
        end = int(arguments["kv_length"]) + int(arguments.get("kv_offset", 0))
        if padding is not None and padding.shape[-1] < end:  # static caches are longer than what was seen
            padding = torch.nn.functional.pad(padding, (0, end - padding.shape[-1]))
        return cls(
            batch=int(arguments["batch_size"]),
            q_len=int(arguments["q_length"]),
            kv_len=int(arguments["kv_length"]),
            q_offset=int(arguments.get("q_offset", 0)),
            kv_offset=int(arguments.get("kv_offset", 0)),
            causal=causal,
            window=window,
            padding=padding,
            rule=rule if opaque else None,
            device=arguments.get("device", "cpu"),
            flavour=flavour,
            arguments=arguments,
        )

    @classmethod
    def of(cls, mask: Any, query: Tensor, key: Any, *, causal: bool) -> Mask:
        """Whatever arrived at an attention function as `attention_mask`, as a `Mask`.

        `causal` says what a missing mask means for this module (transformers leaves it to ``module.is_causal``).
        """
        if isinstance(mask, Mask):
            return mask
        batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
        common = dict(batch=batch, q_len=q_len, kv_len=kv_len, device=query.device)
        if mask is None:
            offset = kv_len - q_len if causal else 0
            return cls(**common, causal=causal and q_len > 1, q_offset=offset)
        if mask.ndim == 2:  # flash-style [B, S]
            return cls(**common, causal=causal, padding=mask.bool(), q_offset=kv_len - q_len if causal else 0)
        given = mask[..., :kv_len]
        padding = _unseen_left(given, batch) if causal and given.shape[-1] == kv_len else None
        return cls(**common, given=given, padding=padding, q_offset=kv_len - q_len if q_len <= kv_len else 0)

    # -- facts ----------------------------------------------------------------------------------------------

    @fact
    def has_padding(self) -> bool:
        """True if any key that could be seen is padding."""
        if self.padding is None:
            return False
        if torch.compiler.is_compiling():  # nobody can look: there may be
            return True
        return not bool(self.padding[:, self.kv_offset : self.kv_offset + self.kv_len].all())

    @fact
    def start(self) -> Tensor:
        """Column of the first real token of each row, int64 [B]; past the end for a row of padding only."""
        if self.padding is None:
            return torch.zeros(self.batch, dtype=torch.long, device=self.device)
        return first_true(self.padding).expand(self.batch)

    @fact
    def starts(self) -> list[int]:
        """`start` as Python ints (one device synchronisation per forward)."""
        return [0] * self.batch if self.padding is None else self.start.tolist()

    @fact
    def real_spans(self) -> list[tuple[int, int]] | None:
        """Per row of the batch the columns [first, end) of the real keys that are there; None if some row has holes.

        A row of padding only has an empty span. One device synchronisation per forward.
        """
        end = self.kv_offset + self.kv_len
        if self.causal:
            end = min(end, self.q_offset + self.q_len)
        if not self.has_padding:
            return [(self.kv_offset, end)] * self.batch
        assert self.padding is not None
        real = self.padding[:, self.kv_offset : end].expand(self.batch, -1)
        first, count = real.to(torch.int8).argmax(-1), real.sum(-1)
        columns = torch.arange(real.shape[1], device=real.device)
        solid = (columns >= first[:, None]) & (columns < (first + count)[:, None])
        if not torch.equal(solid, real.bool()):
            return None
        first = first + self.kv_offset
        return [(a, a + n) for a, n in zip(first.tolist(), count.tolist())]

    @fact
    def holes(self) -> bool:
        """True if a row has padding between its real tokens (a later turn of a batched chat)."""
        if self.padding is None:
            return False
        return torch.compiler.is_compiling() or self.real_spans is None  # nobody can look: there may be

    @fact
    def positions(self) -> Tensor | None:
        """Position of the token at each column, int64 [B, columns]: the number of real tokens before it. None where
        that is the column less `start`; while torch.compile traces, it is counted whatever the padding is."""
        if not self.holes:
            return None
        assert self.padding is not None
        return self.padding.expand(self.batch, -1).long().cumsum(1) - self.padding.long()

    def positions_at(self, cols: Tensor) -> Tensor:
        """Positions of the tokens at columns int64 [n] or [B, n] (an empty slot, -1: negative); [B, 1, 1, n]."""
        if self.positions is None:
            return self.columns_from_start(cols)
        columns = cols.reshape(1, 1, 1, -1) if cols.ndim == 1 else cols[:, None, None, :]
        known = self.positions.to(cols.device)
        index = cols.clamp(0, known.shape[1] - 1).expand(self.batch, -1)
        found = torch.gather(known, 1, index)[:, None, None, :] + (columns - known.shape[1] + 1).clamp(min=0)
        return torch.where(columns < 0, -1, found)

    def columns_from_start(self, cols: Tensor) -> Tensor:
        """Columns int64 [n] or [B, n] counted from the first real token of each row; [B, 1, 1, n]."""
        columns = cols.reshape(1, 1, 1, -1) if cols.ndim == 1 else cols[:, None, None, :]
        return columns - self.start.to(cols.device).reshape(-1, 1, 1, 1)

    def without_packing(self) -> Mask:
        """This mask without the rule that keeps packed sequences apart (torch.compile adds it to every call without a
        mask, since it cannot look at position ids)."""
        causal, window, opaque = self.causal, self.window, False
        for part in rule_parts(self.rule) if self.rule is not None else ():
            if is_packed(part):
                continue
            if getattr(part, "__qualname__", "").startswith("remap_positions_for_packed_sequence."):
                part = remapped(part)
            more = facts_of(part)
            causal, window, opaque = (
                causal or more[0],
                more[1] if window is None else window,
                opaque or more[2],
            )
        if opaque:
            return self
        return replace(self, causal=causal, window=window, rule=None, arguments={}, _native={})

    @fact
    def packed(self) -> bool:
        """True if rows hold several sequences, told apart by restarting position ids."""
        return is_packed(self.rule)

    @property
    def restricts(self) -> bool:
        """False if every query sees every key."""
        return self.causal or self.window is not None or not self.arithmetic or self.has_padding

    @property
    def arithmetic(self) -> bool:
        """True if causal + window + padding say everything (no opaque rule, no given tensor)."""
        return self.rule is None and self.given is None

    @property
    def query_columns(self) -> Tensor:
        return torch.arange(self.q_offset, self.q_offset + self.q_len, device=self.device)

    @property
    def key_columns(self) -> Tensor:
        return torch.arange(self.kv_offset, self.kv_offset + self.kv_len, device=self.device)

    # -- pieces ---------------------------------------------------------------------------------------------

    def block(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Visibility of keys at `cols` for queries at `rows`.

        Args:
            rows: int64 [Lq] query columns.
            cols: int64 [Sk], or [B, Sk] when rows of the batch hold different keys; -1 marks an empty slot.

        Returns:
            bool [B|1, H|1, Lq, Sk].
        """
        k = cols.reshape(1, 1, 1, -1) if cols.ndim == 1 else cols[:, None, None, :]
        q = rows.reshape(1, 1, -1, 1)
        allowed = k >= 0
        if self.causal:
            allowed = allowed & (k <= q)
        if self.window is not None:
            allowed = allowed & (k > q - self.window)
        safe = k.clamp(min=0)
        if self.has_padding:
            assert self.padding is not None
            real = self.padding.expand(self.batch, -1)
            allowed = (
                allowed & torch.gather(real, 1, safe.expand(self.batch, 1, 1, -1)[:, 0, 0])[:, None, None]
            )
        if self.rule is not None:
            if self.arguments.get("use_vmap"):
                dense = self.dense()
                b = torch.arange(self.batch, device=q.device).reshape(-1, 1, 1, 1)
                allowed = allowed & dense[b, 0, q - self.q_offset, safe - self.kv_offset]
            else:
                b = torch.arange(self.batch, device=q.device).reshape(-1, 1, 1, 1)
                h = torch.zeros_like(b)
                allowed = allowed & self.rule(b, h, q, safe)
        if self.given is not None:
            given = self._given(rows, cols)
            allowed = allowed & _seen(given)
        return allowed.expand(-1, -1, rows.numel(), -1)

    def bias(self, rows: Tensor, cols: Tensor) -> Tensor | None:
        """Additive part of a given float mask, [B|1, H|1, Lq, Sk], or None."""
        if self.given is None or self.given.dtype == torch.bool:
            return None
        given = self._given(rows, cols)
        return given.masked_fill(given <= torch.finfo(given.dtype).min / 2, 0.0)

    def _given(self, rows: Tensor, cols: Tensor) -> Tensor:
        assert self.given is not None
        r = rows - self.q_offset if self.given.shape[-2] > 1 else torch.zeros_like(rows)
        part = self.given[:, :, r]
        c = (cols - self.kv_offset).clamp(min=0)
        if c.ndim == 1:
            return part[..., c]
        index = c[:, None, None, :].expand(-1, part.shape[1], part.shape[2], -1)
        return torch.gather(part.expand(c.shape[0], -1, -1, -1), 3, index)

    def dense(self) -> Tensor:
        """bool [B, H|1, L, S]; O(L * S) memory, built by transformers itself where the rule is transformers'."""
        if self.given is not None or not self.arguments:
            return self.block(self.query_columns, self.key_columns).expand(self.batch, -1, -1, -1)
        from transformers.masking_utils import sdpa_mask

        skip = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        if "dense" not in self._native:
            self._native["dense"] = sdpa_mask(**{**self.arguments, **skip})
        return self._native["dense"]

    def native(self, implementation: str) -> Any:
        """The mask exactly as transformers would have given it to `implementation` (cached: layers share it)."""
        if not self.arguments:
            return self.given
        if implementation not in self._native:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

            # an implementation without a mask function of its own gets None from transformers, so we do the same
            make = masks[implementation] if implementation in masks else (lambda **_: None)
            self._native[implementation] = make(**self.arguments)
        return self._native[implementation]

    def __repr__(self) -> str:
        facts = [f"B={self.batch}", f"L={self.q_len}@{self.q_offset}", f"S={self.kv_len}@{self.kv_offset}"]
        facts += ["causal"] if self.causal else []
        facts += [f"window={self.window}"] if self.window is not None else []
        facts += ["padded"] if self.padding is not None else []
        facts += ["custom rule"] if self.rule is not None else []
        facts += [f"given {self.given.dtype}"] if self.given is not None else []
        return f"Mask({', '.join(facts)})"
