"""`Need`: a fact of the running forward that an attention function is not given, and how it is learnt.

A method lists the facts it needs (``needs = (PromptLength(), ImageKeys())``); hooks exist only while somebody needs
them. A need of one's own is a class in a file of one's own: what it hooks (`install`), what it reads from the arguments
of a transformers model (`begins`), what it does when the forward is over (`ends`). It keeps what it learns

- for a layer: ``running.note(path, name, tensor)``, dropped when the layer's attention call is over;
- for the forward: ``running.scratch``;
- for the conversation: ``running.memory`` (with the cache), ``running.memory.rows`` for what belongs to rows,

and says in its errors how the caller can tell what it cannot know. Tensors stay on the device they were seen on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from ..context import Context
    from ..running import Running


@dataclass(frozen=True)
class Need:
    """Base of all needs. Equal objects are one need: fields are settings.

    says: what it is, in one line. order: needs are asked in this order (a need may build on an earlier one).
    carried: it is learnt from a whole forward, so it must travel with layers that gradient checkpointing runs again.
    per_prompt: two forwards of equal shapes may differ in it. in_pieces: it is known for each sequence of a packed row.
    """

    says: ClassVar[str] = ""
    order: ClassVar[int] = 0
    carried: ClassVar[bool] = True
    per_prompt: ClassVar[bool] = False
    in_pieces: ClassVar[bool] = False

    def install(self, hooks: Hooks) -> None:
        """Hook modules (`Hooks`)."""

    def prepares(self, running: Running, given: Given) -> None:
        """As `begins`, before the cache of this forward is looked at; may replace arguments (`Given.replace`)."""

    def begins(self, running: Running, given: Given) -> None:
        """A transformers model around the sites begins with the arguments `given`; outermost first."""

    def ends(self, running: Running, module: nn.Module, output: Any) -> Any:
        """The outermost model is done. Returns what replaces its output, or None."""
        return None


class Given:
    """Arguments of a transformers model by name.

    module: the model. names: parameters of its forward. outermost: it is the one that began the forward.
    """

    def __init__(self, module: Any, names: list[str], arguments: dict[str, Any], outermost: bool):
        self.module, self.names, self.arguments, self.outermost = module, names, arguments, outermost
        self.changed: dict[str, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(self.cache_name if name == "past_key_values" else name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.arguments

    def replace(self, name: str, value: Any) -> None:
        """Give the model `value` as argument `name`."""
        name = self.cache_name if name == "past_key_values" else name
        self.arguments[name] = self.changed[name] = value

    @property
    def ids(self) -> Any:
        """Input ids of a causal model (of the decoder, where there are two), or None."""
        return self.arguments.get("input_ids", self.arguments.get("decoder_input_ids"))

    @property
    def has_cache(self) -> bool:
        """Whether the model takes a KV cache."""
        return "past_key_values" in self.names or "cache" in self.names

    @property
    def cache_name(self) -> str:
        """What the argument is called: `cache` since transformers 5.24, which still takes its old name."""
        old = "past_key_values"
        return old if old in self.arguments or "cache" not in self.names else "cache"


class Hooks:
    """What a need may hook on a patched model.

    model: the transformers model. paths: the sites whose patches have this need. patches_at: path -> the site's
    patches in order (with what they hold), for needs that ask the patches themselves.
    """

    def __init__(self, context: Context, paths: list[str], patches_at: Callable[[str], list[Any]]):
        self.context, self.model, self.paths, self.patches_at = context, context.model, paths, patches_at

    def before(self, module: nn.Module, hook: Callable, kwargs: bool = True) -> None:
        """Call ``hook(module, args, kwargs)`` in front of a module; it may return changed ones."""
        self.context.handles.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs))

    def after(self, module: nn.Module, hook: Callable, prepend: bool = False) -> None:
        """Call ``hook(module, args, output)`` behind a module; it may return another output."""
        self.context.handles.append(module.register_forward_hook(hook, prepend=prepend))


def named(need: Need | str) -> Need:
    """A need by the name it had as a string (version 0.1), or itself."""
    if isinstance(need, Need):
        return need
    from . import BY_NAME

    if need not in BY_NAME:
        from ...errors import ConfigError

        raise ConfigError(
            f"no need is called {need!r}; known: {', '.join(BY_NAME)}, or an object of a class of yours"
        )
    return BY_NAME[need]


def needs_of(config: Any) -> tuple[Need, ...]:
    """The needs of a method, in the order in which they are asked."""
    found = dict.fromkeys(named(need) for need in config.needs)
    return tuple(sorted(found, key=lambda need: need.order))


def wants(config: Any, kind: type[Need]) -> bool:
    """Whether a method has a need of class `kind`."""
    return any(isinstance(need, kind) for need in needs_of(config))


def site_patches(model: nn.Module) -> list[Any]:
    """Every patch of a site below `model` (copies that PEFT made included): modules with an `entry` and `variants`."""
    return [m for m in model.modules() if hasattr(m, "variants") and hasattr(m, "entry")]
