"""`cab`: patches seen through the four attention patterns of CAB (arXiv 2210.07661), without a data set.

>>> from hf_attn_patch.eval import cab
>>> print(cab.run(["streaming:sinks=4,window=16"], patterns=["CS"]))

Per patch: which patterns it supports, by leak and gradient tests (`leaks`); what models learn with it, one synthetic
task per pattern (`micro_tasks`); from which length on it is cheaper than dense (`efficiency`); and one number per
pattern, relative to a stored reference set (`composite`).

This is no `Task` and has a command of its own (``hf-attn-patch cab``): a task asks a model that the user gives, dense
and patched, item by item. Here the models are small, made for the question and trained with the patch on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "run": "runner",
    "Result": "result",
    "Shape": "bodies",
    "Recipe": "micro_tasks",
    "Setting": "efficiency",
    "Reference": "composite",
    "IncompleteRow": "composite",
    "efficiency_length": "efficiency",
}
__all__ = [
    "IncompleteRow",
    "Recipe",
    "Reference",
    "Result",
    "Setting",
    "Shape",
    "efficiency_length",
    "run",
]

if TYPE_CHECKING:
    from .bodies import Shape
    from .composite import IncompleteRow, Reference
    from .efficiency import Setting, efficiency_length
    from .micro_tasks import Recipe
    from .result import Result
    from .runner import run


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
