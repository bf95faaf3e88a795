"""Training patched models: checks, a Trainer callback, LoRA and patch adapters side by side, `finetune.finetune`.

Nothing is imported before it is used; peft and accelerate are optional (``pip install 'hf-attn-patch[peft]'``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "PatchCallback": "callback",
    "check_trainable": "checks",
    "nan_guard": "checks",
    "save": "adapters",
    "load": "adapters",
    "examples": "data",
    "Lora": "finetune",
    "Recipe": "finetune",
}
__all__ = ["Lora", "PatchCallback", "Recipe", "check_trainable", "examples", "load", "nan_guard", "save"]

if TYPE_CHECKING:
    from .adapters import load, save
    from .callback import PatchCallback
    from .checks import check_trainable, nan_guard
    from .data import examples
    from .finetune import Lora, Recipe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def need(module: str, extra: str = "peft") -> Any:
    """An optional package.

    Raises:
        PatchError: it is not installed; the message names the extra.
    """
    from ..errors import PatchError

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PatchError(f"{module} is not installed: pip install 'hf-attn-patch[{extra}]'") from error
