"""Reading JSON of a stranger: every bound is checked before the data costs anything, and every refusal is one sentence.

Plain `json.loads` keeps the last of two equal keys, takes NaN, recurses as deep as the file says, and spends minutes on
a number of a million digits.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import AdapterError
from ..options import short

FILE_BYTES = 16 << 20  # ten times the plan of 128 layers x 128 heads with its indentation
DEPTH = 32  # a plan nests five deep
VALUES = 250_000  # that plan has 33 thousand, sizes of columns and diagonals for it 80 thousand
NUMBER = 2**31 - 1  # no text has more tokens, and float32 still holds the square of it
TEXT = 1 << 20  # one text; the blocks of a head of a plan of `paro` take a few thousand characters
SELECTOR_BYTES = 16 << 10  # of ``layers`` and ``heads``, the options they map to aside

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def printable(text: Any, limit: int = 80) -> str:
    """Text of a stranger for a message: one line, cut, nothing a terminal would obey."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def parse(raw: bytes, where: Any, largest: int = NUMBER) -> Any:
    """JSON data of an adapter from its bytes; `largest` bounds its numbers.

    Raises:
        AdapterError: no JSON, or more of anything than an adapter ever has; `where` is named.
    """
    if len(raw) > FILE_BYTES:
        raise AdapterError(
            f"{where} is {len(raw):,} bytes long; an adapter takes at most {FILE_BYTES:,} (its tensors aside)"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{where} is not valid JSON ({error.reason} at byte {error.start}); the file is truncated or was edited"
        ) from None
    _check_depth(text, where)

    def fail(what: str) -> AdapterError:
        return AdapterError(f"{where}: {what}; handle.save() writes nothing like it")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [k for k, _ in items]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise fail(f"key {short(twice)} stands twice in one object, so what it says is not clear")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 24 or abs(int(digits)) > largest:
            raise fail(f"a number of {len(digits)} digits; the largest an adapter may hold is {largest:,}")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits) if len(digits) <= 64 else float("inf")
        if not abs(value) <= largest:
            raise fail(f"the number {printable(digits, 24)}; the largest an adapter may hold is {largest:,}")
        return value

    def constant(name: str) -> float:
        raise fail(f"{name} is no number")

    try:
        data = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"{where} is not valid JSON ({error}); the file is truncated or was edited"
        ) from None
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{where} cannot be read: {type(error).__name__}: {printable(error)}") from None
    _check_size(data, fail)
    return data


def _check_depth(text: str, where: Any) -> None:
    depth = 0
    for match in re.finditer(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if match.group() in "[{" else -1
        if depth > DEPTH:
            raise AdapterError(f"{where} nests more than {DEPTH} deep; handle.save() writes nothing like it")


def _check_size(data: Any, fail: Any) -> None:
    """Bound the number of values and the length of a text, without recursion."""
    left, count = [data], 0
    while left:
        value = left.pop()
        count += 1
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            if len(value) > TEXT:
                raise fail(f"a text of {len(value):,} characters")
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise fail("a text that is no Unicode")
        if count + len(left) > VALUES:
            raise fail(f"more than {VALUES:,} values")


# -- the config of an adapter ---------------------------------------------------------------------------------------

FORMAT = 1
KEYS = {
    "format", "package_version", "method", "config", "part", "layers", "heads", "impl", "cache", "base_model", "sites",
    "tensors",
}  # fmt: skip
OPTIONAL = {"changed"}
_KINDS: dict[str, Any] = {
    "package_version": str, "method": str, "config": dict, "part": (str, type(None)), "impl": str, "cache": str,
    "base_model": dict, "sites": list, "tensors": (dict, type(None)), "changed": list,
    "layers": (int, str, list, dict, type(None)), "heads": (int, str, list, dict, type(None)),
}  # fmt: skip


def check_config(data: Any, file: Any) -> dict[str, Any]:
    """The JSON of an adapter, every key of the type that handle.save() writes.

    Raises:
        AdapterError: incomplete, unknown keys, a newer format, or a value of another type.
    """
    from .. import __version__

    if not isinstance(data, dict):
        raise AdapterError(f"{file} holds a {type(data).__name__}, expected an object")
    unknown = sorted(set(data) - KEYS - OPTIONAL)
    if unknown or data.get("format", FORMAT) != FORMAT:
        shown = ", ".join(printable(k) for k in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise AdapterError(
            f"{file} was written by version {printable(data.get('package_version', '?'))} in format "
            f"{printable(data.get('format', '?'))}"
            + (f" with keys this version does not know: {shown}" if unknown else "")
            + f"; this is version {__version__}, format {FORMAT}. Upgrade hf_attn_patch"
        )
    missing = sorted(KEYS - set(data))
    if missing:
        raise AdapterError(
            f"{file} lacks {', '.join(missing)}; it is truncated or was not written by handle.save()"
        )

    def damaged(what: str) -> AdapterError:
        return AdapterError(f"{file}: {what}; the file was edited or is damaged")

    for key, kinds in _KINDS.items():
        if key in data and (not isinstance(data[key], kinds) or isinstance(data[key], bool)):
            raise damaged(f"{key!r} is {short(data[key])}")
    for key in ("layers", "heads"):
        terms = list(data[key]) if isinstance(data[key], dict) else data[key]
        if (size := len(json.dumps(terms))) > SELECTOR_BYTES:
            raise damaged(f"{key!r} takes {size:,} bytes, at most {SELECTOR_BYTES:,} are read")
    base = data["base_model"]
    if not isinstance(base.get("model_type"), str) or not isinstance(base.get("id", 0), (str, type(None))):
        raise damaged("'base_model' is incomplete")
    for site in data["sites"]:
        if not (
            isinstance(site, dict)
            and isinstance(site.get("path"), str)
            and all(_count(site.get(k, -1)) or site.get(k, -1) is None for k in ("heads", "kv_heads"))
        ):
            raise damaged(f"'sites' holds {short(site)}")
    if len({site["path"] for site in data["sites"]}) != len(data["sites"]):
        raise damaged("'sites' names one site twice")
    for name, shape in (data["tensors"] or {}).items():
        if not isinstance(shape, list) or not all(map(_count, shape)):
            raise damaged(f"'tensors' gives {printable(name)} the shape {short(shape)}")
    if any(name not in (data["tensors"] or {}) for name in map(str, data.get("changed", ()))):
        raise damaged("'changed' names tensors that are not there")
    return data


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0
