"""Open registry of tasks: built-in, registered by a decorator, or offered by an installed package.

Classes are imported when they are asked for, so listing the tasks costs nothing. Third parties add tasks with the
entry-point group ``hf_attn_patch.tasks`` (``name = "module:Class"``) or with `register_task`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata  # noqa: F401 (where entry points are looked up, for whoever replaces that)
from typing import Any, TypeVar

from ..plugins import plugins

ENTRY_POINTS = "hf_attn_patch.tasks"


class TaskError(ValueError):
    """A task that does not exist, clashes, or cannot be loaded; the message names the way out."""


@dataclass(frozen=True)
class TaskEntry:
    """One known task. target: the class, or ``module:Class``. origin: where it was registered."""

    name: str
    target: str | type
    summary: str
    origin: str
    problem: str = ""

    def load(self) -> type:
        """The task class, imported on first use.

        Raises:
            TaskError: the target is not there, or is no `Task`, or two packages claim the name.
        """
        from .task import Task

        if self.problem:
            raise TaskError(self.problem)

        found: Any = self.target
        if isinstance(found, str):
            module, _, name = found.partition(":")
            try:
                found = getattr(importlib.import_module(module), name)
            except (Exception, SystemExit) as error:  # somebody else's module
                raise TaskError(
                    f"task {self.name!r} ({self.origin}) cannot be loaded from {self.target}: {error}"
                ) from error
        if not (inspect.isclass(found) and issubclass(found, Task)):
            raise TaskError(f"task {self.name!r} ({self.origin}): {found!r} is not a subclass of Task")
        return found


def _builtin(name: str, target: str, summary: str) -> TaskEntry:
    return TaskEntry(name, f"hf_attn_patch.eval.{target}", summary, "hf_attn_patch")


_ENTRIES: dict[str, TaskEntry] = {
    entry.name: entry
    for entry in (
        _builtin("perplexity", "perplexity:Perplexity", "perplexity of English prose (language models)"),
        _builtin("passkey", "passkey:Passkey", "find a number in long prose, through generate() and its KV cache"),
        _builtin("line_retrieval", "line_retrieval:LineRetrieval", "the number in the line of a given name (LongEval)"),
        _builtin("ruler", "ruler:Ruler", "needles, variable tracking, common and frequent words at any length (RULER)"),
        _builtin("longbench", "longbench:LongBench", "long-context datasets with their own prompts and metrics"),
        _builtin("longbench_e", "longbench:LongBenchE", "LongBench-E: the same by length, 0-4k, 4-8k and 8k+ words"),
        _builtin("lm_eval", "lm_eval:LmEval", "any task of lm-evaluation-harness on the patched object"),
        _builtin("throughput", "throughput:Throughput", "speed of prefill and decode, first token, memory, KV bytes"),
        _builtin("pope", "pope:Pope", "is there a … in the image? Random, popular and adversarial objects (POPE)"),
        _builtin("chair", "chair:Chair", "objects that captions name and images lack, with recall, repetition (CHAIR)"),
        _builtin("mme", "mme:Mme", "existence, count, position, color: two questions per image, acc and acc+ (MME)"),
        _builtin("amber", "amber:Amber", "existence, attributes, relations; captions against lists of objects (AMBER)"),
        _builtin("vqa", "vqa:Vqa", "short answers about images against those of ten people (VQA accuracy)"),
        _builtin("agreement", "agreement:Agreement", "features, logits, attention: patched against dense (vision)"),
        _builtin("knn", "knn:Knn", "k-nearest-neighbour accuracy of features on labelled images (vision)"),
        _builtin("linear_probe", "probes:LinearProbe", "a linear classifier trained on frozen features (vision)"),
        _builtin("attentive_probe", "probes:AttentiveProbe", "a head (ep, acmil, …) on frozen tokens (vision)"),
        _builtin("localization", "localization:Localization", "heat maps against boxes of objects (vision)"),
        _builtin("vit_throughput", "vit_throughput:VitThroughput", "images/s, ms and memory over image sizes (vision)"),
        _builtin("classify", "classify:Classify", "top-1 and top-5 of a model with a classifier (vision)"),
    )
}  # fmt: skip

T = TypeVar("T", bound=type)


def register_task(name: str) -> Callable[[T], T]:
    """Class decorator: make a `Task` subclass known as `name`.

    Raises:
        TaskError: another class has the name; both origins are named.
    """

    def decorate(cls: T) -> T:
        try:
            origin = f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
        except (OSError, TypeError):
            origin = cls.__module__
        _add(TaskEntry(name, cls, getattr(cls, "summary", ""), origin))
        return cls

    return decorate


def _add(entry: TaskEntry) -> None:
    known = _ENTRIES.get(entry.name)
    if known is not None and (known.target, known.origin) != (entry.target, entry.origin):
        raise TaskError(
            f"two tasks are called {entry.name!r}: one from {known.origin}, one from {entry.origin}. "
            "Rename one of them."
        )
    _ENTRIES[entry.name] = entry


def available() -> dict[str, TaskEntry]:
    """Name -> entry of every known task, installed plug-ins included; imports no task."""
    entries = dict(_ENTRIES)
    builtin = {
        e.name: e.target
        for e in entries.values()
        if e.origin == "hf_attn_patch" and isinstance(e.target, str)
    }
    for plugin in plugins(ENTRY_POINTS, builtin):
        known, problem = entries.get(plugin.name), plugin.problem
        if plugin.name in builtin or not plugin.target:
            continue  # the built-in wins; metadata that cannot be read names nothing
        if known is not None and _address(known) != plugin.target:
            problem = problem or (
                f"two tasks are called {plugin.name!r}: one from {known.origin}, one from {plugin.origin}. "
                "Rename one of them."
            )
        elif known is not None:
            continue  # imported already
        entries[plugin.name] = TaskEntry(plugin.name, plugin.target, "", plugin.origin, problem)
    return entries


def _address(entry: TaskEntry) -> str:
    target = entry.target
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def get(name: str) -> type:
    """The task class called `name`.

    Raises:
        TaskError: unknown name; the message lists all names and the nearest one.
    """
    entries = available()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"no task is called {name!r}.{hint} Known: {', '.join(entries)}.")
    return entries[name].load()
