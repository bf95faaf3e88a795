"""Rules made of rules: on some heads only, and several at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Everything, Ranges, Rule


@dataclass(frozen=True)
class OnHeads(Rule):
    """`rule` on the listed query heads, everything on the others."""

    rule: Rule
    on: tuple[int, ...]
    heads: int = 1  # number of query heads of the site

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        return self.rule.dynamic

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on = torch.zeros(self.heads, dtype=torch.bool, device=q.device)
        on[list(self.on)] = True
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else torch.zeros_like(head)
        return self.rule.visible(inner, q, k) | ~on[head]

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        if head in self.on:
            inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
            return self.rule.key_ranges(inner, q_lo, q_hi, kv_len)
        return Everything().key_ranges(head, q_lo, q_hi, kv_len)

    def token_order(self, block: int) -> tuple[int, ...] | None:
        return self.rule.token_order(block)

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
        kind = self.rule.tile_kind(inner, q_lo, k_lo, block)
        # the column that tells "on" from "off" keeps the tiles of both apart
        on = torch.full_like(q_lo, head in self.on)[:, None]
        return None if kind is None else torch.cat([on, kind * on], -1)

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        if head not in self.on:
            return Everything().block_kinds(head, q_tokens, k_tokens)
        inner = head * self.rule.heads // self.heads if self.rule.heads > 1 else 0
        return self.rule.block_kinds(inner, q_tokens, k_tokens)

    def required_len(self) -> int | None:
        return self.rule.required_len()


@dataclass(frozen=True)
class AllOf(Rule):
    """Intersection of rules (two patches on one site). Layout heads are spread over the largest head count."""

    rules: tuple[Rule, ...]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(rule.heads for rule in self.rules)

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        return any(rule.dynamic for rule in self.rules)

    def _inner(self, rule: Rule, head: Any) -> Any:
        return head * rule.heads // self.heads

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self.rules[0].visible(self._inner(self.rules[0], head), q, k)
        for rule in self.rules[1:]:
            seen = seen & rule.visible(self._inner(rule, head), q, k)
        return seen

    def token_order(self, block: int) -> tuple[int, ...] | None:
        orders = [o for o in (rule.token_order(block) for rule in self.rules) if o is not None]
        return orders[0] if orders else None

    def key_ranges(self, head: int, q_lo: Tensor, q_hi: Tensor, kv_len: int) -> tuple[Ranges, Ranges]:
        maybe, surely = Everything().key_ranges(head, q_lo, q_hi, kv_len)
        for rule in self.rules:
            more, sure = rule.key_ranges(self._inner(rule, head), q_lo, q_hi, kv_len)
            maybe, surely = _meet(maybe, more), _meet(surely, sure)
        return maybe, surely

    def tile_kind(self, head: int, q_lo: Tensor, k_lo: Tensor, block: int) -> Tensor | None:
        kinds = [rule.tile_kind(self._inner(rule, head), q_lo, k_lo, block) for rule in self.rules]
        return None if any(kind is None for kind in kinds) else torch.cat(kinds, -1)  # type: ignore[arg-type]

    def block_kinds(self, head: int, q_tokens: Tensor, k_tokens: Tensor) -> Tensor | None:
        kinds = [rule.block_kinds(self._inner(rule, head), q_tokens, k_tokens) for rule in self.rules]
        if any(kind is None for kind in kinds):
            return None
        stack = torch.stack(kinds, -1)  # type: ignore[arg-type]
        joint = torch.unique(stack.flatten(0, 1), dim=0, return_inverse=True)[1].reshape(stack.shape[:2]) + 2
        return joint.masked_fill((stack == 1).all(-1), 1).masked_fill((stack == 0).any(-1), 0)

    def required_len(self) -> int | None:
        lengths = {n for n in (rule.required_len() for rule in self.rules) if n is not None}
        return lengths.pop() if len(lengths) == 1 else None


def _meet(a: Ranges, b: Ranges) -> Ranges:
    """Pairwise intersections of two unions of ranges."""
    return [(torch.maximum(x[0], y[0]), torch.minimum(x[1], y[1])) for x in a for y in b]


def intersect(rules: list[Rule]) -> Rule | None:
    """The conjunction of `rules`; None for no rule at all (everything is read)."""
    if not rules:
        return None
    return rules[0] if len(rules) == 1 else AllOf(tuple(rules))
