"""One registered method: its name, where its class is, and what is wrong with it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RegistrationError

if TYPE_CHECKING:
    from .registry import Patch


@dataclass
class Method:
    """One registered method: `target` is the class or "module:Class"; `origin` says who registered it.

    problem: why it cannot be used (two packages claim the name); `load` raises it. shadowed: who else claims the
    name of a built-in, in vain.
    """

    name: str
    target: type[Patch] | str
    origin: str
    summary: str = ""
    paper: str = ""
    arxiv: str = ""
    parts: tuple[str, ...] = ()
    problem: str = ""
    shadowed: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Where the class lives, as "module:Class", imported or not."""
        if isinstance(self.target, str):
            return self.target.split("[")[0].strip()  # an entry point may name extras
        return f"{self.target.__module__}:{self.target.__qualname__}"

    def load(self) -> type[Patch]:
        """The class, imported on first use.

        Raises:
            RegistrationError: the target does not lead to a `Patch` dataclass, or two packages claim the name.
        """
        if self.problem:
            raise RegistrationError(self.problem)
        if isinstance(self.target, str):
            module, _, attribute = self.address.partition(":")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (Exception, SystemExit) as error:  # somebody else's module may fail in any way
                raise RegistrationError(
                    f"patch {self.name!r} from {self.origin} points to {self.target!r}, which cannot be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self.target = found
        cls = self.target
        if not (isinstance(cls, type) and _is_patch(cls) and "__dataclass_fields__" in vars(cls)):
            raise RegistrationError(
                f"patch {self.name!r} from {self.origin} is {cls!r}, not a Patch dataclass (@dataclass is inherited "
                "by no subclass: put it on this class, below @register_patch)"
            )
        if cls.name != self.name:
            cls.name = self.name
        return cls

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: cannot be used: {self.problem}"
        source = f" [{self.paper}{', arXiv ' + self.arxiv if self.arxiv else ''}]" if self.paper else ""
        claims = f" (also claimed by {', '.join(self.shadowed)}: not used)" if self.shadowed else ""
        return f"{self.name}: {self.summary}{source}{claims}"


def _is_patch(cls: type) -> bool:
    """Whether `cls` derives from `registry.Patch`, which this file is below."""
    return any(
        (base.__module__, base.__qualname__) == ("hf_attn_patch.registry", "Patch") for base in cls.__mro__
    )
