"""`Context`: facts of the running forward that an attention function is not given.

A patch declares what it needs, and only then are hooks installed: on the transformers models around its sites
(input ids, pixel values, the cache) and on its layers (hidden states). What must outlive one forward, such as the
image tokens of a prompt, is kept *on the cache object*, so that a second decoding stream cannot overwrite it and a
copy of a cache (a shared prefix) takes it along; without a cache every forward starts anew.
"""

from __future__ import annotations

import copy
import inspect
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CacheError, PatchError
from ..model.sites import layer_module
from .needs import image_free as without_image
from .needs import inside
from .needs.grid import SeenGrid, seen_grid
from .needs.losses import Losses

if TYPE_CHECKING:
    from ..install.stack import SitePatch

MEMORY = "_attn_patch_memory"  # attribute of a cache
HANDED = "_attn_patch_handed"  # attribute of what an encoder returned, and key of the scratch space
FACTS = "attn_patch_facts"  # keyword argument that carries facts through a checkpointed layer

NEEDS = {
    "image_keys": "which keys are image tokens (from input_ids)",
    "layer_input": "hidden states entering the layer",
    "attention_input": "hidden states entering the attention module",
    "query_before_norm": "queries before the model normalises them",
    "image_free": "head outputs of the same prompt without its images (one more forward per conversation)",
    "added_tokens": "tokens of the patch in front of those of the layer",
    "losses": "auxiliary losses, added to the loss of a forward in training mode",
    "grid": "patch grid of the image or video (from pixel_values)",
    "prompt": "length of the prompt",
    "cache": "KV cache layers with a span per KV head",
    "head_mask": "whether the caller passes head_mask=, which transformers v5 swallows",
}


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
    """Facts of the running forward.

    Attributes:
        prompt_length: tokens of the prompt = length of the first forward that filled the cache; without a cache
            the length of this forward. `hap.prompt(model, length=...)` overrides it (teacher-forced scoring).
        image_keys: bool [B, columns seen], or None when no input ids were given.
        grid: patch grid, e.g. (16, 16) or (T, Gh, Gw), of the pixel values in this forward. pixels: that grid, or why
            there is none (`pixel_grid.SeenGrid`).
        override: what `hap.prompt` said about this forward. output_attentions: what the caller asked for, or None.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.needs: set[str] = set()
        self.handles: list[Any] = []
        self.owners: list[str] = []
        self.layers: dict[str, Any] = {}
        self._said: dict[str, Any] = {}
        self._token = uuid.uuid4().hex
        self._notes: dict[str, list[dict[str, Any]]] = {}
        self._recomputed: set[str] = set()
        self._depth = 0
        self.image_free_pass: without_image.Pass | None = None  # while one runs
        self.losses = Losses()  # of the last forward: they are read after it
        self._reset()

    def _reset(self) -> None:
        self._forward: dict[str, Any] = {}
        self._inputs: dict[str, Tensor] = {}
        self.inside: dict[str, dict[str, Tensor]] = {}
        self.cache: Any = None
        self.override: dict[str, Any] = {}
        self.output_attentions: bool | None = None
        self.pixels = SeenGrid()

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return copy_with_model(self, memo)

    def __getstate__(self) -> dict[str, Any]:  # copies start with an empty memory: their caches are others
        state = dict(self.__dict__)
        for name in ("_forward", "_inputs", "_notes", "inside"):
            state[name] = {}
        state["cache"] = None
        state["losses"] = Losses()  # tensors with a graph cannot be copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._token = uuid.uuid4().hex
        self._depth = 0

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self.pixels.grid

    # -- what methods read ------------------------------------------------------------------------------------

    @property
    def memory(self) -> dict[str, Any]:
        """Scratch space that lives as long as the cache (or this forward, without one)."""
        if self.cache is None:
            return self._forward
        return self.cache.__dict__.setdefault(MEMORY, {}).setdefault(self._token, {})

    @property
    def scratch(self) -> dict[str, Any]:
        """Scratch space that lives as long as this forward."""
        return self._forward

    @property
    def handed(self) -> dict[str, Any]:
        """Facts of this forward that go with its output: ``generate`` runs the vision tower by itself and gives what it
        returned (``mm_encoder_outputs``) to the model, whose forward then finds here what the tower's one left."""
        return self._forward.setdefault(HANDED, {})

    @property
    def prompt_length(self) -> int | None:
        if "length" in self.override:
            return self.override["length"]
        return self.memory.get("prompt_length")

    @property
    def seen(self) -> int | None:
        """Tokens in the cache before this forward, if it is known."""
        return self._forward.get("seen")

    @property
    def image_keys(self) -> Tensor | None:
        """bool [B, columns seen so far, this forward included], True on image tokens."""
        given = self.override.get("image_keys")
        return self.memory.get("image_keys") if given is None else given

    def layer_input(self, path: str) -> Tensor:
        """Hidden states [B, L, C] that entered the layer of the site at `path` in this forward."""
        if path not in self._inputs:
            raise PatchError(
                f"the hidden states that entered the layer of {path} are unknown: the layer ran outside a forward of "
                "its model (gradient checkpointing of a layer that takes no **kwargs does that; switch it off)"
            )
        return self._inputs[path]

    def attention_input(self, path: str) -> Tensor:
        """Hidden states [B, L, C] that entered the attention module at `path` (normalised where the layer does so)."""
        found = self.inside.get(path, {}).get("input")
        if found is None:
            raise PatchError(
                f"{path} got no hidden states as first argument or by name, so nothing can be routed by them; exclude "
                "this layer with layers=..., or use a router that reads the queries"
            )
        return found

    def query_before_norm(self, path: str, heads: int, length: int) -> Tensor | None:
        """Queries [B, L, H, D] before the model's own normalisation; None where it does not normalise them."""
        found = self.inside.get(path, {}).get("query")
        return None if found is None else inside.by_head(found, heads, length)

    def image_free(self, path: str, how: without_image.ImageFree, batch: int | None = None) -> Tensor:
        """Output [B, H, Dv] of the heads at `path`, before W_O, where the prompt without its images ends.

        It is kept as long as the cache is (`memory`). batch: rows wanted, when beams repeat those of the prompt.

        Raises:
            PatchError: this conversation did not begin with ids and images, so there was no image-free pass.
        """
        return without_image.output_at(self, path, how, batch)

    @contextmanager
    def aside(self, one: without_image.Pass) -> Iterator[without_image.Pass]:
        """Inside, the model runs `one`, a forward of its own; the facts of the running forward come back after it."""
        names = (
            "_forward", "_inputs", "_said", "_depth", "inside", "cache", "override", "output_attentions", "pixels",
            "losses", "image_free_pass",
        )  # fmt: skip
        before = {name: getattr(self, name) for name in names}
        self._reset()
        self._said, self._depth, self.image_free_pass = {}, 0, one
        try:
            yield one
        finally:
            self.__dict__.update(before)

    # -- hooks --------------------------------------------------------------------------------------------------

    def install(self, model: nn.Module, needs: set[str], paths: list[str], span_owner: Any) -> None:
        """Install the hooks for `needs` at the sites `paths`; `span_owner(cache, facts)` converts caches."""
        from transformers import PreTrainedModel

        self.remove()
        self.needs = set(needs)
        self.span_owner = span_owner
        self.config = model.config
        owners: dict[int, nn.Module] = {}
        for path in paths:
            names = path.split(".")
            for end in range(len(names)):
                module = model.get_submodule(".".join(names[:end]))
                if isinstance(module, PreTrainedModel):
                    owners[id(module)] = module
        for module in owners.values():
            self.handles.append(module.register_forward_pre_hook(self.before_model, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after_model, always_call=True))
        if needs & {"attention_input", "query_before_norm"}:
            for path in paths:
                self.handles += inside.install(self, model, path)
        if needs & {"layer_input", "image_keys", "grid", "prompt"}:
            for path in paths:
                hook = _LayerInput(self, path, model)
                self.handles.append(
                    layer_module(model, path).register_forward_pre_hook(hook.before, with_kwargs=True)
                )
        if "added_tokens" in needs:  # behind layer_input, which is what the model itself gave the layer
            from .needs import added_tokens

            self.handles += added_tokens.install(self, model, paths)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._notes = {}
        self.needs = set()

    def before_model(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        names = _parameter_names(type(module))
        given = {**dict(zip(names, args)), **kwargs}
        if self._depth == 0:
            self._reset()
            self.losses = Losses(given)
            self.override = self._said
        self._depth += 1
        if given.get("output_attentions") is not None:
            self.output_attentions = bool(given["output_attentions"])
        if "head_mask" in self.needs and given.get("head_mask") is not None and "head_mask" not in names:
            warnings.warn(
                f"{type(module).__name__} got head_mask=, which transformers v5 accepts and ignores; set the gates of "
                "the head_gate patch instead",
                stacklevel=2,
            )
        self.pixels = seen_grid(given, names, getattr(module, "config", None)) or self.pixels
        ids = given.get("input_ids", given.get("decoder_input_ids"))
        embeds = given.get("inputs_embeds")
        fresh = ids if isinstance(ids, Tensor) else embeds
        cache = given.get("past_key_values")
        changed = None
        if "past_key_values" in names and isinstance(fresh, Tensor):
            if cache is None and "cache" in self.needs and self._makes_cache(module, given):
                from transformers import DynamicCache

                cache = DynamicCache(config=module.config)
                changed = cache
            self._adopt(cache)
            seen = int(cache.get_seq_length()) if cache is not None else 0
            self._track_prompt(seen, fresh.shape[1])
            if isinstance(ids, Tensor):
                self._track_images(ids, seen)
            if cache is not None and "cache" in self.needs:
                self.span_owner(cache, self, given.get("attention_mask"))
            encoded = given.get("mm_encoder_outputs") if self._depth == 1 else None
            for one in encoded.values() if isinstance(encoded, dict) else ():
                self.handed.update(getattr(one, HANDED, {}).get(self._token, {}))
            if "image_free" in self.needs and self._depth == 1 and seen == 0 and isinstance(ids, Tensor):
                without_image.begin(self, module, given, ids)
        if changed is not None:
            if len(args) > names.index("past_key_values"):
                position = names.index("past_key_values")
                args = (*args[:position], changed, *args[position + 1 :])
            else:
                kwargs = {**kwargs, "past_key_values": changed}
            return args, kwargs
        return None

    def _adopt(self, cache: Any) -> None:
        """`cache` belongs to this forward. Where a model made it itself, what was learnt so far moves there."""
        if cache is None or cache is self.cache or not hasattr(cache, "get_seq_length"):
            return
        learnt = {} if self.cache is not None else self._forward
        self.cache = cache
        self.memory.update(
            {k: v for k, v in learnt.items() if k not in ("seen", "images_done", without_image.INPUTS)}
        )

    def after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._adopt(getattr(output, "past_key_values", None))
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return None
        alone = "input_ids" not in _parameter_names(type(module))  # an encoder that ran by itself
        if alone and self._forward.get(HANDED) and hasattr(output, "keys"):
            setattr(output, HANDED, {self._token: self.handed})
        self._reset()
        return self.losses.added_to(output)

    def facts(self, path: str) -> dict[str, Any]:
        """Facts of the running forward for the layer at `path`: gradient checkpointing runs the layer again during
        backward, when this forward is over and others may have run since."""
        names = ("_forward", "pixels", "override", "output_attentions")
        inputs = {path: self._inputs[path]} if path in self._inputs else {}
        return {**{name: getattr(self, name) for name in names}, "_inputs": inputs}

    def note(self, path: str, facts: dict[str, Any]) -> None:
        """Remember `facts` for a layer that may not hand them on to its attention."""
        if path in self._recomputed:
            self._notes[path] = []
            self._recomputed.discard(path)
        self._notes.setdefault(path, []).append({**facts, "_inputs": {}})

    def recall(self, facts: dict[str, Any] | None, path: str) -> None:
        """Take up the facts of the forward whose layer is being recomputed, if one is.

        Raises:
            PatchError: the layer did not hand its facts on, and several forwards wait for their backward.
        """
        if self._depth or path not in self._notes or not in_backward():
            return
        self._recomputed.add(path)
        if facts is None:
            notes = self._notes[path]
            alike = not self.needs & {"image_keys", "prompt"} and len({n["pixels"] for n in notes}) == 1
            if len(notes) > 1 and not alike:
                self._recomputed.update(self._notes)
                raise PatchError(
                    f"gradient checkpointing recomputes the layer of {path}, and {len(notes)} different forwards wait "
                    "for their backward; which one this is cannot be known for this layer class. Call backward after "
                    "every forward, or switch gradient checkpointing off"
                )
            facts = notes[-1]
        self.__dict__.update(facts)

    def _makes_cache(self, module: Any, given: dict[str, Any]) -> bool:
        config = module.config
        use = given.get("use_cache")
        if use is None:
            use = getattr(config.get_text_config(), "use_cache", False)
        return bool(use) and not module.training and not getattr(config, "is_encoder_decoder", False)

    def _track_prompt(self, seen: int, new: int) -> None:
        if seen == 0 or "prompt_length" not in self.memory:
            if seen == 0 and self._depth == 1:  # a new prompt; inner models of this forward only add to it
                self.memory.clear()
            self.memory["prompt_length"] = self.override.get("length", seen + new)
        self._forward["seen"] = seen

    def _track_images(self, ids: Tensor, seen: int) -> None:
        if "image_keys" not in self.needs or self._forward.get("images_done"):
            return
        wanted = image_token_ids(self.config)
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in wanted:
            found |= ids == token
        before = self.memory.get("image_keys")
        if seen == 0:
            before = found.new_zeros(ids.shape[0], 0)
        if before is None:
            if self.override.get("image_keys") is None:
                raise CacheError(
                    f"the cache holds {seen} tokens that were read without this patch (or as inputs_embeds), so which "
                    "of them are image tokens is unknown. Start with a fresh cache, or say it with "
                    "hap.prompt(model, image_keys=...)"
                )
            return
        if before.shape[0] != ids.shape[0]:  # beams: rows of one item share their prompt
            before = before.repeat_interleave(ids.shape[0] // before.shape[0], 0)
        self.memory["image_keys"] = torch.cat([before[:, :seen], found], 1)
        self._forward["images_done"] = True

    @contextmanager
    def prompt(self, **facts: Any) -> Iterator[None]:
        before = self._said
        self._said = {**before, **{k: v for k, v in facts.items() if v is not None}}
        try:
            yield
        finally:
            self._said = before


class _LayerInput:
    """Pre-hook of one layer (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, path: str, model: nn.Module):
        self.context, self.path = context, path
        layer = layer_module(model, path)
        names = path.split(".")
        around = [model.get_submodule(".".join(names[:end])) for end in range(1, len(names) + 1)]
        self.way = around[
            next(n for n, m in enumerate(around) if m is layer) :
        ]  # from the layer to its attention

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if "layer_input" in self.context.needs:
            if hidden is None:
                raise PatchError(f"{type(module).__name__} got no hidden states as first argument or by name")
            self.context._inputs[self.path] = hidden
        if not (
            module.training and getattr(module, "gradient_checkpointing", False) and torch.is_grad_enabled()
        ):
            return None
        facts = self.context.facts(self.path)
        self.context.note(self.path, facts)
        if not all(_takes_anything(m) for m in self.way):
            return None
        return args, {**kwargs, FACTS: facts}


def in_backward() -> bool:
    """True while autograd runs, which is when checkpointed layers are recomputed."""
    return torch._C._current_graph_task_id() != -1


def _takes_anything(module: nn.Module) -> bool:
    """True if the forward of a layer has ``**kwargs``, which transformers hands on to the attention function."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


_names: dict[Any, list[str]] = {}


def _parameter_names(cls: Any) -> list[str]:
    """Parameter names of a model class' forward, without self."""
    if cls not in _names:
        _names[cls] = list(inspect.signature(cls.forward).parameters)[1:]
    return _names[cls]


def image_token_ids(config: Any) -> list[int]:
    """Placeholder ids of image and video tokens in a model config."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = []
    for source in (config, getattr(config, "get_text_config", lambda: None)()):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value not in found:
                found.append(value)
    return found


def site_patches(model: nn.Module) -> list[SitePatch]:
    """Every `SitePatch` below `model` (copies that PEFT made included)."""
    from ..install.stack import SitePatch

    return [m for m in model.modules() if isinstance(m, SitePatch)]


def refuse_filled(cache: Any, kind: str) -> CacheError:
    """Error for a cache that holds tokens from before the patch."""
    return CacheError(
        f"the cache already holds {cache.get_seq_length()} tokens in {kind} layers that were filled without this "
        "patch. Start with a fresh cache; or patch with cache='keep', which reads only the patch's keys but frees "
        "no memory and accepts any cache"
    )
