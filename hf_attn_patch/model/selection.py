"""Which layers and heads a patch applies to: ints, slices, strings like "0-3,-2:", or a mapping to overrides."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SelectionError
from ..options import short

TERMS = 4096  # of one text: more than any model has heads
Selector = int | slice | str | Iterable[Any] | Mapping[Any, dict[str, Any]] | None


def _text(term: str, size: int, what: str) -> list[int]:
    term = term.strip()
    if term in ("all", "*"):
        return list(range(size))
    if match := re.fullmatch(r"(-?\d{1,9})", term):
        return [_index(int(match[1]), size, what)]
    if match := re.fullmatch(r"(\d{1,9})-(\d{1,9})", term):  # inclusive, as people write page ranges
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise SelectionError(f"{what} range {term!r} runs backwards")
        return list(range(_index(first, size, what), _index(last, size, what) + 1))
    if match := re.fullmatch(
        r"(-?\d{1,9})?:(-?\d{1,9})?(?::(-?\d{1,9}))?", term
    ):  # Python slice, end excluded
        return _slice(slice(*(int(p) if p else None for p in match.groups())), size, what)
    raise SelectionError(
        f"cannot read {what} selector {short(term)}; use 3, -1, 0-3 (inclusive), 2:8 or -2: (Python slices), "
        "comma-joined"
    )


def _index(value: int, size: int, what: str) -> int:
    index = value + size if value < 0 else value
    if not 0 <= index < size:
        raise SelectionError(
            f"{what} {short(value)} does not exist: there are {size}, numbered 0 to {size - 1}"
        )
    return index


def _is_index(value: Any) -> bool:
    """True for integers, those of numpy and torch included (arrays have ``__index__`` too)."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _slice(value: slice, size: int, what: str) -> list[int]:
    if value.step == 0:
        raise SelectionError(f"{what} slice {plain(value)!r} has a step of 0")
    return list(range(size))[value]


def settled(selector: Selector) -> Selector:
    """`selector` with one-time iterables turned into lists, because it is read more than once."""
    once = (
        isinstance(selector, Iterable)
        and not isinstance(selector, (str, Mapping))
        and not _is_index(selector)
    )
    return list(selector) if once else selector  # type: ignore[arg-type]


def indices(selector: Selector, size: int, what: str) -> list[int]:
    """Sorted indices in 0..size-1 that `selector` names.

    Args:
        what: "layer", "query head" or "KV head", for the error message.

    Raises:
        SelectionError: an index that does not exist, or text that cannot be read.
    """
    try:
        return _indices(selector, size, what)
    except RecursionError:
        raise SelectionError(f"{what} selector is nested too deep; use a flat list of indices") from None


def _indices(selector: Selector, size: int, what: str) -> list[int]:
    if selector is None:
        return list(range(size))
    if isinstance(selector, bool):
        raise SelectionError(f"{what} selector is {short(selector)}; use indices, slices or text")
    if _is_index(selector):
        return [_index(operator.index(selector), size, what)]  # type: ignore[arg-type]
    if isinstance(selector, slice):
        return _slice(selector, size, what)
    if isinstance(selector, str):
        if selector.count(",") >= TERMS:
            raise SelectionError(
                f"{what} selector names {selector.count(',') + 1} terms, there are {size}; at most {TERMS} are read"
            )
        return sorted({i for term in selector.split(",") for i in _text(term, size, what)})
    if isinstance(selector, Mapping):
        return sorted({i for key in selector for i in _indices(key, size, what)})
    if isinstance(selector, Iterable):
        return sorted({i for item in selector for i in _indices(item, size, what)})
    raise SelectionError(
        f"{what} selector has type {type(selector).__name__}; use ints, slices, text or a mapping"
    )


def overrides(selector: Selector, index: int, size: int, what: str) -> dict[str, Any]:
    """Config overrides that a mapping selector gives index (later patterns win); {} for other selectors."""
    found: dict[str, Any] = {}
    if isinstance(selector, Mapping):
        for key, options in selector.items():
            if not isinstance(options, Mapping):
                raise SelectionError(
                    f"{what} pattern {short(key)} maps to {short(options)}; expected a dict of options"
                )
            if index in indices(key, size, what):
                found.update(options)
    return found


def plain(selector: Selector) -> Any:
    """`selector` as JSON data that `indices` reads back."""
    if selector is None or isinstance(selector, (int, str)):
        return selector
    if _is_index(selector):
        return operator.index(selector)  # type: ignore[arg-type]
    if isinstance(selector, slice):
        text = f"{'' if selector.start is None else selector.start}:{'' if selector.stop is None else selector.stop}"
        return text + (f":{selector.step}" if selector.step is not None else "")
    if isinstance(selector, Mapping):
        return {_key(k): dict(v) for k, v in selector.items()}
    return [plain(item) for item in selector]


def _key(pattern: Any) -> str:
    """A mapping's pattern as text, because JSON has no other keys: (0, 2) -> "0,2"."""
    value = plain(pattern)
    return ",".join(map(_key, value)) if isinstance(value, list) else str("all" if value is None else value)
