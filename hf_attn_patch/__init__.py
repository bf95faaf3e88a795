"""Make a loaded Hugging Face model attend differently: patch, measure, undo.

>>> import hf_attn_patch as hap
>>> handle = hap.patch(model, "streaming", sinks=4, window=256)
>>> handle.report()
>>> handle.remove()

Importing this package changes nothing anywhere and imports neither transformers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "patch": "api",
    "patched": "api",
    "unpatch": "api",
    "load": "api",
    "active": "api",
    "plan": "api",
    "prompt": "api",
    "PatchHandle": "api",
    "available": "registry",
    "register_patch": "registry",
    "Patch": "registry",
    "PatchError": "errors",
    "aux_losses": "losses",
    "attention_flow": "inspection.attention_flow",
    "capture": "inspection.capture",
    "two_stream": "decoding.processor",
    "calibrate": "calibration",
    "find_sites": "sites",
    "Site": "sites",
}
__all__ = [
    "Patch",
    "PatchError",
    "PatchHandle",
    "Site",
    "__version__",
    "active",
    "attention_flow",
    "aux_losses",
    "available",
    "calibrate",
    "capture",
    "find_sites",
    "load",
    "patch",
    "patched",
    "plan",
    "prompt",
    "register_patch",
    "two_stream",
    "unpatch",
]

if TYPE_CHECKING:
    from .api import PatchHandle, active, load, patch, patched, plan, prompt, unpatch
    from .calibration import calibrate
    from .decoding.processor import two_stream
    from .errors import PatchError
    from .inspection.attention_flow import attention_flow
    from .inspection.capture import capture
    from .losses import aux_losses
    from .registry import Patch, available, register_patch
    from .sites import Site, find_sites


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
