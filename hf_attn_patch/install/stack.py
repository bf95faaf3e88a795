"""The patches of one attention module: `PatchStack`, its child ``attn_patch``, and what one of them is, `SitePatch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..call.program import Program, same_state
from ..call.ragged import RaggedKV
from ..errors import ModelMismatchError
from ..forward.checkpointing import FACTS, in_backward
from ..kernels import Result, attention
from ..model.sites import Site
from .dispatch import live, register
from .names import CHILD
from .native import evicted, native_attention
from .program_of import make_program

if TYPE_CHECKING:
    from ..forward.context import Context
    from ..forward.running import Running
    from ..registry import Patch


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
        self, patch: SitePatch, variant: int, context: Running | None, causal: bool, training: bool = False
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

    patches: nn.ModuleDict
    context: Context | None

    def __init__(self, native: str, context: Context | None = None):
        super().__init__()
        self.native = native
        self.context = context
        self.patches = nn.ModuleDict()
        live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copy.deepcopy and torch.load come through here
        super().__setstate__(state)
        live.add(self)
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
        kwargs.pop(FACTS, None)
        running = None if self.context is None else self.context.running()
        try:
            return self._run(running, module, query, key, value, attention_mask, kwargs)
        finally:
            if running is not None and running.layers:
                for patch in self.site_patches():
                    running.release(patch.path)

    def _run(
        self,
        running: Running | None,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        aside = None if running is None else running.image_free_pass
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
                config.edit(program, Call(patch, variant, running, program.mask.causal, module.training))
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


def stacks_of(module: nn.Module) -> list[PatchStack]:
    """The stack of a site; more than one where PEFT has wrapped and copied it (the original comes first)."""
    child = module._modules.get(CHILD)
    return [] if child is None else [m for m in child.modules() if isinstance(m, PatchStack)]


def running_stack(module: nn.Module) -> PatchStack:
    """The stack of a patched site that its next call goes through: where PEFT has wrapped it (``modules_to_save``), the
    copy of the active adapter."""
    child: Any = module._modules[CHILD]
    copies = getattr(child, "modules_to_save", None)
    if copies is not None and not isinstance(child, PatchStack):
        chosen = getattr(child, "active_adapter", None)
        chosen = chosen[0] if isinstance(chosen, (list, tuple)) and chosen else chosen
        if not getattr(child, "disable_adapters", False) and chosen in copies:
            child = copies[chosen]
        else:
            child = child.original_module
    assert isinstance(child, PatchStack)
    return child
