"""The implementation name on the config of a patched model, which knows that it belongs to that config alone."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from .names import EAGER_NAME, NAME


class RoutedName(str):
    """The name our dispatch is registered under, on the config of a patched model.

    A copy of the config that is made without the model says again what the user had chosen: it is for another model,
    which has no patch. A copy of the whole model keeps the name (its patches are copied too).
    """

    native: str | None
    owner: Any

    def __new__(cls, native: str | None, config: Any) -> RoutedName:
        self = super().__new__(cls, EAGER_NAME if native == "eager" else NAME)
        self.native = native
        self.owner = weakref.ref(config)
        return self

    def belongs_to(self, config: Any) -> bool:
        """True if `config` is the one that was switched."""
        return self.owner() is config

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        owner = self.owner()
        if owner is None or (id(owner) not in memo and id(owner.__dict__) not in memo):
            return self  # the name alone, as an argument for another model, whose first forward will say it
        if any(isinstance(copied, nn.Module) for copied in memo.values()):
            return RoutedName(
                self.native, memo.get(id(owner), owner)
            )  # the model is copied along, patches and all
        if type(next(iter(memo.values()))) is not dict:  # that would be to_dict, for printing or saving
            warnings.warn(
                "this config was copied from a patched model. A model made from the copy has no patch: its attention "
                f"is {self.native or 'the default'!s}. To patch it too: handle.save(folder) on the patched model, then "
                "hap.load(other_model, folder)",
                stacklevel=3,
            )
        return self.native

    def __reduce__(self) -> tuple[Any, ...]:  # a pickle of the whole model must find its dispatch again
        return str, (str(self),)


def is_ours(name: Any) -> bool:
    """True for the names that lead to our dispatch."""
    return name in (NAME, EAGER_NAME)


def native_of(name: str | None) -> str | None:
    """What `name` stands for on a model without patches: the choice behind one of our names, or `name` itself."""
    if isinstance(name, RoutedName):
        return name.native
    if is_ours(name):
        return "eager" if name == EAGER_NAME else "sdpa"
    return name


_told: dict[int, Any] = {}


def warn_unpatched(config: Any) -> None:
    """Say once per config that a module runs under our name without a patch.

    Either the name came from the config of another model (TRL makes reference models this way), or the config object
    itself is shared with a patched model (``from_config(model.config)`` makes no copy).
    """
    if torch.compiler.is_compiling() or ((known := _told.get(id(config))) is not None and known() is config):
        return
    key = id(config)
    _told[key] = weakref.ref(config, lambda _: _told.pop(key, None))
    name = getattr(config, "_attn_implementation", None)
    shared = isinstance(name, RoutedName) and name.belongs_to(config)
    where = (
        "shares its config object with a patched model, but is not in it (another model made from the same config, or "
        "the model around a patched inner one)"
        if shared
        else "came by this name from the config of a patched model, but was not patched itself"
    )
    warnings.warn(
        f"attention under attn_implementation={str(name)!r} with a {type(config).__name__} runs without any patch, as "
        f"{native_of(name) or 'by default'!s}: its model {where}. To patch it as well: handle.save(folder) on the "
        f"patched model, then hap.load(this_model, folder). To keep it dense: give it a config of its own, or "
        f"load it with attn_implementation={native_of(name)!r}",
        stacklevel=2,
    )
