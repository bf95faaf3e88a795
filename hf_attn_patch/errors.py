"""Errors of this package. Each message says what was asked, what was found and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchError(RuntimeError):
    """Base of everything that patching refuses. The model is left exactly as it was."""


class UnknownPatchError(PatchError, KeyError):
    """No method of that name is registered."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class RegistrationError(PatchError):
    """Two origins claim one name, or an entry does not lead to a patch class."""


class ConfigError(PatchError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class SelectionError(PatchError, IndexError):
    """A layer, head or part that the model does not have."""


class ModelMismatchError(PatchError):
    """The model has no site for the method, or a plan was made for another shape."""


class CompositionError(PatchError):
    """Two patches that cannot work on one site, or an undo out of order."""


class AdapterError(PatchError):
    """A saved patch adapter is missing, corrupted, truncated, or from a newer version."""


class CacheError(PatchError):
    """A KV cache that does not fit the active patches."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
