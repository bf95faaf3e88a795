"""Options of a method: dataclass fields that are configuration, command-line options and JSON at once.

An option that takes a path is marked ``option(..., path=True)``, and a method opens files through `option_file` only.
Both refuse inside `from_a_stranger`, the block in which an adapter is loaded: an adapter carries its data itself, and
one that names a file instead would have us read a file of this machine for whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import AdapterError, ConfigError

_stranger: ContextVar[bool] = ContextVar("hf_attn_patch_options_of_a_stranger", default=False)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    default_factory: Any = dataclasses.MISSING,
    path: bool | None = None,
    known: Iterable[str] = (),
) -> Any:
    """A dataclass field with a help text (shown by ``hf-attn-patch info``).

    Args:
        path: text given for it is a path (default: yes if the type is data or text, ``dict | str``).
        known: texts that are no path but names of a table (``dims="llama-2-7b"``).
    """
    metadata = {"help": help, "path": path, "known": tuple(known)}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def option_fields(cls: type) -> list[dataclasses.Field]:
    """The fields of a method that are options (private state of a dataclass is not)."""
    return [f for f in dataclasses.fields(cls) if f.init]


def takes_path(field: dataclasses.Field, hint: Any) -> bool:
    """True if text given for the option is a path. A field nobody marked is one if it takes text beside data."""
    marked = field.metadata.get("path")
    if marked is not None:
        return marked
    kinds = [typing.get_origin(k) or k for k in typing.get_args(hint)]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    data = (dict, list, tuple, set, frozenset)
    return hint is Any or (is_union and (str in kinds) and any(k in data for k in kinds))


# -- data of a stranger ---------------------------------------------------------------------------------------------


@contextmanager
def from_a_stranger() -> Iterator[None]:
    """Inside, options are those of an adapter: none of them may be a path, and `option_file` opens nothing."""
    token = _stranger.set(True)
    try:
        yield
    finally:
        _stranger.reset(token)


def refuse_paths(
    name: str, fields: dict[str, dataclasses.Field], hints: dict[str, Any], options: Any
) -> None:
    """Inside `from_a_stranger`: no option holds text where data is expected.

    Raises:
        AdapterError: one does; nothing was opened.
    """
    if not _stranger.get():
        return
    for key, value in options.items():
        field = fields[key]
        if isinstance(value, str) and value not in field.metadata.get("known", ()):
            if takes_path(field, hints[key]):
                raise _named_a_file(name, key)


def option_file(name: str, option_name: str, path: str, what: str = "", missing: str = "") -> str:
    """Text of the file that the option of a method names: the one way a method opens a file.

    Args:
        what: what is said before the path ("plan file"). missing: what is said after it if there is no such file.

    Raises:
        ConfigError: no such file, or no text. AdapterError: an adapter names it (see `from_a_stranger`).
    """
    if _stranger.get():
        raise _named_a_file(name, option_name)
    shown = f"{what} {path!r}" if what else f"{option_name}={path!r}"
    try:
        if not Path(path).is_file():
            raise ConfigError(f"{name}: {shown} {missing or 'does not exist'}")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: {shown} cannot be read as text: {error}") from None


def _named_a_file(name: str, option_name: str) -> AdapterError:
    return AdapterError(
        f"{name}: option {option_name!r} of this adapter is text, expected data. handle.save() writes the data itself; "
        "an adapter may not name files of this machine, so nothing was opened. Save it anew, or give the file "
        f"yourself: hap.patch(model, {name!r}, {option_name}=PATH)"
    )


# -- values ---------------------------------------------------------------------------------------------------------


def short(value: Any, limit: int = 80) -> str:
    """`repr` of a value, cut: for messages about values that may be huge."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer with more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def plain(value: Any) -> Any:
    """`value` as JSON data."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value


def typed(name: str, option_name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type (lists become tuples, ints become floats).

    Raises:
        ConfigError: it cannot be; option, value, type and expectation are named.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def fail() -> ConfigError:
        text = getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
        return ConfigError(
            f"{name}: {option_name}={short(value)} has type {type(value).__name__}, expected {text}"
        )

    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return typed(name, option_name, value, choice)
            except ConfigError:
                continue
        raise fail()
    if hint is type(None):
        if value is None:
            return None
        raise fail()
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{name}: {option_name}={short(value)} is not one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise fail()
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(typed(name, option_name, v, args[0]) for v in value)
        if len(args) != len(value):
            raise fail()
        return tuple(typed(name, option_name, v, a) for v, a in zip(value, args))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise fail()
        return [typed(name, option_name, v, args[0]) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise fail()
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise fail()
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise fail()
    if hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise fail() from None
        raise fail()
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise fail()
