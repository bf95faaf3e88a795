"""Make a loaded Hugging Face model attend differently: patch, measure, undo.

>>> import hf_attn_patch as hap
>>> handle = hap.patch(model, "streaming", sinks=4, window=256)
>>> handle.report()
>>> handle.remove()

Importing this package changes nothing anywhere and imports neither transformers nor triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# modules keep answering to the names they had in version 0.1 (`hf_attn_patch.rules`, `hf_attn_patch.sites`, ...)
__path__.append(str(Path(__file__).with_name("_old_names")))

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
    "aux_losses": "install.state",
    "attention_flow": "inspection.attention_flow",
    "capture": "inspection.capture",
    "two_stream": "decoding.processor",
    "calibrate": "calibration",
    "find_sites": "model.sites",
    "Site": "model.sites",
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
    from .api import active, load, patch, patched, prompt, unpatch
    from .calibration import calibrate
    from .decoding.processor import two_stream
    from .errors import PatchError
    from .inspection.attention_flow import attention_flow
    from .inspection.capture import capture
    from .install.handle import PatchHandle
    from .install.plan import plan
    from .install.state import aux_losses
    from .model.sites import Site, find_sites
    from .registry import Patch, available, register_patch


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
