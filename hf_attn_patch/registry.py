"""Methods by name: the `Patch` base class and an open, lazy registry.

A method is one dataclass in ``patches/``. Its fields are its configuration, its command-line options and its
JSON at once. Listing methods imports none of them: built-ins are kept as "module:Class" strings with a summary,
third-party ones come from the entry-point group ``hf_attn_patch.patches``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata  # noqa: F401 (where entry points are looked up, for whoever replaces that)
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from .errors import ConfigError, RegistrationError, UnknownPatchError, did_you_mean
from .method import Method
from .options import option, option_fields, plain, refuse_paths, typed
from .plugins import NAME, Plugin, plugins

if TYPE_CHECKING:
    from torch import Tensor

    from .call.program import Program
    from .forward.running import Running
    from .install.stack import Call
    from .model.sites import Site

__all__ = [
    "GROUP", "Entry", "Method", "Patch", "add", "available", "build", "get", "option", "option_fields", "options_table",
    "problems", "register_patch",
]  # fmt: skip
GROUP = "hf_attn_patch.patches"


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
        steady: `edit` does the same to every decoded token of a conversation (it reads options, tensors of the
        patch and the length of the prompt, and nothing else).
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
    steady: ClassVar[bool] = False
    head_selectable: ClassVar[bool] = True
    frees_cache: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    head_state: ClassVar[tuple[str, ...] | None] = (
        None  # attributes with one entry per head; None: cannot be cut
    )
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
        return {f.name: plain(getattr(self, f.name)) for f in option_fields(type(self))}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Patch:
        """Build and validate from options.

        Raises:
            ConfigError: unknown option, wrong type or value out of range; the message names all of it.
            AdapterError: an adapter is being loaded, and an option is a path instead of data.
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
        refuse_paths(cls.name, fields, hints_of, options)
        values = {k: typed(cls.name, k, v, hints_of[k]) for k, v in options.items()}
        missing = [
            f.name
            for f in fields.values()
            if f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.name}: option {', '.join(map(repr, missing))} is required")
        config = cls(**values)
        config.validate()
        return config

    def require(self, condition: bool, field: str, meaning: str) -> None:
        """Raise `ConfigError` for `field` unless `condition`: ``self.require(self.window >= 1, "window", ">= 1")``."""
        if not condition:
            raise ConfigError(
                f"{self.name}: {field}={getattr(self, field)!r} is out of range, expected {meaning}"
            )


# -- registry ---------------------------------------------------------------------------------------------------


Entry = Method  # its old name; `install.state.Entry` is another thing
_entries: dict[str, Method] = {}
_scanned = False
_unreadable: dict[str, str] = {}  # name -> what is wrong with an entry point that leads to no method at all
_lock = (
    threading.RLock()
)  # never held while a module is imported: the import lock of another thread may wait for it
P = TypeVar("P", bound=type[Patch])


def register_patch(name: str) -> Callable[[P], P]:
    """Class decorator: make a `Patch` dataclass available as `name`.

    Raises:
        RegistrationError: `name` is taken by something else; both origins are named.
    """

    if not re.fullmatch(NAME, name):
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
        add(Method(name, cls, origin, cls.summary, cls.paper, cls.arxiv, tuple(cls.parts)))
        return cls

    return decorate


def _has_source(cls: type) -> bool:
    try:
        inspect.getsourcelines(cls)
        return True
    except (OSError, TypeError):
        return False


def _builtins() -> dict[str, Method]:
    from .patches import BUILTIN

    return {
        name: Method(name, target, "hf_attn_patch", summary, paper, arxiv, parts)
        for name, (target, summary, paper, arxiv, parts) in BUILTIN.items()
    }


def add(method: Method) -> None:
    """Add a method; the class a lazy string pointed to may take its place.

    Raises:
        RegistrationError: another method of that name is registered, or built in.
    """
    builtins = _builtins()
    with _lock:
        known = _entries.get(method.name) or builtins.get(method.name)
        if known is not None and known.address != method.address:
            raise RegistrationError(_two(known, method))
        # a class knows more than the text that points to it
        if known is None or method.name not in _entries or not isinstance(method.target, str):
            method.problem = known.problem if known is not None else ""
            method.shadowed = known.shadowed if known is not None else ()
            _entries[method.name] = method


def _two(a: Method, b: Method | Plugin) -> str:
    return (
        f"two patches are called {a.name!r}: one from {a.origin}, one from {b.origin}. "
        "Rename one of them, or uninstall its package"
    )


def _scan() -> None:
    """Look for entry points, once. What is wrong with one of them is kept for whoever asks for that name: somebody
    else's package never makes another method fail."""
    global _scanned
    if _scanned:
        return
    builtins = _builtins()
    with _lock:
        if _scanned:
            return
        for name, method in builtins.items():
            _entries.setdefault(name, method)
        for plugin in plugins(GROUP, {name: method.address for name, method in builtins.items()}):
            known = _entries.get(plugin.name)
            if plugin.name in builtins:
                _entries[plugin.name].shadowed += (plugin.origin,)
            elif not plugin.target or not re.fullmatch(NAME, plugin.name):
                _unreadable[plugin.name] = plugin.problem
            elif known is None:
                found = Method(plugin.name, plugin.target, plugin.origin, problem=plugin.problem)
                _entries[plugin.name] = found
            elif known.address != plugin.target:
                known.problem = plugin.problem or _two(known, plugin)
        _scanned = True


def available() -> dict[str, Method]:
    """Every registered method by name, without importing any of them. Those that cannot be used are among them:
    `Method.problem` says why."""
    _scan()
    with _lock:
        return dict(sorted(_entries.items()))


def problems() -> list[str]:
    """What is wrong with entry points of other packages, a sentence each; they concern no other method."""
    methods = available().values()
    return [
        *_unreadable.values(),
        *(m.problem for m in methods if m.problem),
        *(
            f"{who} claims the name of the built-in {m.name!r} and is not used"
            for m in methods
            for who in m.shadowed
        ),
    ]


def get(name: str) -> type[Patch]:
    """The class of method `name`.

    Raises:
        UnknownPatchError: no such method; the message suggests close names. RegistrationError: it cannot be loaded.
    """
    methods = available()
    if name in _unreadable:
        raise RegistrationError(_unreadable[name])
    if name not in methods:
        raise UnknownPatchError(
            f"no patch is called {name!r}.{did_you_mean(name, methods)} Available: {', '.join(methods)}"
        )
    return methods[name].load()


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
                "default": "required" if required else json.dumps(plain(default)),
                "help": f.metadata.get("help", ""),
            }
        )
    return rows
