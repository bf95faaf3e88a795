"""Options as text: ``streaming:sinks=4,window=256,layers=0-3`` becomes a name and typed values.

One syntax for patches and tasks. Types come from the dataclass fields of the class; values may be JSON, and commas
inside ``[]`` or ``{}`` do not separate options. Index selections may hold commas too: in ``layers=0-3,-2:`` the second
piece has no ``=`` and so continues the first. A selection may be a JSON mapping to option overrides, as in Python:
``layers={"1::2":{"shift":4}}``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

# arguments of `hap.patch` that say where and how, and are not options of one method
SCOPE: dict[str, Any] = {"part": str, "layers": str | dict, "heads": str | dict, "impl": str, "cache": str}
_CONTINUED = ("layers", "heads")


class SpecError(ValueError):
    """A patch or task given as text that cannot be understood; the message names option, value and way out."""


@dataclass(frozen=True)
class PatchSpec:
    """A patch by name with typed options: ``hap.patch(model, spec.name, **spec.options)``."""

    name: str
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """The shortest text that names it: ``streaming(sinks=4, window=256)``."""
        inner = ", ".join(f"{k}={_short(v)}" for k, v in self.options.items())
        return f"{self.name}({inner})" if inner else self.name


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value`` as (name, raw values).

    Raises:
        SpecError: no name, a piece without ``=``, an option given twice, or brackets that do not close.
    """
    name, _, rest = text.strip().partition(":")
    if not name:
        raise SpecError(f"{text!r} has no name. Write NAME or NAME:key=value,key=value.")
    return name, split_options(rest, name)


def split_options(text: str, name: str) -> dict[str, str]:
    """``key=value,key=value`` as raw values, commas inside brackets respected."""
    raw: dict[str, str] = {}
    last = ""
    for piece in _pieces(text, name):
        key, equals, value = piece.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            if last in _CONTINUED:
                raw[last] += f",{piece.strip()}"
                continue
            raise SpecError(f"{name}: {piece.strip()!r} is not key=value. Write {name}:key=value,key=value.")
        if key in raw:
            raise SpecError(f"{name}: option {key!r} is given twice ({raw[key]!r} and {value.strip()!r}).")
        raw[key] = value.strip()
        last = key
    return raw


def _pieces(text: str, name: str) -> list[str]:
    pieces, depth, start, quoted = [], 0, 0, False
    for i, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
        if depth < 0:
            break
    if depth != 0 or quoted:
        raise SpecError(f"{name}: brackets or quotes do not close in {text!r}.")
    pieces.append(text[start:])
    return [p for p in pieces if p.strip()]


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The text that `split_spec` reads back: ``name:key=value,key=value`` with JSON for lists and mappings."""

    def plain(value: Any) -> str:
        if isinstance(value, str):
            return value
        return json.dumps(value, separators=(",", ":"), default=str)

    inner = ",".join(f"{k}={plain(v)}" for k, v in options.items())
    return f"{name}:{inner}" if inner else name


def parse_patch_spec(text: str) -> PatchSpec:
    """A patch as text, with values typed by the fields of its class.

    Raises:
        SpecError: syntax, unknown option, or a value of the wrong type.
        PatchError: unknown patch.
    """
    name, raw = split_spec(text)
    return PatchSpec(name, typed_options(name, patch_class(name), raw, SCOPE))


def patch_class(name: str) -> type:
    """The class of a registered patch (its fields are its options)."""
    from .. import registry

    return registry.get(name)


def parse_task_spec(text: str) -> Any:
    """A task as text, as a ready `Task`.

    Raises:
        SpecError, TaskError.
    """
    from . import registry

    name, raw = split_spec(text)
    cls = registry.get(name)
    return cls(**typed_options(name, cls, raw, {}))


def option_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Fields of a config class that a user may set, by name."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}


def typed_options(name: str, cls: type, raw: Mapping[str, str], scope: Mapping[str, Any]) -> dict[str, Any]:
    """Raw text values as values of the types that the fields of `cls` declare.

    Raises:
        SpecError: unknown option (with the nearest and all valid ones), or a value of the wrong type.
    """
    fields = option_fields(cls)
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # a hint that only a type checker can see; JSON or text is then the best guess
        hints = {}
    options: dict[str, Any] = {}
    for key, value in raw.items():
        if key in fields:
            hint = hints.get(key, Any)
        elif key in scope:
            hint = scope[key]
        else:
            near = difflib.get_close_matches(key, [*fields, *scope], n=1, cutoff=0.5)
            hint_text = f" Did you mean {near[0]!r}?" if near else ""
            where = f"; where and how: {', '.join(scope)}" if scope else ""
            raise SpecError(
                f"{name}: no option {key!r}.{hint_text} Options: {', '.join(fields) or 'none'}{where}."
            )
        try:
            options[key] = coerce(value, hint)
        except ValueError as error:
            raise SpecError(f"{name}: option {key}={value!r} is not {describe_type(hint)}.") from error
    return options


def describe_type(hint: Any) -> str:
    """A type in words a user of the command line understands."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return {"int": "an int", "float": "a number", "bool": "true or false", "str": "text"}.get(
            hint.__name__, hint.__name__
        )
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in typing.get_args(hint))
    return "null" if hint is type(None) else str(hint).replace("typing.", "")


def coerce(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`.

    Raises:
        ValueError: it is not one.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return coerce(text, args[0])
    if origin in (Union, types.UnionType):
        return _coerce_union(text, args)
    if origin is Literal:
        for value in args:
            if str(value) == text:
                return value
        raise ValueError(text)
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError(text)
    if hint is bool:
        lowered = text.lower()
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise ValueError(text)
    if hint is int:
        return int(text)
    if hint is float:
        return float(text)
    if hint is str:
        return text
    if hint is Path:
        return Path(text)
    container = origin or hint
    if isinstance(container, type) and issubclass(container, Mapping):
        return _json(text, dict)
    if isinstance(container, type) and issubclass(container, Sequence):
        values = _json(text, list) if text.startswith("[") else [_loose(text)]
        inner = (
            args[0] if args and not (container is tuple and len(args) == 2 and args[1] is not ...) else Any
        )
        values = [_checked(v, inner) for v in values]
        return tuple(values) if container is tuple else values
    return _loose(text)


def _coerce_union(text: str, args: tuple[Any, ...]) -> Any:
    # text goes last: everything is text, so it would hide the narrower types
    for option in sorted(args, key=lambda a: (a is str, a is not type(None))):
        if isinstance(typing.get_origin(option) or option, type) and text[:1] not in "[{":
            container = typing.get_origin(option) or option
            if container in (list, tuple, Sequence, dict, Mapping) and len(args) > 1:
                continue  # a bare scalar is meant as the scalar member of the union
        try:
            return coerce(text, option)
        except ValueError:
            continue
    raise ValueError(text)


def _json(text: str, kind: type) -> Any:
    value = json.loads(text)  # its error is a ValueError
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


def _loose(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(value: Any, hint: Any) -> Any:
    """A JSON value inside a list, checked against the item type (bool is no int here)."""
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(str(value))
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(str(value))
        return float(value)
    if hint is bool and not isinstance(value, bool):
        raise ValueError(str(value))
    if isinstance(value, list):
        args = typing.get_args(hint)
        container = typing.get_origin(hint) or hint
        inner = [_checked(v, args[0] if args else Any) for v in value]
        return tuple(inner) if container is tuple else inner
    return value
