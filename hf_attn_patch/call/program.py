"""`Program`: one attention call as data, and the kinds of edit a method may apply to it.

A method (`patches/`) edits a program; an executor (`kernels/`) runs it. Neither knows the other.

Semantics, in order, for query head h, query row i, key j (reference: `kernels/reference.py`)::

    s_ij = scale * query_scale_i * (q_i . k_j)          softcap: s = cap * tanh(s / cap);  + position_bias
    s    = each score edit in turn, on its heads / rows / key classes
    p    = softmax over the keys that mask and every rule allow      (all masked: p = 0)
    p    = each mass edit in turn: p_ij *= w[class of j](class masses of row i)
    o_i  = sum_j p_ij v_j;  blend: o = (1 - u) o + u * t;  o += addition;  gate: o *= head_gate;  o *= each output gate
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import ModelMismatchError
from .mask import Mask
from .rules import OnHeads, Rule, intersect

if TYPE_CHECKING:
    from .ragged import RaggedKV

Heads = tuple[int, ...] | None  # query heads an edit applies to; None = all


@dataclass
class ScoreEdit:
    """Change of pre-softmax scores on chosen heads, rows and key classes.

    kind: ``add`` s + a | ``abs`` s + a |s| | ``multiply`` s * a | ``mean_abs`` s + a * mean over query heads of |s|.
    amount: a, a float or a tensor broadcastable to [B, H, L, 1].
    key_class: class of keys it applies to (see `Program.key_class`); None = every key.
    rows: bool [B|1, L], or None = every row.
    """

    kind: Literal["add", "abs", "multiply", "mean_abs"]
    amount: float | Tensor
    key_class: int | None = None
    rows: Tensor | None = None
    heads: Heads = None


@dataclass(frozen=True)
class MassTransfer:
    """Weights of a `MassEdit` as data, which a kernel can apply while it still holds the masses.

    In rows that qualify, class c keeps ``1 - take[c]`` of its mass, and what is taken goes to class `give` in
    proportion; rows keep their sum. A row qualifies when the classes `within` hold at least `min_mass`, the classes
    `limited` at most `max_share` of that (their mass over ``within mass + count_eps * number of within keys``), and
    class `give` holds anything at all.

    take: fraction per class, length C. give, within, limited: class numbers.
    """

    take: tuple[float, ...]
    give: int
    within: tuple[int, ...] = ()
    limited: tuple[int, ...] = ()
    min_mass: float = 0.0
    max_share: float = 1.0
    count_eps: float = 0.0

    def __call__(self, masses: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
        """Factors [B, H, L, C] from masses and counts of that shape (counts may broadcast over H)."""
        within = masses[..., list(self.within)].sum(-1)
        number = counts[..., list(self.within)].sum(-1)
        share = masses[..., list(self.limited)].sum(-1) / (within + self.count_eps * number).clamp(min=1e-30)
        gets = masses[..., self.give]
        chosen = (share <= self.max_share) & (within >= self.min_mass) & (gets > 0)
        take = masses.new_tensor(self.take)
        moved = (masses * take).sum(-1)
        factors = (1 - take).expand(masses.shape).clone()
        factors[..., self.give] += moved / torch.where(gets > 0, gets, torch.ones_like(gets))
        return torch.where(chosen[..., None], factors, torch.ones_like(factors))


@dataclass
class MassEdit:
    """Change of probabilities after softmax that is constant within a key class.

    weights: called with (masses [B, H, L, C], counts [B, 1, L, C], columns int64 [L]) where `masses` is the
        probability of each class, `counts` the number of visible keys of each class and `columns` the column of
        each query row; returns factors [B, H, L, C] by which the probabilities of a class are multiplied.
    classes: C; every key's class is one of 0 … C - 1.
    rows: bool [B|1, L]; rows that are False keep their probabilities. None = every row.
    """

    weights: Callable[[Tensor, Tensor, Tensor], Tensor]
    classes: int
    rows: Tensor | None = None
    heads: Heads = None


@dataclass
class Blend:
    """``o = (1 - u) o + u t``: mix the head output with t = the query's own ``value``, the ``mean_value`` of the keys
    it may see, or what the head gives when it reads only the keys of a `Rule` (on top of the program's rules).
    `amount` u: float or tensor broadcastable to [B, H, L, 1]; gradients reach it."""

    target: Literal["value", "mean_value"] | Rule
    amount: float | Tensor
    heads: Heads = None


@dataclass
class Program:
    """One attention call.

    Attributes:
        query: [B, H, L, D]. key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv] (Hkv divides H, never repeated), or a
            `RaggedKV` for both when a cache keeps a different span per KV head.
        mask: who may see whom. rules: what will be read (layout), intersected.
        scale: softmax scale. query_scale: broadcastable to [B, H, L, 1]. softcap: tanh cap of scores.
        position_bias: additive score bias the model brought along, broadcastable to [B, H, L, S].
        sink_logits: [H], one extra logit per head that takes part in the softmax and has no value (gpt-oss).
        key_class: int8 [B, S_columns], class of the key at each *column*; 0 = no class.
        head_gate: broadcastable to [B, L, H], multiplies the head's output.
        output_gates: gates that are known only once the output is: called with (program, output [B, H, L, Dv]), they
            return factors broadcastable to [B, L, H]. Whoever runs the executor applies them, in turn.
        addition: [B, H, L, Dv], added to the output of the heads before the gates (a convolution of the values).
            Whoever runs the executor adds it.
        gate_is_sparse: many gates are exactly 0, so an executor may skip those (head, token) pairs (a hint).
        allow_int8: scores may be computed from INT8 queries and keys where an executor can (a permission; error
            bound: `kernels/triton/int8.py`); off by default.
        share: of the blocks that could be read, how many a dynamic rule chose (0-d tensor, for reports).
        operator: what replaces softmax attention; only "softmax" so far.
        mixture: the last E keys are no tokens (`append`), and this is what they are made of: [B|1, H|1, E, tokens].
        observers: called with (program, output [B, H, L, Dv]) when the call is done (calibration, statistics).
    """

    query: Tensor
    key: Tensor | RaggedKV
    value: Tensor | RaggedKV
    mask: Mask
    scale: float
    rules: list[Rule] = field(default_factory=list)
    query_scale: Tensor | None = None
    softcap: float | None = None
    position_bias: Tensor | None = None
    sink_logits: Tensor | None = None
    key_class: Tensor | None = None
    score_edits: list[ScoreEdit] = field(default_factory=list)
    mass_edits: list[MassEdit] = field(default_factory=list)
    blends: list[Blend] = field(default_factory=list)
    head_gate: Tensor | None = None
    output_gates: list[Callable[[Program, Tensor], Tensor]] = field(default_factory=list)
    addition: Tensor | None = None
    gate_is_sparse: bool = False
    allow_int8: bool = False
    share: Tensor | None = None
    operator: str = "softmax"
    dropout: float = 0.0
    need_weights: bool = False
    mixture: Tensor | None = None
    observers: list[Callable[[Program, Tensor], None]] = field(default_factory=list)

    # -- shapes ---------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def ragged(self) -> bool:
        """True if K/V come from a cache with per-KV-head spans."""
        return not isinstance(self.key, Tensor)

    @property
    def rule(self) -> Rule | None:
        """All rules as one, or None when every visible key is read."""
        return intersect(self.rules)

    @property
    def edits_scores(self) -> bool:
        """True if plain softmax(q k^T) v with a mask does not describe the program (gates aside)."""
        return bool(
            self.score_edits or self.mass_edits or self.softcap is not None or self.sink_logits is not None
        )

    def state(self) -> tuple[Any, ...]:
        """All fields, lists by their lengths: two states of one program are `same_state` if no method changed it."""
        return tuple([getattr(self, n) for n in _VALUES] + [len(getattr(self, n)) for n in _LISTS])

    # -- what methods call ------------------------------------------------------------------------------------

    def restrict(self, rule: Rule, heads: Heads = None) -> None:
        """Read only the keys of `rule` (on the listed query heads; the others read everything they may)."""
        self.rules.append(rule if heads is None else OnHeads(rule, tuple(heads), self.num_heads))

    def gate(self, gate: Tensor, heads: Heads = None, sparse: bool = False) -> None:
        """Multiply head outputs by `gate`, broadcastable to [B, L, H] (with `heads`: to [B, L, len(heads)]).

        sparse: many gates are exactly 0 (a router that picks heads per token), and computing those is a waste.
        """
        self.gate_is_sparse |= sparse
        if heads is not None:
            full = torch.ones((*gate.shape[:-1], self.num_heads), dtype=gate.dtype, device=gate.device)
            full[..., list(heads)] = gate.expand(*gate.shape[:-1], len(heads))
            gate = full
        self.head_gate = gate if self.head_gate is None else self.head_gate * gate

    def add(self, term: Tensor, heads: Heads = None) -> None:
        """Add `term` [B, H, L, Dv] to the head outputs, before the gates (on the listed query heads)."""
        chosen = head_selector(heads, self.num_heads, term.device)
        term = term if chosen is None else torch.where(chosen, term, torch.zeros_like(term))
        self.addition = term if self.addition is None else self.addition + term

    def gate_by_output(self, gate: Callable[[Program, Tensor], Tensor]) -> None:
        """Multiply head outputs by what `gate` makes of them: (program, output [B, H, L, Dv]) -> [B|1, L|1, H]."""
        self.output_gates.append(gate)

    def reading(self, rule: Rule) -> Program:
        """This call on the keys of `rule` only, before blends and gate: the target of a `Blend` with a rule."""
        rules = [*self.rules, rule]
        return replace(
            self, rules=rules, blends=[], addition=None, head_gate=None, output_gates=[], gate_is_sparse=False,
            observers=[],
        )  # fmt: skip

    def append(self, key: Tensor, value: Tensor, mixture: Tensor | None = None) -> None:
        """Put E more keys behind the S tokens of a bidirectional call. Every row sees them; a rule says who reads them.

        Args:
            key, value: [B, Hkv, E, D|Dv]. mixture: [B|1, H|1, E, S], the weights of the tokens in each of them, so that
            attention probabilities can be told in terms of tokens; needed only with `need_weights`.

        Raises:
            ModelMismatchError: mask, bias or key classes were made for the tokens alone.
        """
        mask = self.mask
        if (
            self.ragged
            or self.key_class is not None
            or self.position_bias is not None
            or self.mixture is not None
        ):
            reason = "its position bias, key classes or cache were made for its tokens"
        elif mask.restricts or mask.kv_offset:
            reason = f"its mask {mask} says who sees which token"
        else:
            self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)  # type: ignore[list-item]
            self.mask = Mask(
                mask.batch, mask.q_len, self.key.shape[2], q_offset=mask.q_offset, device=mask.device
            )
            self.mixture = mixture
            return
        raise ModelMismatchError(f"no keys can be added to this attention call: {reason}")

    def of_tokens(self, weights: Tensor) -> Tensor:
        """Probabilities [B, H, L, S + E] with those of appended keys given to their tokens: [B, H, L, S]."""
        if self.mixture is None:
            return weights
        extra, tokens = self.mixture.shape[-2:]
        return weights[..., :tokens] + weights[..., tokens : tokens + extra] @ self.mixture.to(weights.dtype)

    def observe(self, observer: Callable[[Program, Tensor], None]) -> None:
        """Call `observer` with this program, all edits in it, and the output [B, H, L, Dv] of the executor."""
        self.observers.append(observer)

    def classify(self, key_class: Tensor) -> None:
        """Set key classes, int8 [B, S_columns]. One patch may do so per program.

        Raises:
            RuntimeError: another patch set different classes already.
        """
        if self.key_class is not None:
            raise RuntimeError(
                "two patches classify the keys of one attention call; mass and score edits of both would mix"
            )
        self.key_class = key_class

    def __repr__(self) -> str:
        q, k = tuple(self.query.shape), tuple(self.key.shape)
        parts = [f"q{list(q)} k{list(k)} {str(self.query.dtype).removeprefix('torch.')}", repr(self.mask)]
        parts += [f"read {rule}" for rule in self.rules]
        for name, edits in (("score", self.score_edits), ("mass", self.mass_edits), ("blend", self.blends)):
            parts += [f"{name} edit x{len(edits)}"] if edits else []
        parts += ["head gate"] if self.head_gate is not None else []
        parts += [f"output gate x{len(self.output_gates)}"] if self.output_gates else []
        return f"Program({', '.join(parts)})"


_LISTS = ("rules", "score_edits", "mass_edits", "blends", "output_gates", "observers")
_VALUES = tuple(f.name for f in fields(Program) if f.name not in _LISTS)  # torch.compile traces no attrgetter


def same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """True if two results of `Program.state` are the same objects (numbers: equal)."""
    return all([a is b or (isinstance(a, (int, float)) and a == b) for a, b in zip(before, after)])


def head_selector(heads: Sequence[int] | None, num_heads: int, device: torch.device) -> Tensor | None:
    """bool [1, H, 1, 1], True on `heads`; None when all heads are meant."""
    if heads is None:
        return None
    selector = torch.zeros(num_heads, dtype=torch.bool, device=device)
    selector[list(heads)] = True
    return selector.reshape(1, -1, 1, 1)
