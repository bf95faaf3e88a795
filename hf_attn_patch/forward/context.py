"""`Context`: what a patched model learns about its forwards, and the hooks that learn it.

One per patched model; it holds no fact itself. Facts of a forward are in its `Running`, facts of a conversation on
its cache (`Conversation`). Hooks sit on the transformers models around the patched sites and, for needs that ask for
it, on layers; all of them go when the last patch goes.
"""

from __future__ import annotations

import copy
import inspect
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from . import checkpointing, generating, packing
from .exporting import exported
from .needs import prompt
from .needs.base import Given, Hooks, Need
from .needs.image_free import Pass
from .needs.losses import Losses
from .running import HANDED, Running, begin, current, end, innermost, of_thread

PATCHED = ".attn_patch."  # in the names of tensors that patches hold

OWNERS = (
    "generators"  # among what was said: ids of the frames of the generators that said it, outermost first
)

_said: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("hf_attn_patch_said", default=None)


def copy_with_model(thing: Any, memo: dict[int, Any]) -> Any:
    """Deepcopy of something that belongs to ``thing.model``: a copy of the model gets its own, but a copy of a single
    module (PEFT's ``modules_to_save``) stays in the same model and shares it."""
    if id(thing.model) not in memo:
        return thing
    twin = object.__new__(type(thing))
    memo[id(thing)] = twin
    state = thing.__getstate__() if hasattr(thing, "__setstate__") else thing.__dict__
    state = copy.deepcopy(dict(state), memo)
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
    else:
        twin.__dict__.update(state)
    return twin


class Context:
    """Needs and hooks of one patched transformers model.

    token: under which its conversations are kept on caches. needs: what its patches ask for, in order. handles: the
    hooks. losses: auxiliary losses of the last forward.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.token = uuid.uuid4().hex
        self.needs: dict[Need, list[str]] = {}
        self.handles: list[Any] = []
        self.generators: list[Any] = []
        self.patches_at: Callable[[str], list[Any]] = lambda path: []
        self.losses = Losses()
        self.notes = checkpointing.Notes()
        self.follow: Callable[[], None] = lambda: None  # asked before every forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return copy_with_model(self, memo)

    def __getstate__(self) -> dict[str, Any]:  # copies start with an empty memory: their caches are others
        return {**self.__dict__, "losses": Losses(), "notes": checkpointing.Notes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.token = uuid.uuid4().hex

    def running(self) -> Running:
        """The running forward of this model in this thread; outside of one, an empty one that knows nothing."""
        return current(self) or Running(self)

    @property
    def said(self) -> dict[str, Any]:
        """What `hap.prompt` says in this thread."""
        if torch.compiler.is_compiling():
            return of_thread().said.get(self.token, {})
        return (_said.get() or {}).get(self.token, {})

    @contextmanager
    def prompt(self, **facts: Any) -> Iterator[None]:
        """Inside, forwards of this model are told `facts` (in this thread or task)."""
        everything = _said.get() or {}
        outer = everything.get(self.token, {})
        mine = {**outer, **{k: v for k, v in facts.items() if v is not None}}
        if not torch.compiler.is_compiling() and (owner := _generator_that_says(sys._getframe(1))):
            mine[OWNERS] = (*outer.get(OWNERS, ()), owner)
        token, before = _said.set({**everything, self.token: mine}), of_thread().said
        of_thread().said = {**before, self.token: mine}
        try:
            yield
        finally:
            _said.reset(token)
            of_thread().said = before

    @contextmanager
    def aside(self, one: Pass | None, said: dict[str, Any] | None = None) -> Iterator[Running]:
        """Inside, the model runs a forward of its own (`one`: an image-free pass); the facts of the running forward are
        back after it. Gives its `Running`."""
        inner = Running(self, current(self) if torch.compiler.is_compiling() else innermost(), said, one)
        inner.aside = True
        losses = self.losses
        begin(inner, None if torch.compiler.is_compiling() else sys._getframe(2))  # who says `with`
        try:
            yield inner
        finally:
            end(inner)
            self.losses = losses

    # -- hooks --------------------------------------------------------------------------------------------------

    def install(
        self,
        needs: dict[Need, list[str]],
        paths: list[str],
        patches_at: Callable[[str], list[Any]],
    ) -> None:
        """Install the hooks for `needs` (each with the sites it is asked for at) on a model patched at `paths`."""
        from transformers import PreTrainedModel

        self.remove()
        self.needs = dict(sorted(needs.items(), key=lambda item: item[0].order))
        self.patches_at = patches_at
        owners: dict[int, nn.Module] = {}
        for path in paths:
            names = path.split(".")
            for length in range(len(names)):
                module = self.model.get_submodule(".".join(names[:length]))
                if isinstance(module, PreTrainedModel):
                    owners[id(module)] = module
        for module in owners.values():
            self.handles.append(module.register_forward_pre_hook(self.before_model, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after_model, always_call=True))
            if generating.install(self, module):
                self.generators.append(module)
        self.handles.append(self.model.register_load_state_dict_post_hook(accept_dense_weights))
        asked = list(dict.fromkeys(p for where in self.needs.values() for p in where))
        travelling = list(
            dict.fromkeys(p for need, where in self.needs.items() if need.carried for p in where)
        )
        hooks = Hooks(self, asked, patches_at)
        behind = checkpointing.install(hooks, travelling)
        for need, where in self.needs.items():
            need.install(Hooks(self, where, patches_at))
        for layer, hook in behind:
            hooks.before(layer, hook)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self.handles:
            handle.remove()
        for module in self.generators:
            generating.remove(module)
        self.handles, self.generators, self.needs = [], [], {}
        self.notes = checkpointing.Notes()

    def before_model(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_exporting():
            return exported("this patched model", self._begin, module, args, kwargs)
        return self._begin(module, args, kwargs)

    def _begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        names = _parameter_names(type(module))
        outer = innermost()
        running = current(self)
        if running is not None and running.entered and module is self.model:
            # never inside itself: one that was traced by torch.compile and ended by an error was left behind
            running, outer = None, None if torch.compiler.is_compiling() else outer
        outermost = running is None or not running.entered
        if outermost and not torch.compiler.is_compiling():
            self.follow()
        if running is None:
            said = self.said
            if len(said.get(OWNERS, ())) > 1:
                _refuse_overlap(said[OWNERS])
            running = Running(self, outer, said)
            begin(running, None if torch.compiler.is_compiling() else sys._getframe(2))
        running.entered.append(id(module))
        given = Given(module, names, {**dict(zip(names, args)), **kwargs}, outermost)
        if given.get("output_attentions") is not None:
            running.output_attentions = bool(given.get("output_attentions"))
        for need in self.needs:
            need.prepares(running, given)
        ids = given.ids
        fresh = ids if isinstance(ids, Tensor) else given.get("inputs_embeds")
        if given.has_cache and isinstance(fresh, Tensor):
            cache = given.get("past_key_values")
            running.adopt(cache)
            seen = int(cache.get_seq_length()) if cache is not None else 0
            prompt.track(running, given, seen, fresh.shape[1])
        if outermost:
            packing.look(running, given)
        encoded = given.get("mm_encoder_outputs") if outermost else None
        for one in encoded.values() if isinstance(encoded, dict) else ():
            running.handed.update(getattr(one, HANDED, {}).get(self.token, {}))
        for need in self.needs:
            need.begins(running, given)
        return _rearranged(given, args, kwargs)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        running = current(self)
        if running is None or not running.entered or running.entered[-1] != id(module):
            return None
        running.adopt(_cache_of(output))
        running.entered.pop()
        if running.entered:
            return None
        changed = None
        try:
            alone = "input_ids" not in _parameter_names(type(module))  # an encoder that ran by itself
            if alone and running.scratch.get(HANDED) and hasattr(output, "keys"):
                setattr(output, HANDED, {self.token: running.handed})
            for need in self.needs:
                found = need.ends(running, module, output if changed is None else changed)
                changed = found if found is not None else changed
        finally:
            if not running.aside:
                end(running)
        return changed

    # -- what is held, for tests and debugging ----------------------------------------------------------------

    @property
    def _depth(self) -> int:
        running = current(self)
        return 0 if running is None else len(running.entered)

    @property
    def _inputs(self) -> dict[str, Tensor]:
        running = current(self)
        return {} if running is None else {p: t["layer"] for p, t in running.layers.items() if "layer" in t}

    @property
    def inside(self) -> dict[str, dict[str, Tensor]]:
        """What layers were given that are not over yet."""
        running = current(self)
        return {} if running is None else running.layers


def accept_dense_weights(model: nn.Module, keys: Any) -> None:
    """Hook behind ``load_state_dict``: weights saved without any patch have nothing for the tensors of patches, which
    then stay as they are. Where some of them are there and some are missing, they still are reported."""
    lacks = [key for key in keys.missing_keys if PATCHED in key]
    if lacks and len(lacks) == sum(PATCHED in key for key in model.state_dict()):
        keys.missing_keys[:] = [key for key in keys.missing_keys if PATCHED not in key]


def _generator_that_says(frame: Any) -> int:
    """Id of the frame that wrote ``with hap.prompt(...)``, if that is a generator's (which may be left in the middle of
    the block); else 0."""
    while frame is not None and (
        frame.f_code.co_filename.endswith(("contextlib.py", "api.py")) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return id(frame) if frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR else 0


def _refuse_overlap(owners: tuple[int, ...]) -> None:
    """Refuse a forward of one generator inside the ``hap.prompt`` of another one, which was left in the middle.

    Raises:
        PatchError: the innermost block belongs to a generator that does not run, and one around it to one that does.
    """
    running = set()
    frame: Any = sys._getframe(1)
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    if owners[-1] not in running and any(owner in running for owner in owners):
        raise PatchError(
            "two generators hold a hap.prompt block of this model open at a time, and this forward would be told what "
            "the other one said (Python's generators share their context). Put hap.prompt around every forward instead "
            "of around a yield, or run each conversation in a task or thread of its own"
        )


def _rearranged(given: Given, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(args, kwargs) of a model with what needs have replaced; None if nothing was."""
    for name, value in given.changed.items():
        position = given.names.index(name)
        if position < len(args):
            args = (*args[:position], value, *args[position + 1 :])
        else:
            kwargs = {**kwargs, name: value}
    return (args, kwargs) if given.changed else None


_names: dict[Any, list[str]] = {}


def _cache_of(output: Any) -> Any:
    """The cache in a model's output: `cache` since transformers 5.24, `past_key_values` before."""
    found = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found


def _parameter_names(cls: Any) -> list[str]:
    """Parameter names of a model class' forward, without self."""
    if cls not in _names:
        _names[cls] = list(inspect.signature(cls.forward).parameters)[1:]
    return _names[cls]
