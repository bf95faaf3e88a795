"""Methods by name: the `Patch` base class and an open, lazy registry.

A method is one dataclass in ``patches/``. Its fields are its configuration, its command-line options and its
JSON at once. Listing methods imports none of them: built-ins are kept as "module:Class" strings with a summary,
third-party ones come from the entry-point group ``hf_attn_patch.patches``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from .errors import ConfigError, RegistrationError, UnknownPatchError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from .call.program import Program
    from .forward.running import Running
    from .install.stack import Call
    from .model.sites import Site

GROUP = "hf_attn_patch.patches"


def option(
    default: Any = dataclasses.MISSING, *, help: str, default_factory: Any = dataclasses.MISSING
) -> Any:
    """A dataclass field with a help text (shown by ``hf-attn-patch info``)."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"help": help})


@dataclass
class Patch:
    """Base of all methods. Subclass it as a dataclass; decorate with `register_patch`.

    Class attributes a method may set:
        paper, arxiv: source. parts: parts of a model where the method makes sense. default_part: part it takes when
        the user names none (None = every part in `parts` the model has).
        needs: facts of the running forward (`forward.needs`; a property where they depend on options).
        exclusive: resources of a site that at most one patch may take, e.g. {"operator"}. causal_only: refuse
        bidirectional sites. head_selectable: accepts ``heads=``. frees_cache: has `spans`. trainable: has
        parameters with gradients. counts: whether it counts tokens of a sequence, by a rule of `call.rules`
        ("rule") or already in `edit` ("edit": blocks, spans); rows that are no plain sequences are cut for it.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ("text", "vision", "audio", "encoder", "decoder", "cross")
    default_part: ClassVar[str | None] = None
    needs: ClassVar[tuple[Any, ...]] = ()
    exclusive: ClassVar[frozenset[str]] = frozenset()
    causal_only: ClassVar[bool] = False
    counts: ClassVar[Literal["", "rule", "edit"]] = ""
    head_selectable: ClassVar[bool] = True
    frees_cache: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    without_site: ClassVar[str] = (
        ""  # what to do with a model that has no attention site (end of that refusal)
    )

    def validate(self) -> None:
        """Check values that need no model. Raises `ConfigError`."""

    def check(self, site: Site) -> None:
        """Check one site before anything is changed. Raises `ModelMismatchError`."""

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        """Check the model as a whole; returns warnings for the plan. Raises `ModelMismatchError`."""
        return []

    def watches(self, model: Any) -> list[Site]:
        """Sites of other parts whose calls `edit` is shown as well (``call.part`` tells), whatever layers= says."""
        return []

    def tensors(self, site: Site) -> dict[str, Tensor]:
        """Tensors the site needs: parameters (trainable) or buffers, by name; saved with the adapter."""
        return {}

    def edit(self, program: Program, call: Call) -> None:
        """Edit one attention call in place."""
        raise NotImplementedError

    def spans(self, facts: dict[str, Any], context: Running | None) -> list[tuple[int, int]] | None:
        """(sinks, window) per KV head that the cache must keep (window 0 = everything); None = all of them."""
        return None

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        """Options that leave `model` as it is, for the neutral-value test; None if the method has none."""
        return None

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        """Options worth testing on a small `model` (the conformance suite runs every contract on each)."""
        return [{}]

    # -- config <-> JSON ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Options as plain JSON data."""
        return {f.name: _plain(getattr(self, f.name)) for f in option_fields(type(self))}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Patch:
        """Build and validate from options.

        Raises:
            ConfigError: unknown option, wrong type or value out of range; the message names all of it.
        """
        fields = {f.name: f for f in option_fields(cls)}
        unknown = [k for k in options if k not in fields]
        if unknown:
            hints = "".join(did_you_mean(k, fields) for k in unknown)
            raise ConfigError(
                f"{cls.name}: unknown option {', '.join(map(repr, unknown))}.{hints} "
                f"Options: {', '.join(fields) or 'none'}"
            )
        hints_of = typing.get_type_hints(cls)
        typed = {k: _typed(cls.name, k, v, hints_of[k]) for k, v in options.items()}
        missing = [
            f.name
            for f in fields.values()
            if f.name not in typed
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.name}: option {', '.join(map(repr, missing))} is required")
        config = cls(**typed)
        config.validate()
        return config

    def require(self, condition: bool, field: str, meaning: str) -> None:
        """Raise `ConfigError` for `field` unless `condition`: ``self.require(self.window >= 1, "window", ">= 1")``."""
        if not condition:
            raise ConfigError(
                f"{self.name}: {field}={getattr(self, field)!r} is out of range, expected {meaning}"
            )


def option_fields(cls: type[Patch]) -> list[dataclasses.Field]:
    """The fields of a method that are options (private state of a dataclass is not)."""
    return [f for f in dataclasses.fields(cls) if f.init]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _typed(name: str, option_name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type (lists become tuples, ints become floats); ConfigError if it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def fail() -> ConfigError:
        text = getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
        return ConfigError(
            f"{name}: {option_name}={value!r} has type {type(value).__name__}, expected {text}"
        )

    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return _typed(name, option_name, value, choice)
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
        raise ConfigError(f"{name}: {option_name}={value!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise fail()
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_typed(name, option_name, v, args[0]) for v in value)
        if len(args) != len(value):
            raise fail()
        return tuple(_typed(name, option_name, v, a) for v, a in zip(value, args))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise fail()
        return [_typed(name, option_name, v, args[0]) for v in value]
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
            return float(value)
        raise fail()
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise fail()


# -- registry ---------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One registered method: `target` is the class or "module:Class"; `origin` says who registered it."""

    name: str
    target: type[Patch] | str
    origin: str
    summary: str = ""
    paper: str = ""
    arxiv: str = ""
    parts: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Where the class lives, as "module:Class", imported or not."""
        if isinstance(self.target, str):
            return self.target.split("[")[0].strip()  # an entry point may name extras
        return f"{self.target.__module__}:{self.target.__qualname__}"

    def load(self) -> type[Patch]:
        """The class, imported on first use.

        Raises:
            RegistrationError: the target does not lead to a `Patch` dataclass.
        """
        if isinstance(self.target, str):
            module, _, attribute = self.address.partition(":")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except Exception as error:  # somebody else's module may fail in any way
                raise RegistrationError(
                    f"patch {self.name!r} from {self.origin} points to {self.target!r}, which cannot be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self.target = found
        cls = self.target
        if not (isinstance(cls, type) and issubclass(cls, Patch) and "__dataclass_fields__" in vars(cls)):
            raise RegistrationError(
                f"patch {self.name!r} from {self.origin} is {cls!r}, not a Patch dataclass (@dataclass is inherited "
                "by no subclass: put it on this class, below @register_patch)"
            )
        if cls.name != self.name:
            cls.name = self.name
        return cls

    def __str__(self) -> str:
        source = f" [{self.paper}{', arXiv ' + self.arxiv if self.arxiv else ''}]" if self.paper else ""
        return f"{self.name}: {self.summary}{source}"


_entries: dict[str, Entry] = {}
_scanned = False
P = TypeVar("P", bound=type[Patch])


def register_patch(name: str) -> Callable[[P], P]:
    """Class decorator: make a `Patch` dataclass available as `name`.

    Raises:
        RegistrationError: `name` is taken by something else; both origins are named.
    """

    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise RegistrationError(f"patch name {name!r} must be an identifier (letters, digits, underscores)")

    def decorate(cls: P) -> P:
        cls.name = name
        doc = (inspect.getdoc(cls) or "").strip().splitlines()
        own = cls.__dict__.get("summary")  # a preset inherits its method's fields, not its first sentence
        cls.summary = own or (doc[0].rstrip(".") if doc else "")
        origin = (
            f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
            if _has_source(cls)
            else cls.__module__
        )
        add(Entry(name, cls, origin, cls.summary, cls.paper, cls.arxiv, tuple(cls.parts)))
        return cls

    return decorate


def _has_source(cls: type) -> bool:
    try:
        inspect.getsourcelines(cls)
        return True
    except (OSError, TypeError):
        return False


def add(entry: Entry) -> None:
    """Add an entry; the class a lazy string pointed to may take its place."""
    known = _entries.get(entry.name)
    if known is not None and known.address != entry.address:
        raise RegistrationError(
            f"two patches are called {entry.name!r}: one from {known.origin}, one from {entry.origin}. "
            "Rename one of them, or uninstall its package"
        )
    # a class knows more than the text that points to it
    if known is None or not isinstance(entry.target, str):
        _entries[entry.name] = entry


def _scan() -> None:
    global _scanned
    if _scanned:
        return
    from .patches import BUILTIN

    for name, (target, summary, paper, arxiv, parts) in BUILTIN.items():
        add(Entry(name, target, "hf_attn_patch", summary, paper, arxiv, parts))
    for point in metadata.entry_points(group=GROUP):
        distribution = point.dist.name if point.dist else "unknown package"
        add(Entry(point.name, point.value, f"{distribution} (entry point {point.value})"))
    _scanned = True  # only now: a collision is reported every time, not once


def available() -> dict[str, Entry]:
    """Every registered method by name, without importing any of them."""
    _scan()
    return dict(sorted(_entries.items()))


def get(name: str) -> type[Patch]:
    """The class of method `name`.

    Raises:
        UnknownPatchError: no such method; the message suggests close names.
    """
    _scan()
    if name not in _entries:
        raise UnknownPatchError(
            f"no patch is called {name!r}.{did_you_mean(name, _entries)} Available: {', '.join(sorted(_entries))}"
        )
    return _entries[name].load()


def build(name_or_config: str | Patch, options: dict[str, Any]) -> Patch:
    """A validated config from a name + options, or a config object (+ options that replace its fields)."""
    if isinstance(name_or_config, str):
        return get(name_or_config).from_dict(options)
    if isinstance(name_or_config, Patch):
        cls = type(name_or_config)
        if not cls.name:
            raise ConfigError(f'{cls.__qualname__} has no name; decorate it with @register_patch("its_name")')
        current = {f.name: getattr(name_or_config, f.name) for f in option_fields(cls)}
        return cls.from_dict({**current, **options})
    raise ConfigError(
        f"expected a patch name or config, got {type(name_or_config).__name__}; names: {', '.join(available())}"
    )


def options_table(cls: type[Patch]) -> list[dict[str, Any]]:
    """Name, type, default and help of every option of a method (for ``info`` and docs)."""
    hints = typing.get_type_hints(cls)
    rows = []
    for f in option_fields(cls):
        default = None if f.default is dataclasses.MISSING else f.default
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        hint = hints[f.name]
        text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        rows.append(
            {
                "name": f.name,
                "type": text,
                "default": "required" if required else json.dumps(_plain(default)),
                "help": f.metadata.get("help", ""),
            }
        )
    return rows
