"""Which rule (alpha, beta) for which KV head: the search of MoA as integer programs, solved by HiGHS.

Source: MoA, arXiv 2406.14909 (thu-nics/MoA e224fe3, READ and RAN), whose solver is Gurobi. A rule reads one sink
block and, of query block m, the key blocks ``m - n < n_local``, where
``n_local = max(int(floor(alpha / block) + beta nb), 1)``. Its cost at a length is ``min(n_local + 1, nb) / nb``, its
loss there the influence of the blocks it does not read. Heads get one rule each, at most two rules per layer, and the
mean cost stays within [lower, 1] of a bound at every length.
The losses at the lengths are objectives of their own: each is minimised alone for its range, then every one with the
others held inside each cell of a grid over their ranges; what no other plan beats is the Pareto set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .calibrator import CalibrationError


@dataclass(frozen=True)
class RuleSet:
    """Candidate rules. alphas, betas: float [R]. local: int [R, lengths]: blocks of the window, the diagonal included.
    density: float [R, lengths]."""

    alphas: np.ndarray
    betas: np.ndarray
    lengths: tuple[int, ...]
    block: int
    local: np.ndarray
    density: np.ndarray

    def __len__(self) -> int:
        return len(self.alphas)

    def __str__(self) -> str:
        low, high = self.density.min(0), self.density.max(0)
        spans = ", ".join(f"{n}: {a:.2f}-{b:.2f}" for n, a, b in zip(self.lengths, low, high))
        return f"{len(self)} rules, density by length {spans}"

    def take(self, index: Sequence[int]) -> RuleSet:
        """The rules at `index`."""
        i = list(index)
        return RuleSet(
            self.alphas[i], self.betas[i], self.lengths, self.block, self.local[i], self.density[i]
        )


def local_blocks(alphas: np.ndarray, betas: np.ndarray, length: int, block: int) -> np.ndarray:
    """Window in blocks of each rule at `length`: int [R]."""
    blocks = -(-length // block)
    return np.maximum(np.trunc(np.floor(alphas / block) + betas * blocks).astype(int), 1)


def search_space(
    alphas: Sequence[float],
    betas: Sequence[float],
    *,
    shortest: int,
    longest: int,
    extend: int,
    lengths: Sequence[int],
    block: int = 64,
) -> RuleSet:
    """Rules of the grid alphas x betas that fit: not longer than the text at `longest` (the longest profile) and at
    `extend`, and positive at `shortest`; sorted by their span at `extend`.

    Raises:
        CalibrationError: no rule is left.
    """
    pairs = [
        (a, b)
        for a in alphas
        for b in betas
        if a + b * longest <= longest and a + b * extend <= extend and a + b * shortest > 0
    ]
    if not pairs:
        raise CalibrationError(
            f"moa: no rule of {len(alphas)} alphas x {len(betas)} betas fits lengths {shortest} to {extend}"
        )
    pairs.sort(key=lambda rule: rule[0] + rule[1] * extend)
    a, b = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)
    local = np.stack([local_blocks(a, b, n, block) for n in lengths], -1)
    blocks = np.array([-(-n // block) for n in lengths])
    return RuleSet(a, b, tuple(lengths), block, local, np.minimum(local + 1, blocks) / blocks)


def distinct(rules: RuleSet) -> RuleSet:
    """Without rules that read the same at all lengths as one before them."""
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(np.minimum(rules.local, [-(-n // rules.block) for n in rules.lengths])):
        seen.setdefault(tuple(row), i)
    return rules.take(list(seen.values()))


def losses(influence: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Influence that rules lose: float [heads, R].

    influence: [heads, nb, nb], sums of |E| per causal block. local: int [R], see `local_blocks`.
    """
    blocks = influence.shape[-1]
    distance = np.arange(blocks)[:, None] - np.arange(blocks)[None]
    far = np.zeros((len(influence), blocks + 1))  # by distance in blocks, the sink block left out
    for d in range(blocks):
        chosen = distance == d
        chosen[:, 0] = False
        far[:, d] = influence[:, chosen].sum(-1)
    beyond = np.cumsum(far[:, ::-1], -1)[:, ::-1]  # influence at distance >= d
    return beyond[:, np.minimum(local, blocks)]


@dataclass(frozen=True)
class Plan:
    """One solution. rules: int [layers, heads], indices into the rule set. objectives: loss per profile length."""

    rules: np.ndarray
    objectives: tuple[float, ...]

    def __str__(self) -> str:
        return f"plan of {self.rules.size} heads, losses {', '.join(f'{o:.4g}' for o in self.objectives)}"


class Search:
    """Choose one rule per head.

    Args:
        loss: [objectives, layers, heads, R]. cost: [constraints, R] or [constraints, layers, heads, R].
        upper, lower: bounds of the mean cost per constraint. per_layer: most different rules in a layer.
        gap: relative optimality gap of a solve. seconds: limit of one solve.
    """

    def __init__(
        self,
        loss: np.ndarray,
        cost: np.ndarray,
        upper: Sequence[float],
        lower: Sequence[float],
        per_layer: int = 2,
        gap: float = 1e-4,
        seconds: float = 20.0,
    ):
        from scipy import sparse

        self.loss = np.asarray(loss, float)
        self.objectives, self.layers, self.heads, self.rules = self.loss.shape
        cost = np.asarray(cost, float)
        if cost.ndim == 2:
            cost = np.broadcast_to(cost[:, None, None], (len(cost), self.layers, self.heads, self.rules))
        self.cost, self.upper, self.lower = cost, np.asarray(upper, float), np.asarray(lower, float)
        self.options = {"mip_rel_gap": gap, "time_limit": seconds}
        self.scale = np.array([max(float(part.max()), 1e-30) for part in self.loss])
        heads, choices = self.layers * self.heads, self.layers * self.heads * self.rules
        used = self.layers * self.rules  # u[l, r] = 1 if a head of layer l has rule r
        x = np.arange(choices)
        one = sparse.csr_matrix((np.ones(choices), (x // self.rules, x)), (heads, choices + used))
        layer, rule = x // (self.heads * self.rules), x % self.rules
        link = sparse.csr_matrix((np.ones(choices), (x, x)), (choices, choices + used)) - sparse.csr_matrix(
            (np.ones(choices), (x, choices + layer * self.rules + rule)), (choices, choices + used)
        )
        y = np.arange(used)
        few = sparse.csr_matrix(
            (np.ones(used), (y // self.rules, choices + y)), (self.layers, choices + used)
        )
        dense = np.zeros((len(self.cost), choices + used))
        dense[:, :choices] = self.cost.reshape(len(self.cost), -1) / heads
        self.matrix = [one, link, few, sparse.csr_matrix(dense)]
        self.low = [
            np.ones(heads),
            np.full(choices, -np.inf),
            np.full(self.layers, -np.inf),
            self.lower - 1e-9,
        ]
        self.high = [
            np.ones(heads),
            np.zeros(choices),
            np.full(self.layers, float(min(per_layer, self.rules))),
            self.upper + 1e-9,
        ]
        self.columns, self.choices = choices + used, choices

    def solve(self, primary: int, box: dict[int, tuple[float, float]] | None = None) -> Plan | None:
        """Smallest loss `primary` with the losses in `box` inside [low, high]; None if there is no plan (in time)."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        objective = np.zeros(self.columns)
        objective[: self.choices] = self.loss[primary].ravel() / self.scale[primary]
        constraints = [LinearConstraint(m, a, b) for m, a, b in zip(self.matrix, self.low, self.high)]
        for other, (low, high) in (box or {}).items():
            row = np.zeros((1, self.columns))
            row[0, : self.choices] = self.loss[other].ravel() / self.scale[other]
            slack = 1e-9 * max(abs(high), 1.0)
            constraints.append(
                LinearConstraint(row, (low - slack) / self.scale[other], (high + slack) / self.scale[other])
            )
        kinds = np.ones(self.columns)
        kinds[self.choices :] = 0  # u follows from x, and is 0 or 1 then
        found = milp(
            objective, integrality=kinds, bounds=Bounds(0, 1), constraints=constraints, options=self.options
        )
        if found.x is None:
            return None
        x = found.x[: self.choices].reshape(self.layers, self.heads, self.rules)
        return self.plan(x.argmax(-1))

    def plan(self, rules: np.ndarray) -> Plan:
        """A plan with its losses."""
        chosen = np.take_along_axis(
            self.loss, np.broadcast_to(rules[None, ..., None], (self.objectives, *rules.shape, 1)), -1
        )
        return Plan(rules, tuple(float(v) for v in chosen.sum((1, 2, 3))))

    def densities(self, plan: Plan) -> np.ndarray:
        """Mean cost per constraint."""
        index = np.broadcast_to(plan.rules[None, ..., None], (len(self.cost), *plan.rules.shape, 1))
        return np.take_along_axis(self.cost, index, -1).mean((1, 2, 3))

    def pareto(
        self, intervals: int = 4, tick: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Plan]:
        """Plans that no other found plan beats, sorted by their losses.

        Raises:
            CalibrationError: no rule set meets the bounds; the nearest density that can be met is named.
        """
        cells = list(itertools.product(range(intervals), repeat=self.objectives - 1))
        total = self.objectives * (1 + (len(cells) if self.objectives > 1 else 0))
        alone: list[Plan] = []
        for objective in range(self.objectives):
            plan = self.solve(objective)
            if plan is None:
                raise CalibrationError(self._why_infeasible())
            alone.append(plan)
            tick(len(alone), total)
        found, done = list(alone), len(alone)
        ranges = [
            (min(p.objectives[o] for p in alone), max(p.objectives[o] for p in alone))
            for o in range(self.objectives)
        ]
        if self.objectives > 1:
            for primary, cell in itertools.product(range(self.objectives), cells):
                box = {}
                for other, i in zip([o for o in range(self.objectives) if o != primary], cell):
                    low, high = ranges[other]
                    step = (high - low) / intervals
                    box[other] = (low + i * step, low + (i + 1) * step)
                plan = self.solve(primary, box)
                if plan is not None:
                    found.append(plan)
                done += 1
                tick(done, total)
        return undominated(found)

    def _why_infeasible(self) -> str:
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows = []
        for i, (low, high) in enumerate(zip(self.lower, self.upper)):
            reach = []
            for sign in (1.0, -1.0):
                objective = np.zeros(self.columns)
                objective[: self.choices] = sign * self.cost[i].ravel()
                best = milp(
                    objective,
                    integrality=np.zeros(self.columns),
                    bounds=Bounds(0, 1),
                    constraints=[
                        LinearConstraint(m, a, b)
                        for m, a, b in list(zip(self.matrix, self.low, self.high))[:3]
                    ],
                )
                reach.append(sign * best.fun / (self.layers * self.heads))
            rows.append(
                f"bound {i}: asked {low:.3f} to {high:.3f}, the rules reach {reach[0]:.3f} to {reach[1]:.3f}"
            )
        return (
            "no choice of rules meets the density bounds at all lengths together ("
            + "; ".join(rows)
            + "). Take a bound "
            "inside these ranges, a smaller lower_ratio, or more alphas and betas"
        )


def undominated(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that no other one beats in one loss without being worse in another; equal losses count once."""
    kept: dict[tuple[float, ...], Plan] = {}
    for plan in plans:
        if any(
            all(o <= p for o, p in zip(other.objectives, plan.objectives))
            and other.objectives != plan.objectives
            for other in plans
        ):
            continue
        kept.setdefault(tuple(round(o, 12) for o in plan.objectives), plan)
    return [kept[key] for key in sorted(kept)]


def grid(shortest: int, longest: int) -> tuple[list[float], list[float]]:
    """The default grid: alphas from ``-shortest`` to ``longest`` in steps of half the shortest length, betas in
    eighths (the published grid, -2048 … 8192 by 1024 for 2048 … 8192, scaled to the lengths)."""
    step = max(shortest // 2, 1)
    count = math.floor((longest + shortest) / step) + 1
    return [float(-shortest + i * step) for i in range(count)], [i / 8 for i in range(9)]
