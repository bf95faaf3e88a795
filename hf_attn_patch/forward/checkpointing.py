"""Gradient checkpointing: a layer runs again during backward, when its forward is over and others may have run since.

The `Running` of a forward travels with its layers as a keyword argument. Layers that hand no keyword arguments on are
found again by path, as long as it is clear which forward they belong to. Nothing is kept for a forward that never sees
its backward: what waits is held by the graph.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..model.sites import layer_module
from .running import Running, begin, current, end, innermost

if TYPE_CHECKING:
    from .context import Context
    from .needs.base import Hooks

FACTS = "attn_patch_facts"  # keyword argument that carries a `Running` through a checkpointed layer


def in_backward() -> bool:
    """True while autograd runs, which is when checkpointed layers are recomputed."""
    return torch._C._current_graph_task_id() != -1


class Notes:
    """Forwards whose layers may be computed again, by path of the site, for layers that take no keyword arguments."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Any]] = {}
        self.done: set[str] = set()

    def add(self, path: str, running: Running, hidden: Any) -> None:
        if path in self.done:
            self.waiting[path] = []
            self.done.discard(path)
        node = hidden.grad_fn if isinstance(hidden, Tensor) else None
        if node is not None:  # the graph holds it: a forward without a backward is forgotten with its graph
            held_by_graph: Any = node.metadata
            held_by_graph.setdefault("attn_patch", []).append(running)
            held: Any = weakref.ref(running)
        else:
            held = lambda: running
        self.waiting.setdefault(path, []).append(held)

    def of(self, path: str, context: Context) -> Running | None:
        """The forward whose layer at `path` is computed again.

        Raises:
            PatchError: several different ones wait for their backward.
        """
        notes = [found for held in self.waiting.get(path, ()) if (found := held()) is not None]
        if not notes:
            return None
        self.done.add(path)
        alike = not any(need.per_prompt for need in context.needs) and len({n.pixels for n in notes}) == 1
        if len(notes) > 1 and not alike:
            self.done.update(self.waiting)
            raise PatchError(
                f"gradient checkpointing recomputes the layer of {path}, and {len(notes)} different forwards wait "
                "for their backward; which one this is cannot be known for this layer class. Call backward after "
                "every forward, or switch gradient checkpointing off"
            )
        return notes[-1]


class _Carried:
    """Hooks of one layer and its attention (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, path: str, travels: bool):
        self.context, self.path, self.travels = context, path, travels
        layer, names = layer_module(context.model, path), path.split(".")
        around = [context.model.get_submodule(".".join(names[:end])) for end in range(1, len(names) + 1)]
        way = around[next(n for n, m in enumerate(around) if m is layer) :]  # from the layer to its attention
        # up to transformers 5.20 a layer checkpoints itself in __call__, around its hooks: what a hook adds is not
        # kept for the recomputation there
        outside = type(layer).__call__ is nn.Module.__call__
        self.hands_on = outside and all(_takes_anything(m) for m in way)

    def layer_begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """In the forward: what the layer needs to be computed again goes with it."""
        if not (
            module.training and getattr(module, "gradient_checkpointing", False) and torch.is_grad_enabled()
        ):
            return None
        running = None if torch.compiler.is_compiling() or in_backward() else current(self.context)
        if running is None:
            return None
        again = copy.copy(running)
        again.layers, again.frame = {self.path: dict(running.layers.get(self.path, {}))}, None
        if self.hands_on:
            return args, {**kwargs, FACTS: again}
        hidden = args[0] if args else kwargs.get("hidden_states")
        again.layers = {}
        self.context.notes.add(self.path, again, hidden)
        return None

    def attention_begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In the recomputation: its forward is the current one again."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not in_backward():
            return
        outer = innermost()
        if current(self.context) is not None:
            return
        known = kwargs.get(FACTS) or (
            self.context.notes.of(self.path, self.context) if self.travels else None
        )
        again = Running(self.context) if known is None else copy.copy(known)
        again.layers = {path: dict(kept) for path, kept in again.layers.items()}
        again.outer, again.again = outer, self.path
        begin(again, sys._getframe(1))

    def attention_ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = current(self.context)
        if running is not None and running.again == self.path:
            end(running)


def _takes_anything(module: nn.Module) -> bool:
    """True if the forward of a layer has ``**kwargs``, which transformers hands on to the attention function."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def install(hooks: Hooks, travelling: list[str]) -> list[tuple[nn.Module, Any]]:
    """Let recomputed layers of the sites at ``hooks.paths`` find their facts; those at `travelling` need some of a
    whole forward. Returns the hooks of layers, to be registered behind those that learn what the layer is given."""
    behind = []
    for path in hooks.paths:
        carried = _Carried(hooks.context, path, path in travelling)
        attention = hooks.model.get_submodule(path)
        hooks.before(attention, carried.attention_begins)
        hooks.context.handles.append(
            attention.register_forward_hook(carried.attention_ends, always_call=True)
        )
        if path in travelling:
            behind.append((layer_module(hooks.model, path), carried.layer_begins))
    return behind
