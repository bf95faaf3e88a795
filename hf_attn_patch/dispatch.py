"""The one attention function and the one mask function that transformers is told about.

Both are registered under the same name at the first `patch()` and dropped when no patched model is left: an
attention function without a mask function of the same name gets no mask at all and attends to padding. What a
call should do is read from the attention module itself (its child ``attn_patch``, a `PatchStack`), so copies,
devices, PEFT and several models in one process need no global table.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .context import FACTS, in_backward
from .errors import CacheError, ModelMismatchError
from .kernels import Result, attention
from .kernels.ragged import RaggedKV
from .masks import Mask
from .program import Program, same_state
from .sites import Site, base_model, find_sites, why_not_dispatchable

if TYPE_CHECKING:
    from .context import Context
    from .registry import Patch

NAME = "hf_attn_patch"
# A model loaded with eager attention may compute with its (float) mask, one loaded with sdpa with a bool mask:
# the mask function must know which, and transformers gives it nothing but the name.
EAGER_NAME = f"{NAME}_eager"
CHILD = "attn_patch"

# What modeling code passes besides q, k, v and mask, and that is either in the Program already (mask, window) or
# irrelevant to the result. Anything else that carries a tensor is refused: ignoring it would be silently wrong.
_KNOWN_KWARGS = {
    "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic", "cache",
    "softcap", "s_aux", "position_bias", "position_embeddings", "past_key_values", "cache_position", "layer_idx",
    "attention_mask", "token_type_ids", "mm_token_type_ids", "return_dict", "logits_to_keep", "head_mask",
    "num_items_in_batch", "shift_labels",  # for the loss: Trainer gives them to the model, which hands everything on
}  # fmt: skip


class SitePatch(nn.Module):
    """One patch on one site: the method's config for this site, plus the tensors it declared.

    variants: (query heads or None, config), so that heads of a site can carry different options.
    """

    entry: Any
    last: dict[str, Any]
    facts: dict[str, Any]
    variants: list[tuple[tuple[int, ...] | None, Patch]]

    def __init__(self, site: Site, entry: Any, variants: list[tuple[tuple[int, ...] | None, Patch]]):
        super().__init__()
        self.entry = entry
        self.variants = variants
        self.path, self.layer, self.part = site.path, site.layer, site.part
        self.facts = {
            "layer": site.layer,
            "num_heads": site.num_heads,
            "num_kv_heads": site.num_kv_heads,
            "causal": site.causal,
        }
        # the first variant's tensors live here, those of further ones (heads with other options) in children 1, 2, ...
        for number, (_, config) in enumerate(variants):
            holder = nn.Module() if number else self
            for name, tensor in config.tensors(site).items():
                if isinstance(tensor, nn.Parameter):
                    holder.register_parameter(name, tensor)
                else:
                    holder.register_buffer(name, tensor)
            if number:
                self.add_module(str(number), holder)
        self.last = {}

    @property
    def frees_cache(self) -> bool:
        """True if it may have had tokens evicted from the cache."""
        return self.entry.cache == "auto" and self.entry.config.frees_cache

    def holder(self, number: int) -> nn.Module:
        """The module that holds the tensors of variant `number`."""
        return self.get_submodule(str(number)) if number else self

    def extra_repr(self) -> str:
        state = "" if self.entry.enabled else ", disabled"
        return ", ".join(repr(config) for _, config in self.variants) + state


class Call:
    """Facts of one attention call for `Patch.edit`: where, on which heads, in which forward.

    layer, path, part: the site. heads: query heads to edit (None = all). tensors: the module that holds the
    method's parameters and buffers for these heads. context: facts of the running forward. training: the model trains.
    """

    def __init__(
        self, patch: SitePatch, variant: int, context: Context | None, causal: bool, training: bool = False
    ):
        self.layer, self.path, self.part = patch.layer, patch.path, patch.part
        self.heads, self.tensors = patch.variants[variant][0], patch.holder(variant)
        self.context, self.causal = context, causal
        self.key, self.training = patch.entry.key, training

    def add_loss(self, name: str, value: Tensor, weight: float) -> None:
        """Add ``weight * mean over sites of value`` (0-d) to the loss of this forward; ignored unless the model trains.

        A patch that calls it lists "losses" in its `needs`. A layer that runs again in backward (checkpointing)
        computes its value again, but it counts once.
        """
        if self.training and self.context is not None and not in_backward():
            self.context.losses.add(f"{self.key}.{name}", self.path, value, weight)


class PatchStack(nn.Module):
    """The patches of one site, in order of `patch()` calls; child ``attn_patch`` of the attention module.

    native: the attention implementation that was active before, used when no patch is enabled.
    """

    live: weakref.WeakSet[PatchStack] = weakref.WeakSet()
    patches: nn.ModuleDict
    context: Context | None

    def __init__(self, native: str, context: Context | None = None):
        super().__init__()
        self.native = native
        self.context = context
        self.patches = nn.ModuleDict()
        PatchStack.live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copy.deepcopy and torch.load come through here
        super().__setstate__(state)
        PatchStack.live.add(self)
        register()

    def extra_repr(self) -> str:
        return f"native={self.native!r}"

    def site_patches(self) -> list[SitePatch]:
        """The patches of this site in order."""
        return list(self.patches.values())  # type: ignore[arg-type]

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Run one attention call of `module`; same contract as a transformers attention function."""
        facts = kwargs.pop(FACTS, None)
        if self.context is not None:
            self.context.recall(facts, next((p.path for p in self.site_patches()), ""))
        aside = None if self.context is None else self.context.image_free_pass
        active = [p for p in self.site_patches() if p.entry.enabled and (aside is None or aside.runs(p))]
        if isinstance(key, RaggedKV) and not any(p.frees_cache for p in active):
            raise evicted(key)
        if not active:
            output, weights = native_attention(module, self.native, query, key, value, attention_mask, kwargs)
            if aside is not None:
                aside.keep(self.site_patches(), output)
            return output, weights
        program = make_program(module, query, key, value, attention_mask, kwargs)
        before = program.state()
        for patch in active:
            for variant, (_, config) in enumerate(patch.variants):
                config.edit(program, Call(patch, variant, self.context, program.mask.causal, module.training))
        if program.rules and program.mask.packed:
            raise ModelMismatchError(
                f"{active[0].entry.config.name}: this batch packs several sequences into one row (position ids "
                "restart), and rules count from the start of the row. Put one sequence in each row"
            )
        # one forced choice wins over auto; two different forced ones were refused at patch time
        impl = next((p.entry.impl for p in active if p.entry.impl != "auto"), "auto")
        plain = impl == "auto" and not program.ragged and not program.need_weights
        if plain and same_state(
            before, program.state()
        ):  # a layer out of range, a call that is not its business
            output, weights = native_attention(module, self.native, query, key, value, attention_mask, kwargs)
            for patch in active:
                patch.last = summary(program, Result(output, None, self.native, "nothing was edited"))
            if aside is not None:
                aside.keep(active, output)
            return output, weights
        result = attention(program, impl)
        for observer in program.observers:
            observer(program, result.output)
        output = result.output.transpose(1, 2).contiguous()
        if aside is not None:
            aside.keep(active, output)
            return output, result.weights
        for patch in active:
            patch.last = summary(program, result)
        return output, result.weights


def summary(program: Program, result: Result) -> dict[str, Any]:
    """What `handle.report()` shows about the last call of a site (plain data, no tensors kept but one number)."""
    dynamic = any(rule.dynamic for rule in program.rules)
    return {
        "executor": result.executor,
        "reason": result.reason,
        "rules": [] if dynamic else list(program.rules),
        "share": program.share,
        "q_len": program.q_len,
        "kv_len": program.mask.kv_len,
        "q_offset": program.mask.q_offset,
        "causal": program.mask.causal,
        "window": program.mask.window,
        "slots": [(g.heads, g.key.shape[2]) for g in program.key.groups] if program.ragged else None,  # type: ignore[union-attr]
    }


def make_program(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, kwargs: dict[str, Any]
) -> Program:
    """One attention call of a transformers module as a neutral `Program`.

    Raises:
        ModelMismatchError: the module passes something that changes its attention and that a Program cannot hold.
    """
    unknown = [
        k
        for k, v in kwargs.items()
        if k not in _KNOWN_KWARGS and (isinstance(v, Tensor) or (isinstance(v, (tuple, list)) and v))
    ]
    if unknown:
        raise ModelMismatchError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function; a patch would ignore "
            "that and compute something else. Exclude these layers with layers=..., or leave the model unpatched"
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    mask = Mask.of(attention_mask, query, key, causal=causal)
    check_length(module, mask, key)
    context = getattr(module._modules.get(CHILD), "context", None)
    seen = context.seen if context is not None and causal else None
    if mask.given is not None and seen is not None and seen + mask.q_len < mask.kv_len:
        mask.q_offset = (
            seen  # a static cache is longer than what was seen, and a given mask does not say where we are
        )
    scaling = kwargs.get("scaling")
    position_bias = kwargs.get("position_bias")
    return Program(
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        position_bias=position_bias if isinstance(position_bias, Tensor) else None,
        dropout=float(kwargs.get("dropout") or 0.0),
        need_weights=wants_weights(module, kwargs),
    )


def check_length(module: nn.Module, mask: Mask, key: Any) -> None:
    """A mask made for another number of keys than the module attends to belongs to a model that edits its mask.

    Raises:
        ModelMismatchError: the model extends its keys and its mask by means that a `Mask` does not go through.
    """
    if mask.given is None and mask.kv_len != key.shape[2] and mask.kv_len != 1:
        raise ModelMismatchError(
            f"{type(module).__name__} attends to {key.shape[2]} keys, its mask was made for {mask.kv_len}; this model "
            "changes keys and mask on its own, which a patch cannot follow"
        )


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True if this forward was asked for attention probabilities."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        stack = module._modules.get(CHILD)
        context = getattr(stack, "context", None)
        asked = context.output_attentions if context is not None else None
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def eager_function(module: nn.Module) -> Any:
    """The eager attention function in the modeling file of `module` (what transformers uses as its default)."""
    forward = inspect.unwrap(type(module).forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward") and name in forward.__globals__:
            return forward.__globals__[name]
    raise ModelMismatchError(
        f"{type(module).__name__} has no eager attention function to fall back to; load the model with "
        "attn_implementation='sdpa'"
    )


def evicted(key: RaggedKV) -> CacheError:
    """Error for a cache of per-head spans at a site where nothing reads by spans (any more)."""
    return CacheError(
        f"this cache keeps {key} for a patch that is not active now; its evicted tokens are gone. "
        "Start with a fresh cache, or keep the patch enabled while the cache lives"
    )


def native_attention(
    module: nn.Module, native: str, query: Tensor, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Exactly what the module would have computed without us."""
    if isinstance(key, RaggedKV):
        raise evicted(key)
    if isinstance(mask, Mask):
        check_length(module, mask, key)
        facts, mask = mask, mask.native(native)
        if (
            mask is None
            and facts.causal
            and kwargs.get("is_causal") is False
            and facts.q_len > 1
            and (getattr(module, "is_causal", False))
        ):
            # the module decided `is_causal` by whether it got a mask; natively it would have got none
            kwargs = {**kwargs, "is_causal": True}
    functions = inspect.unwrap(type(module).forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    function = eager_function(module) if native == "eager" else functions.get_interface(native, None)
    return function(module, query, key, value, mask, **kwargs)


def attention_forward(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers."""
    stack = module._modules.get(CHILD)
    if (
        stack is None
    ):  # a module that shares its config with patched ones but was no site when they were patched
        kwargs.pop(FACTS, None)
        native = "eager" if getattr(module.config, "_attn_implementation", NAME) == EAGER_NAME else "sdpa"
        return native_attention(module, native, query, key, value, attention_mask, kwargs)
    return stack(module, query, key, value, attention_mask, kwargs)


def mask_function(**arguments: Any) -> Mask | None:
    """The mask function registered with transformers: returns facts instead of a tensor."""
    return _make_mask("sdpa", arguments)


def eager_mask_function(**arguments: Any) -> Mask | None:
    """`mask_function` for models that were loaded with eager attention."""
    return _make_mask("eager", arguments)


def _make_mask(flavour: str, arguments: dict[str, Any]) -> Mask | None:
    given = arguments.get("attention_mask")
    if isinstance(given, Mask):  # an inner model may be handed the mask that an outer one made
        return given
    mask = Mask.from_transformers(flavour, **arguments)
    if arguments.get("allow_is_bidirectional_skip") and not mask.restricts:
        return None  # as transformers does: modules that are no sites may take another path without a mask
    return mask


def register() -> None:
    """Tell transformers about both functions, under both names. Safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, mask in ((NAME, mask_function), (EAGER_NAME, eager_mask_function)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, mask)


def unregister_if_unused() -> bool:
    """Forget both names once no patched model (or copy of one) is alive. True if they are gone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if len(PatchStack.live):
        return False
    for name in (NAME, EAGER_NAME):
        for interface in (AttentionInterface, AttentionMaskInterface):
            # there is no public way to take a registration back
            interface._global_mapping.pop(name, None)
    return True


def registered() -> bool:
    """True if transformers currently knows our attention function."""
    from transformers import AttentionInterface

    return NAME in AttentionInterface._global_mapping


def stacks_of(module: nn.Module) -> list[PatchStack]:
    """The stack of a site; more than one where PEFT has wrapped and copied it (the original comes first)."""
    child = module._modules.get(CHILD)
    return [] if child is None else [m for m in child.modules() if isinstance(m, PatchStack)]


# -- switching configs ------------------------------------------------------------------------------------------


def configs_of(model: nn.Module, sites: list[Site]) -> list[Any]:
    """The config objects that decide the attention implementation of `sites`: the modules' own, and those of the
    transformers models around them, which build the masks."""
    from transformers import PreTrainedModel

    found: dict[int, Any] = {}
    for site in sites:
        config = getattr(site.module, "config", None)
        if config is not None:
            found[id(config)] = config
        names = site.path.split(".")
        for end in range(len(names) - 1, -1, -1):
            owner = model.get_submodule(".".join(names[:end]))
            if isinstance(owner, PreTrainedModel):
                found[id(owner.config)] = owner.config
                break
    return list(found.values())


def set_implementation(config: Any, name: str | None) -> None:
    """Set the attention implementation of one config object and of no other.

    ``set_attn_implementation`` would also reach into sub-configs, and refuses whole model classes by a regular
    expression over their source; a patch of part="text" must leave the vision tower alone.
    """
    config._attn_implementation_internal = name


def attach(
    model: nn.Module, sites: list[Site], context: Context | None = None
) -> list[tuple[Any, str | None]]:
    """Put an empty `PatchStack` on every site that shares a config with `sites` and route those configs to us.

    Returns:
        (config, previous implementation) pairs for `detach`.

    Raises:
        ModelMismatchError: a forward branches on the implementation's name; nothing was changed.
    """
    chosen = configs_of(model, sites)
    ids = {id(c) for c in chosen}
    sharing = [s for s in find_sites(model) if id(getattr(s.module, "config", None)) in ids]
    for site in sharing:
        if (reason := why_not_dispatchable(site.module)) is not None:
            raise ModelMismatchError(f"{site.path} cannot be patched: {reason}")
    register()
    snapshot = []
    for site in sharing:
        config = getattr(site.module, "config", None)
        if CHILD not in site.module._modules:
            native = getattr(config, "_attn_implementation", None) or "sdpa"
            site.module.add_module(CHILD, PatchStack(native, context))
    for config in chosen:
        previous = getattr(config, "_attn_implementation", None)
        if previous in (NAME, EAGER_NAME):
            continue
        snapshot.append((config, previous))
        set_implementation(config, EAGER_NAME if previous == "eager" else NAME)
    return snapshot


def detach(
    model: nn.Module, snapshot: list[tuple[Any, str | None]], keep: list[Site] | None = None
) -> list[tuple[Any, str | None]]:
    """Undo `attach`: restore configs, drop the stacks, and the registration if nobody else uses it.

    Args:
        keep: sites that stay patched; what they need stays.

    Returns:
        The part of `snapshot` that is still to be undone.
    """
    kept = {id(config) for config in configs_of(model, keep or [])}
    for config, previous in snapshot:
        ours = getattr(config, "_attn_implementation", None) in (NAME, EAGER_NAME)
        if id(config) not in kept and ours:  # what the user has chosen meanwhile stays
            set_implementation(config, previous)
    for module in model.modules():
        if CHILD in module._modules and id(getattr(module, "config", None)) not in kept:
            for stack in stacks_of(module):
                PatchStack.live.discard(stack)
            del module._modules[CHILD]
    unregister_if_unused()
    return [(config, previous) for config, previous in snapshot if id(config) in kept]


@contextmanager
def dispatched(model: nn.Module) -> Iterator[None]:
    """Route every site of `model` through our dispatch without any patch (coverage and overhead checks)."""
    model = base_model(model)
    snapshot = attach(model, find_sites(model))
    try:
        yield
    finally:
        detach(model, snapshot)
