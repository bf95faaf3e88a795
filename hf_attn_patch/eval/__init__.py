"""Measure a live model dense and patched, on the same items, with intervals.

>>> from hf_attn_patch import eval
>>> result = eval.run("perplexity", model, tokenizer, patches=["streaming:sinks=4,window=256"])
>>> print(result)

Tasks for language models: perplexity, passkey, line_retrieval, ruler, longbench, longbench_e, lm_eval, throughput; for
vision models: agreement, knn, linear_probe, attentive_probe, classify, localization, vit_throughput; for
vision-language models: pope, chair, mme, amber, vqa. Add your own with `register_task` or the entry-point group
``hf_attn_patch.tasks``. Speed and memory are in `hf_attn_patch.eval.measurements`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "run": "harness",
    "Result": "result",
    "Variant": "result",
    "Task": "task",
    "Metric": "task",
    "TaskError": "registry",
    "available": "registry",
    "register_task": "registry",
    "SpecError": "specs",
    "parse_patch_spec": "specs",
    "parse_task_spec": "specs",
    "Difference": "stats",
    "paired_bootstrap": "stats",
}
__all__ = [
    "Difference",
    "Metric",
    "Result",
    "SpecError",
    "Task",
    "TaskError",
    "Variant",
    "available",
    "paired_bootstrap",
    "parse_patch_spec",
    "parse_task_spec",
    "register_task",
    "run",
]

if TYPE_CHECKING:
    from .harness import run
    from .registry import TaskError, available, register_task
    from .result import Result, Variant
    from .specs import SpecError, parse_patch_spec, parse_task_spec
    from .stats import Difference, paired_bootstrap
    from .task import Metric, Task


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
