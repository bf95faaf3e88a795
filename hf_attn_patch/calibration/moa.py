"""`moa` calibration: gradient influence at several lengths, integer programs, validation at an unseen length."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ModelMismatchError
from ..model import head_sets
from ..model.sites import base_model, find_sites
from . import plan_search
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work, model_name
from .data import Sample, check_lengths, samples


@dataclass
class MoaCalibrator(Calibrator):
    """A plan for the `moa` patch: one rule ``span(N) = alpha + beta N`` per KV head.

    Source: MoA, arXiv 2406.14909 (thu-nics/MoA e224fe3, READ and RAN). Steps: (1) influence of every attention entry
    on the loss of the answers, summed in blocks (`influence`), per length; (2) the loss of each candidate rule on
    each head, and plans within the density bound at all lengths, `extend` included (`plan_search`); (3) the plan of the
    Pareto set with the smallest loss of the patched model on fresh samples of an unseen length.

    Differs from the original code: rules are chosen per KV head (influence summed over its query heads) because a KV
    head is evicted once for its group; plans are written with the sink block inside alpha, so that the runtime reads
    what the search counted; HiGHS instead of Gurobi; only the rows of the answer count (``rows="all"`` is the
    original; see `influence.profile` for why); the influence of each sample is scaled to sum 1 before samples are
    averaged, because a one-word answer has gradients many times those of a page of prose (`balance`); two intervals
    per objective instead of four (`intervals`: 15 programs instead of 51).

    Options:
        density: mean span of a KV head / length, at every length. lower_ratio: at least this share of it is spent.
        lengths, samples: tokens and number of texts per profile. extend: longest length the bound holds for (None =
            twice the longest profile). validate_length, validate_samples, validate_plans: the unseen length (None =
            between the two longest), texts there, and plans of the Pareto set that are tried on them.
        per_layer: most different rules in a layer. alphas, betas: grid of rules (None = the published one, scaled).
            block: tokens per block. answers: ``model`` answers prompts without one itself, ``given`` takes the data's.
        measured: a head set of ``head_scores:objective=window_loss,kind=kv`` (path or JSON). The influence of each KV
            head is then scaled so that what it predicts for a window of 256 is the loss that was measured with that
            window in that head alone; the shape over distance stays. Ours: first-order influence ranks the heads of
            SmolLM2-135M too evenly, one of ninety carries most of the retrieval.
        solve_seconds: limit of one integer program. seed: of texts.
    """

    name = "moa"
    summary = "spans per KV head by gradient influence and integer programming"
    patch = "moa"
    shared = ("lengths", "samples", "validate_length", "validate_samples", "block", "answers", "rows", "seed")

    density: float = 0.5
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    samples: tuple[int, ...] = (6, 4, 2)
    extend: int | None = None
    validate_length: int | None = None
    validate_samples: int = 4
    validate_plans: int = 4
    lower_ratio: float = 0.9
    per_layer: int = 2
    intervals: int = 2
    alphas: tuple[float, ...] | None = None
    betas: tuple[float, ...] | None = None
    block: int = 64
    answers: Literal["model", "given"] = "model"
    rows: Literal["answer", "all"] = "answer"
    balance: bool = True
    measured: Any = None
    solve_seconds: float = 20.0
    seed: int = 0

    def validate(self) -> None:
        self.require(0.0 < self.density <= 1.0, "density", "in (0, 1]")
        self.require(
            len(self.lengths) > 0 and list(self.lengths) == sorted(set(self.lengths)),
            "lengths",
            "ascending lengths in tokens",
        )
        self.require(
            self.block >= 1 and min(self.lengths) >= 4 * self.block, "lengths", "at least four blocks each"
        )
        self.require(
            len(self.samples) == len(self.lengths) and min(self.samples) >= 1,
            "samples",
            f"one count >= 1 per length ({len(self.lengths)} of them)",
        )
        self.require(0.0 <= self.lower_ratio <= 1.0, "lower_ratio", "between 0 and 1")
        for name in ("per_layer", "intervals", "validate_samples", "validate_plans"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.solve_seconds > 0, "solve_seconds", "positive")

    # -- the steps ------------------------------------------------------------------------------------------------

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        from .pictures import draw_front, draw_plan

        layers, kv_heads = shape_of(model, self.name)
        measured = None if self.measured is None else self._measured(layers, kv_heads)
        if tokenizer is None:
            raise CalibrationError("moa: needs the tokenizer of the model (tokenizer=)")
        unseen = (
            self.validate_length or (self.lengths[-1] + self.lengths[-2]) // 2
            if len(self.lengths) > 1
            else (self.validate_length or self.lengths[-1] * 3 // 4)
        )
        notes = check_lengths(self.name, model, [*self.lengths, unseen])
        maps = []
        for level, (length, count) in enumerate(zip(self.lengths, self.samples)):
            step, done = f"influence at {length} tokens", 0
            progress(step, 0, count)
            chosen = work.json(
                f"samples-{length}", functools.partial(self._draw, data, model, tokenizer, level)
            )
            parts = []
            for i, sample in enumerate(map(restored, chosen)):
                made = work.tensors(
                    f"influence-{length}-{i}",
                    functools.partial(self._profile, model, sample),
                )
                parts.append(self._grouped(made["influence"].numpy().astype(np.float64), kv_heads))
                done += 1
                progress(step, done, len(chosen))
            maps.append(mean_of(parts, self.balance))

        if measured is not None:
            maps = scaled(maps, measured, self.block)
        rules = self.rules()
        search = self.search(maps, rules)
        front = self._front(search, work, progress)
        scores = self._validated(model, tokenizer, data, front, search, rules, unseen, work, progress)
        best = min(scores, key=lambda i: scores[i])
        plan = self.plan_json(front[best], rules, model)
        densities = dict(zip(map(str, rules.lengths), search.densities(front[best]).round(4).tolist()))
        lost = [loss / float(total.sum()) for loss, total in zip(front[best].objectives, maps)]
        report: dict[str, Any] = {
            "density": densities,
            "bound": self.density,
            "influence_lost": dict(zip(map(str, self.lengths), [round(v, 5) for v in lost])),
            "rules": f"{len(rules)} candidates, {len({tuple(r) for r in self._pairs(front[best], rules)})} used",
            "plans": len(front),
            "validated": {str(i): round(v, 5) for i, v in scores.items()},
            "validation_length": unseen,
            "dense_validation_loss": round(self._dense(model, tokenizer, data, unseen, work), 5),
            "notes": notes,
        }
        pictures = {}
        spans = search.cost[-2 if self.extend_length > self.lengths[-1] else -1, 0, 0][front[best].rules]
        for name, draw in (
            ("plan", lambda: draw_plan(spans, f"share of {self.lengths[-1]} tokens that a KV head keeps")),
            ("front", lambda: draw_front(front, best, self.lengths)),
        ):
            svg = draw()
            if svg is not None:
                pictures[name] = svg
        return Calibration(self.name, "moa", plan, {"plan": plan}, report, pictures)

    @property
    def extend_length(self) -> int:
        """The length that only the density bound looks at (default: twice the longest)."""
        return self.extend or 2 * self.lengths[-1]

    def rules(self) -> plan_search.RuleSet:
        """Candidate rules of this configuration."""
        alphas, betas = plan_search.grid(self.lengths[0], self.lengths[-1])
        return plan_search.distinct(
            plan_search.search_space(
                self.alphas or alphas,
                self.betas or betas,
                shortest=self.lengths[0],
                longest=self.lengths[-1],
                extend=self.extend_length,
                lengths=(*self.lengths, self.extend_length),
                block=self.block,
            )
        )

    def search(self, maps: Sequence[np.ndarray], rules: plan_search.RuleSet) -> plan_search.Search:
        """The integer program. maps: influence [layers, Hkv, nb, nb] per length."""
        loss = np.stack(
            [
                np.stack([plan_search.losses(layer, rules.local[:, i]) for layer in found])
                for i, found in enumerate(maps)
            ]
        )
        lengths = len(rules.lengths)
        return plan_search.Search(
            loss,
            rules.density.T,
            [self.density] * lengths,
            [self.density * self.lower_ratio] * lengths,
            self.per_layer,
            seconds=self.solve_seconds,
        )

    def plan_json(self, plan: plan_search.Plan, rules: plan_search.RuleSet, model: Any) -> dict[str, Any]:
        """The official format, one rule per KV head; the sink block is part of alpha, as the runtime counts it."""
        pairs = self._pairs(plan, rules).reshape(*plan.rules.shape, 2)
        name = model_name(base_model(model))
        return {
            "alphas": (pairs[..., 0] + self.block).tolist(),
            "betas": pairs[..., 1].tolist(),
            "model": name,
            "density": self.density,
            "shortest": self.lengths[0],
        }

    def _measured(self, layers: int, kv_heads: int) -> np.ndarray:
        """Measured loss of each KV head, [layers, Hkv].

        Raises:
            CalibrationError: not a full table of window losses of KV heads.
        """
        found = head_sets.read(head_sets.plain(self.measured, self.name), self.name)
        table = np.full((layers, kv_heads), np.nan)
        for head in found.heads:
            if head.kind == "kv" and head.score is not None and head.layer < layers and head.head < kv_heads:
                table[head.layer, head.head] = head.score
        if found.objectives != ("window_loss",) or np.isnan(table).any():
            raise CalibrationError(
                f"moa: measured needs the window loss of all {layers} x {kv_heads} KV heads, found "
                f"{int((~np.isnan(table)).sum())} of them, objective {', '.join(found.objectives) or 'none'}. "
                "Make it with 'hf-attn-patch calibrate head_scores:objective=window_loss,kind=kv'"
            )
        return table

    def _pairs(self, plan: plan_search.Plan, rules: plan_search.RuleSet) -> np.ndarray:
        index = plan.rules.ravel()
        return np.stack([rules.alphas[index], rules.betas[index]], -1)

    def _profile(self, model: Any, sample: Sample) -> dict[str, Any]:
        from . import influence

        return {"influence": influence.profile(model, [sample], self.block, self.rows == "answer")}

    def _draw(self, data: Any, model: Any, tokenizer: Any, level: int) -> list[dict[str, Any]]:
        chosen = samples(
            data,
            model,
            tokenizer,
            self.lengths[level],
            self.samples[level],
            answers=self.answers,
            seed=self.seed + level,
        )
        return plain(chosen)

    def _grouped(self, found: np.ndarray, kv_heads: int) -> np.ndarray:
        """[layers, H, nb, nb] -> [layers, Hkv, nb, nb], summed over the query heads of a group."""
        layers, heads, blocks, _ = found.shape
        return found.reshape(layers, kv_heads, heads // kv_heads, blocks, blocks).sum(2)

    def _piece(self, name: str) -> str:
        """Name of a piece of work that depends on all options (influence and samples do not)."""
        return f"{name}-{hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:12]}"

    def _front(self, search: plan_search.Search, work: Work, progress: Progress) -> list[plan_search.Plan]:
        found = work.json(
            self._piece("front"),
            lambda: [
                p.rules.tolist()
                for p in search.pareto(self.intervals, lambda done, total: progress("plans", done, total))
            ],
        )
        return [search.plan(np.array(rules)) for rules in found]

    def _validated(
        self,
        model: Any,
        tokenizer: Any,
        data: Any,
        front: list[plan_search.Plan],
        search: plan_search.Search,
        rules: plan_search.RuleSet,
        length: int,
        work: Work,
        progress: Progress,
    ) -> dict[int, float]:
        """Loss of the patched model for some plans of the front, evenly spread: index -> loss."""
        count = min(self.validate_plans, len(front))
        picks = sorted({round(i * (len(front) - 1) / max(count - 1, 1)) for i in range(count)})
        scores = {}
        for done, pick in enumerate(picks):
            progress("validation", done, len(picks))
            plan = self.plan_json(front[pick], rules, model)
            scores[pick] = work.json(
                self._piece(f"validation-{pick}"),
                functools.partial(self._loss, model, tokenizer, data, length, plan),
            )
        progress("validation", len(picks), len(picks))
        return scores

    def _dense(self, model: Any, tokenizer: Any, data: Any, length: int, work: Work) -> float:
        return work.json("validation-dense", lambda: self._loss(model, tokenizer, data, length, None))

    def _loss(self, model: Any, tokenizer: Any, data: Any, length: int, plan: dict[str, Any] | None) -> float:
        """Mean over kinds of samples of the mean answer loss, with the plan or dense."""
        import torch

        from ..api import patched
        from .influence import answer_loss

        chosen = samples(
            data, model, tokenizer, length, self.validate_samples, answers=self.answers, seed=self.seed + 7919
        )
        kinds: dict[str, list[float]] = {}
        for sample in chosen:
            with torch.inference_mode():
                if plan is None:
                    loss = float(answer_loss(model, sample))
                else:
                    with patched(model, "moa", plan=plan, length=len(sample)):
                        loss = float(answer_loss(model, sample))
            kinds.setdefault(sample.kind, []).append(loss)
        return float(np.mean([np.mean(values) for values in kinds.values()]))


def shape_of(model: Any, who: str) -> tuple[int, int]:
    """(layers, KV heads) of the causal text part.

    Raises:
        ModelMismatchError: no such part, or KV heads that differ between layers or are unknown.
    """
    sites = [s for s in find_sites(base_model(model)) if s.causal and s.parts & {"text", "decoder"}]
    counts = {s.num_kv_heads for s in sites}
    if not sites or len(counts) != 1 or None in counts:
        raise ModelMismatchError(
            f"{who}: needs causal text layers with one number of KV heads, {type(base_model(model)).__name__} has "
            f"{len(sites)} such layers with {sorted(map(str, counts)) or 'none'} KV heads"
        )
    layers = {s.layer for s in sites}
    if layers != set(range(len(layers))):
        raise ModelMismatchError(f"{who}: layers {sorted(layers)} can be patched, a plan needs all of them")
    return len(layers), int(next(iter(counts)))  # type: ignore[arg-type]


def mean_of(parts: Sequence[np.ndarray], balance: bool) -> np.ndarray:
    """Mean of influence maps [layers, heads, nb, nb] of unequal nb (smaller ones fill their corner)."""
    blocks = max(p.shape[-1] for p in parts)
    total = np.zeros((*parts[0].shape[:2], blocks, blocks))
    for part in parts:
        n = part.shape[-1]
        total[..., :n, :n] += part / (part.sum() if balance else 1.0) / len(parts)
    return total


def scaled(
    maps: Sequence[np.ndarray], measured: np.ndarray, block: int, window: int = 256
) -> list[np.ndarray]:
    """Influence maps [layers, Hkv, nb, nb] scaled so that, at the shortest length, the influence each head loses with
    a window of `window` keys is its `measured` loss [layers, Hkv].

    Losses below the noise (the mean size of those that came out negative) count as the noise, so that the influence
    still orders the heads in which nothing was measured.
    """
    below = measured[measured < 0]
    noise = float(-below.mean()) if below.size else float(np.abs(measured).min())
    local = np.array([max(window // block - 1, 1)])
    predicted = np.stack([plan_search.losses(layer, local)[:, 0] for layer in maps[0]])
    weight = np.maximum(measured, noise) / np.maximum(predicted, predicted[predicted > 0].min())
    return [m * weight[..., None, None] for m in maps]


def plain(chosen: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples as JSON data."""
    return [
        {"ids": s.ids.tolist(), "start": s.start, "kind": s.kind, "columns": list(s.columns)} for s in chosen
    ]


def restored(row: dict[str, Any]) -> Sample:
    """A sample from JSON data."""
    import torch

    return Sample(torch.tensor(row["ids"]), row["start"], row["kind"], tuple(row["columns"]))
