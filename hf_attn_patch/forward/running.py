"""`Running`: the facts of one forward of a patched model, from its first hook to its last.

It is made when the outermost transformers model begins, found by attention calls through a context variable (so threads
and tasks have their own), and gone when the forward ends in any way. What a layer was given is dropped when its
attention call is over.
"""

from __future__ import annotations

import sys
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PatchError
from .conversation import Conversation, conversation_of
from .needs.grid import SeenGrid
from .needs.losses import Losses

if TYPE_CHECKING:
    from .context import Context
    from .needs.image_free import ImageFree, Pass

HANDED = "_attn_patch_handed"  # attribute of what an encoder returned

_now: ContextVar[Running | None] = ContextVar("hf_attn_patch_running", default=None)


class Seen:
    """What torch.compile can follow, which cannot read context variables. now: innermost running forward of this
    thread; it equals the context variable while a forward runs, so that
    facts cross graph breaks and borders of compiled regions.
    said: {token of a context: what `hap.prompt` says in this thread}."""

    def __init__(self) -> None:
        self.now: Running | None = None
        self.said: dict[str, dict[str, Any]] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.seen = Seen()  # torch.compile loses what is written to a thread local itself (torch 2.13)


_thread = _Thread()


def of_thread() -> Seen:
    """Of the running thread."""
    return _thread.seen


class Running:
    """Facts of one forward.

    Attributes:
        context: the patched model's. outer: the forward around this one, of any patched model.
        layers: path of a site -> what its layer was given, while it runs. scratch: lives as long as the forward.
        cache: the KV cache of this forward. seen: tokens in it before, if known.
        override: what `hap.prompt` said. output_attentions: what the caller asked for, or None.
        pixels: the token grid of the pixel values, or why there is none. losses: auxiliary losses.
        aside: it runs inside another one of its model. again: path of the site that is computed again in backward.
        image_free_pass: the pass this forward is, if it is one without images.
        sequences: int64 [B, L], which sequence of a packed row a token belongs to, or None. separate: the model's own
            kernel would keep them apart (lengths were given). positions_given: the caller passed position ids.
        restarts: bool [], position ids begin again inside a row; only known to a traced forward, which asserts it.
    """

    def __init__(
        self,
        context: Context,
        outer: Running | None = None,
        said: dict[str, Any] | None = None,
        image_free_pass: Pass | None = None,
    ):
        self.context, self.outer = context, outer
        self.entered: list[int] = []
        self.frame: Any = None
        self.aside, self.again = False, ""
        self.scratch: dict[Any, Any] = {}
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.cache: Any = None
        self.seen: int | None = None
        self.override: dict[str, Any] = said or {}
        self.output_attentions: bool | None = None
        self.pixels = SeenGrid()
        self.losses = Losses()
        self.image_free_pass = image_free_pass
        self.sequences: Tensor | None = None
        self.separate = False
        self.positions_given = True
        self.restarts: Tensor | None = None
        self._own = Conversation()  # without a cache

    # -- where we are ---------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.context.model

    @property
    def config(self) -> Any:
        return self.context.model.config

    @property
    def memory(self) -> Conversation:
        """Lives as long as the cache (or this forward, without one)."""
        return self._own if self.cache is None else conversation_of(self.cache, self.context.token)

    @property
    def handed(self) -> dict[Any, Any]:
        """Facts of this forward that go with its output: ``generate`` runs the vision tower by itself and gives what it
        returned (``mm_encoder_outputs``) to the model, whose forward then finds here what the tower's one left."""
        return self.scratch.setdefault(HANDED, {})

    @property
    def prompt_length(self) -> int | None:
        """Column behind the prompt of this turn: as said (`hap.prompt`), as ``generate`` knows it, or else the end of
        the last forward of several tokens; the length of this forward, without a cache."""
        if "length" in self.override:
            return self.override["length"]
        return self.memory.prompt_length

    @property
    def first_prompt(self) -> int | None:
        """`prompt_length` of the first turn of the conversation."""
        if "length" in self.override:
            return self.override["length"]
        first = self.memory.first_prompt
        return self.memory.prompt_length if first is None else first

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self.pixels.grid

    @property
    def image_keys(self) -> Tensor | None:
        """bool [B, columns seen so far, this forward included], True on image tokens; None: no input ids told."""
        given = self.override.get("image_keys")
        return self.memory.get("image_keys") if given is None else given

    # -- of one layer ------------------------------------------------------------------------------------------

    def note(self, path: str, name: str, value: Tensor) -> None:
        """Keep `value` for the site at `path` until its attention call is over."""
        self.layers.setdefault(path, {})[name] = value

    def release(self, path: str) -> None:
        """The attention call of the site at `path` is over: what it was given may go."""
        kept = self.layers.get(path)
        for name in ("layer", "attention", "query") if kept else ():
            kept.pop(name, None)  # type: ignore[union-attr]
        if not kept:
            self.layers.pop(path, None)

    def layer_input(self, path: str) -> Tensor:
        """Hidden states [B, L, C] that entered the layer of the site at `path` in this forward."""
        found = self.layers.get(path, {}).get("layer")
        if found is None:
            raise PatchError(
                f"the hidden states that entered the layer of {path} are unknown: the layer ran outside a forward of "
                "its model (gradient checkpointing of a layer that takes no **kwargs does that; switch it off)"
            )
        return found

    def attention_input(self, path: str) -> Tensor:
        """Hidden states [B, L, C] that entered the attention module at `path` (normalised where the layer does so)."""
        found = self.layers.get(path, {}).get("attention")
        if found is None:
            raise PatchError(
                f"{path} got no hidden states as first argument or by name, so nothing can be routed by them; exclude "
                "this layer with layers=..., or use a router that reads the queries"
            )
        return found

    def query_before_norm(self, path: str, heads: int, length: int) -> Tensor | None:
        """Queries [B, L, H, D] before the model's own normalisation; None where it does not normalise them."""
        from .needs.attention_input import by_head

        found = self.layers.get(path, {}).get("query")
        return None if found is None else by_head(found, heads, length)

    def image_free(self, path: str, how: ImageFree, batch: int | None = None) -> Tensor:
        """Output [B, H, Dv] of the heads at `path`, before W_O, where the prompt without its images ends.

        It is kept as long as the cache is (`memory`). batch: rows wanted, when beams repeat those of the prompt.

        Raises:
            PatchError: this conversation did not begin with ids and images, so there was no image-free pass.
        """
        from .needs.image_free import output_at

        return output_at(self, path, how, batch)

    # -- the cache -----------------------------------------------------------------------------------------------

    def adopt(self, cache: Any) -> None:
        """`cache` belongs to this forward. Where a model made it itself, what was learnt so far moves there."""
        if cache is None or cache is self.cache or not hasattr(cache, "get_seq_length"):
            return
        learnt = self._own if self.cache is None else None
        self.cache = cache
        if learnt is not None and (learnt or learnt.prompt_length is not None):
            self.memory.learn(learnt)
            self._own = Conversation()

    def __repr__(self) -> str:
        facts = [f"of {type(self.model).__name__}", f"prompt {self.prompt_length}", f"seen {self.seen}"]
        facts += [f"grid {self.grid}"] if self.grid else []
        facts += ["image-free pass"] if self.image_free_pass is not None else []
        return f"<running forward {', '.join(facts)}>"


def current(context: Context) -> Running | None:
    """The innermost running forward of the model that `context` belongs to, in this thread; None: none runs."""
    if not torch.compiler.is_compiling():
        now = _now.get()
        while now is not None and now.context is not context:
            now = now.outer
        if now is not None:
            return now
    now = _thread.seen.now  # a context variable cannot be traced
    while now is not None and now.context is not context:
        now = now.outer
    return now


def begin(running: Running, frame: Any = None) -> None:
    """`running` is the innermost forward from now on."""
    _thread.seen.now = running
    if torch.compiler.is_compiling():  # a context variable cannot be traced
        return
    running.frame = frame
    _now.set(running)


def end(running: Running) -> None:
    """The forward is over; so are those that began inside it and did not end."""
    running.frame = None
    running.layers.clear()
    now = _thread.seen.now
    while now is not None and now is not running:
        now = now.outer
    if now is running:
        _thread.seen.now = running.outer
    if torch.compiler.is_compiling():
        return
    now = _now.get()
    while now is not None and now is not running:
        now = now.outer
    if now is running:
        _now.set(running.outer)


def innermost() -> Running | None:
    """The innermost running forward of any patched model in this thread, without those that a Ctrl-C cut off: torch
    calls no hook then, but their frame is gone from the stack."""
    if torch.compiler.is_compiling():  # frames cannot be traced
        return _thread.seen.now
    now = _now.get()
    if now is None:
        return None
    alive = set()
    frame: Any = sys._getframe(1)
    while frame is not None:
        alive.add(id(frame))
        frame = frame.f_back
    while now is not None and now.frame is not None and id(now.frame) not in alive:
        now.frame = None
        now = now.outer
        _now.set(now)
        _thread.seen.now = now
    return now
