"""The patches of one attention module: `PatchStack`, its child ``attn_patch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import SpanLayer
from ..call.mask import Mask
from ..call.program import Program, same_state
from ..call.ragged import RaggedKV
from ..errors import ModelMismatchError
from ..forward.checkpointing import FACTS
from ..forward.exporting import exported
from ..forward.packing import from_lengths
from ..kernels import Result, attention
from ..model.devices import HOOK, onloaded
from . import pieces, steady
from .dispatch import live, register
from .names import CHILD
from .native import evicted, native_attention
from .program_of import make_program, mask_of
from .site_patch import Call, SitePatch

if TYPE_CHECKING:
    from ..forward.context import Context
    from ..forward.running import Running

__all__ = ["Call", "PatchStack", "SitePatch", "running_stack", "stacks_of", "summary"]


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
        self.steady: steady.Steady | None = None
        live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "steady": None}

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
        if self.steady is not None and query.shape[2] == 1:
            short = self.steady.run(self, module, query, key, value, attention_mask, kwargs)
            if short is not None:
                return short
        self.steady = (
            None  # made anew in every conversation: what a token gives must not depend on earlier ones
        )
        running = None if self.context is None else self.context.running()
        try:
            if torch.compiler.is_exporting():
                names = ", ".join(dict.fromkeys(p.entry.config.name for p in self.site_patches()))
                return exported(names, self._run, running, module, query, key, value, attention_mask, kwargs)
            held = [p for p in self.site_patches() if p._parameters or p._buffers or p._modules]
            if not any(HOOK in m.__dict__ for p in held for m in p.modules()):
                return self._run(running, module, query, key, value, attention_mask, kwargs)
            with onloaded(*held):  # offloaded after it was patched
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
        settle(running, module, key, value)
        native = lambda: native_attention(module, self.native, query, key, value, attention_mask, kwargs)
        if not active:
            output, weights = native()
            if aside is not None:
                aside.keep(self.site_patches(), output)
            return output, weights
        mask = mask_of(module, query, key, attention_mask, kwargs, running)
        cut = self._pieces(active, running, mask, key, kwargs)
        if cut is not None:
            assert running is not None

            def attend(own: Any, q: Any, k: Any, v: Any, of_it: Any) -> tuple[Tensor, Any]:
                program = make_program(module, q, k, v, of_it, kwargs, own)
                self._edit(active, program, own, module)
                result = self._execute(active, program)
                for patch in active:
                    patch.last = summary(program, result)
                return result.output.transpose(1, 2), None

            found, alone = cut
            return pieces.run(found, mask, query, key, value, running, alone, attend)
        program = make_program(module, query, key, value, mask, kwargs, running)
        before = program.state()
        self._edit(active, program, running, module)
        if program.rules and mask.packed and running is not None and running.sequences is None:
            raise ModelMismatchError(
                f"{active[0].entry.config.name}: whether this batch packs several sequences into one row cannot be "
                "known (torch.compile was given position_ids and no attention_mask), and rules count from the start "
                "of a sequence. Pass an attention_mask, or leave position_ids to the model"
            )
        facts = active[0].facts
        if program.rules and facts["merged"]:
            raise ModelMismatchError(
                f"{active[0].entry.config.name}: {active[0].path} attends to its own tokens and an encoder's in one "
                "call; rules count the tokens of one sequence. Exclude this layer with layers=..."
            )
        if facts["num_heads"] not in (None, program.num_heads):
            raise ModelMismatchError(
                f"{active[0].path} is called with {program.num_heads} heads, its patch was made for "
                f"{facts['num_heads']}: the model was sharded or changed after patching. Patch it again"
            )
        # one forced choice wins over auto; two different forced ones were refused at patch time
        plain = not program.ragged and not program.need_weights and _impl(active) == "auto"
        if plain and same_state(
            before, program.state()
        ):  # a layer out of range, a call that is not its business
            output, weights = native()
            for patch in active:
                patch.last = summary(program, Result(output, None, self.native, "nothing was edited"))
            if aside is not None:
                aside.keep(active, output)
            return output, weights
        result = self._execute(active, program)
        output = result.output.transpose(1, 2).contiguous()
        if aside is not None:
            aside.keep(active, output)
            return output, result.weights
        for patch in active:
            patch.last = summary(program, result)
        if program.q_len == 1:
            self.steady = steady.of(self, active, module, program, result.executor)
        return output, result.weights

    def _pieces(
        self, active: list[SitePatch], running: Running | None, mask: Mask, key: Any, kwargs: dict[str, Any]
    ) -> tuple[list[pieces.Piece], bool] | None:
        """(pieces of this call, each is a whole sequence of its own), or None: it is taken as one."""
        if running is None or not isinstance(key, Tensor):
            return None
        if torch.compiler.is_compiling():
            pieces.assert_none(active, running, mask, kwargs)
            return None
        sequences, separate = running.sequences, running.separate
        if mask.given is not None:
            if sequences is not None and sequences.shape[1] == mask.q_len and any(p.counts for p in active):
                pieces.refuse_given_mask(active, mask, sequences, running)
            return None
        if sequences is None and "cu_seq_lens_q" in kwargs and mask.batch == 1:
            sequences = from_lengths(kwargs)
            separate = sequences is not None
        if sequences is not None and sequences.shape[1] == mask.q_len:
            counts = [p for p in active if p.counts]
            if not counts and not separate:
                return None  # the model keeps the sequences apart, or does not
            pieces.refuse(active, mask, sequences)
            return pieces.pieces_of(mask, sequences), True
        counts = [p for p in active if p.counts_itself]
        if counts and mask.causal and mask.holes:
            pieces.refuse(active, mask, None)
            return pieces.pieces_of(mask, None), False
        return None

    def _edit(
        self, active: list[SitePatch], program: Program, running: Running | None, module: nn.Module
    ) -> None:
        for patch in active:
            for variant, (_, config) in enumerate(patch.variants):
                config.edit(program, Call(patch, variant, running, program.mask.causal, module.training))

    def _execute(self, active: list[SitePatch], program: Program) -> Result:
        result = attention(program, _impl(active))
        for observer in program.observers:
            observer(program, result.output)
        return result


def settle(running: Running | None, module: nn.Module, key: Any, value: Any) -> None:
    """Tell the cache layer of `module` which keys and values its attention function was called with."""
    layers = (
        getattr(getattr(running.cache, "self_attention_cache", running.cache), "layers", None)
        if running
        else None
    )
    number = getattr(module, "layer_idx", None)
    if layers is not None and isinstance(number, int) and number < len(layers):
        layer = layers[number]
        if isinstance(layer, SpanLayer) and layer.pending is not None:
            layer.settle(key, value)


def _impl(active: list[SitePatch]) -> str:
    return next((p.entry.impl for p in active if p.entry.impl != "auto"), "auto")


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
