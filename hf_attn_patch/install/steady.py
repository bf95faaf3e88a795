"""`Steady`: what does not change between two decoded tokens of a site, so that a token costs a lookup and a kernel.

Methods that are ``steady`` edit every decoded token of a conversation alike. After one token went the general way, the
next ones skip the program: where a cache with a span per KV head holds just what the rules let a token read, attention
is plain over its slots, and where only gates were set, it is the model's own attention times the gate. Whatever the
shortcut rests on is compared at every token (patches that are on, spans, versions of the gate's tensors), and anything
else (gradients, attention probabilities, several tokens, another kind of mask) takes the general way again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..call.mask import Mask
from ..call.program import Program
from ..call.ragged import RaggedKV
from ..call.rules import AllOf, OnHeads, Rule, SinkWindow
from ..forward.needs import ImageFreePass
from ..forward.running import current
from ..kernels.row_blocks import sdpa
from .native import native_attention

ENDLESS = 1 << 24  # a window that no text outgrows

if TYPE_CHECKING:
    from .site_patch import SitePatch
    from .stack import PatchStack


class Steady:
    """A one-token call of a site that was taken the general way, and how the next ones may be taken.

    spans: per group of the cache (KV heads, span); None = a gate on the model's own attention.
    """

    def __init__(
        self,
        stack: PatchStack,
        active: list[SitePatch],
        program: Program,
        spans: list[tuple[tuple[int, ...], Any]] | None,
    ):
        self.switches = [(patch, patch.entry.enabled) for patch in stack.site_patches()]
        self.active, self.spans = active, spans
        self.scale, self.heads = program.scale, program.num_heads
        self.gate = None if program.head_gate is None else program.head_gate.reshape(1, 1, -1, 1)
        self.rests_on = [(t, t._version, t.data_ptr()) for patch in active for t in _tensors(patch)]
        self.order: Tensor | None = None
        if spans is not None and len(spans) > 1:
            size = self.heads // program.num_kv_heads
            numbers = [kv * size + i for heads, _ in spans for kv in heads for i in range(size)]
            self.chosen = [
                torch.tensor([kv * size + i for kv in heads for i in range(size)]) for heads, _ in spans
            ]
            self.order = torch.tensor(numbers).argsort()

    def run(
        self,
        stack: PatchStack,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, None] | None:
        """The output [B, 1, H, Dv] of a call, or None: it is another one than before."""
        if torch.is_grad_enabled() or kwargs.get("output_attentions") or not self._holds(stack, query, mask):
            return None
        if self.spans is None:
            if isinstance(key, RaggedKV):
                return None
            output, weights = native_attention(module, stack.native, query, key, value, mask, kwargs)
            if weights is not None:
                return None
            assert self.gate is not None
            self._note(query, key.shape[2])
            return output * self.gate.to(output.dtype), None
        if not isinstance(key, RaggedKV) or len(key.groups) != len(self.spans):
            return None
        for group, (heads, span) in zip(key.groups, self.spans):
            if (
                not group.whole
                or group.heads != heads
                or group.span != span
                or group.key.dtype != query.dtype
            ):
                return None
            if group.value.dtype != query.dtype:
                return None
        if self.order is None:
            group = key.groups[0]
            out = sdpa(query, group.key, group.value, None, self.scale)
        else:
            parts = [
                sdpa(query[:, chosen], group.key, group.value, None, self.scale)
                for chosen, group in zip(self.chosen, key.groups)
            ]
            out = torch.cat(parts, 1)[:, self.order]
        output = out.transpose(1, 2)
        if self.gate is not None:
            output = output * self.gate.to(output.dtype)
        self._note(query, key.seen)
        return output.contiguous(), None

    def _holds(self, stack: PatchStack, query: Tensor, mask: Any) -> bool:
        """Whether everything that the shortcut rests on is as it was."""
        for patch, enabled in self.switches:
            if patch.entry.enabled is not enabled:
                return False
        if len(self.switches) != len(stack.patches) or not (mask is None or plain(mask)):
            return False
        for tensor, version, pointer in self.rests_on:
            if tensor._version != version or tensor.data_ptr() != pointer:
                return False
        if stack.context is not None:
            running = current(stack.context)
            if running is not None and (running.output_attentions or running.image_free_pass is not None):
                return False
        return self.gate is None or self.gate.device == query.device

    def _note(self, query: Tensor, total: int) -> None:
        for patch in self.active:
            patch.last["kv_len"] = total
            patch.last["q_offset"] = total - 1


def plain(mask: Any) -> bool:
    """Whether a mask says nothing but "causal", padding and a length."""
    return type(mask) is Mask and mask.rule is None and mask.given is None and mask.window is None


def of(
    stack: PatchStack, active: list[SitePatch], module: nn.Module, program: Program, executor: str
) -> Steady | None:
    """The shortcut for calls like the edited `program`, which just ran on `executor`; None: there is none."""
    if program.q_len != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not all(config.steady for patch in active for _, config in patch.variants):
        return None
    if any(isinstance(need, ImageFreePass) for need in (stack.context.needs if stack.context else ())):
        return None
    edited = (
        program.score_edits or program.mass_edits or program.blends or program.output_gates or program.observers
        or program.dropout or program.need_weights or program.softcap is not None or program.mixture is not None
        or program.sink_logits is not None or program.position_bias is not None or program.addition is not None
        or program.query_scale is not None
    )  # fmt: skip
    gate = program.head_gate
    if edited or not plain(program.mask) or (gate is not None and gate.numel() != program.num_heads):
        return None
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for p in active for t in _tensors(p)):
        return None
    if not program.ragged:
        only_gated = gate is not None and not program.rules
        forced = next((p.entry.impl for p in active if p.entry.impl != "auto"), "auto")
        return Steady(stack, active, program, None) if only_gated and forced == "auto" else None
    if executor != "torch" or program.query.device.type != "cpu":
        return None
    groups = program.key.groups  # type: ignore[union-attr]
    size = program.num_heads // program.num_kv_heads
    for group in groups:
        heads = [kv * size + i for kv in group.heads for i in range(size)]
        if not group.whole or group.span is None:
            return None
        if not all(_covers(rule, heads, program.num_heads, group.span) for rule in program.rules):
            return None
    return Steady(stack, active, program, [(group.heads, group.span) for group in groups])


def _covers(rule: Rule, heads: list[int], num_heads: int, span: tuple[int, int]) -> bool:
    """Whether a rule lets the query `heads` read all that `span` keeps (window 0: everything), at every length."""
    if isinstance(rule, AllOf):
        return all(_covers(one, heads, num_heads, span) for one in rule.rules)
    if isinstance(rule, OnHeads):
        return _covers(rule.rule, [h for h in heads if h in rule.on], num_heads, span)
    if not isinstance(rule, SinkWindow):
        return False
    sinks, window = span if span[1] else (0, ENDLESS)
    own = [rule.of(h * rule.heads // num_heads) for h in heads]
    return all(s >= sinks and w >= window for s, w in own)


def _tensors(patch: SitePatch) -> list[Tensor]:
    return [*patch.parameters(), *patch.buffers()]
