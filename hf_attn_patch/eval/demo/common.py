"""Shared by both halves of the demo: how much to measure, columns, rows, and taking turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import api
from .. import measurements
from ..harness import DENSE, describe_model
from ..result import Result

Step = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
Choice = tuple[str, dict[str, Any]]  # method, options


@dataclass(frozen=True)
class Size:
    """How much is measured. `quick` is for a look, not for numbers."""

    perplexity_tokens: int = 2048
    passkey_lengths: tuple[int, ...] = (600, 1200, 2300, 4500)
    passkey_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    prefill_tokens: int = 4096
    rounds: int = 2
    agreement_images: int = 32
    knn_train: int = 160
    knn_test: int = 80
    speed_images: int = 16
    large_images: int = 4

    @classmethod
    def quick(cls) -> Size:
        return cls(1024, (600, 1200), (0.5,), 2048, 1, 8, 60, 30, 8, 0)

    def fitting_tokens(self, per_second: float, variants: int, seconds: float = 200.0) -> Size:
        """The largest plan for a language model of this dense prefill speed that takes about `seconds` or less."""
        smaller = [self]
        if len(self.passkey_depths) > 2:
            smaller.append(replace(self, passkey_depths=(self.passkey_depths[0], self.passkey_depths[-1])))
        smaller.append(replace(smaller[-1], rounds=1))
        if len(self.passkey_depths) > 1:
            smaller.append(
                replace(smaller[-1], passkey_depths=(self.passkey_depths[len(self.passkey_depths) // 2],))
            )
        return next((s for s in smaller if variants * s.tokens / per_second <= seconds), smaller[-1])

    def fitting_images(self, per_second: float, variants: int, seconds: float = 70.0) -> Size:
        """The largest plan for a vision model of this dense speed (small images) that takes about `seconds` or less."""
        smaller = [self]
        for train, test in ((120, 60), (80, 40)):
            if train < self.knn_train:
                smaller.append(replace(smaller[-1], knn_train=train, knn_test=test))
        smaller.append(replace(smaller[-1], large_images=min(2, self.large_images)))
        smaller.append(replace(smaller[-1], large_images=0))
        return next((s for s in smaller if variants * s.images / per_second <= seconds), smaller[-1])

    @property
    def tokens(self) -> int:
        """Tokens per variant."""
        return (
            self.perplexity_tokens
            + len(self.passkey_depths) * sum(self.passkey_lengths)
            + self.rounds * self.prefill_tokens
        )

    @property
    def images(self) -> int:
        """Images per variant, a large one counted as eight small ones."""
        passes = 2 + self.rounds  # agreement and its reference, and the rounds of the clock
        small = (
            2 * self.agreement_images + self.knn_train + self.knn_test + (1 + self.rounds) * self.speed_images
        )
        return small + 8 * passes * self.large_images


def column(key: str, label: str, unit: str, better: str, digits: int, what: str) -> dict[str, Any]:
    """One column of a table. better: ``higher``, ``lower`` or ``none``."""
    return {"key": key, "label": label, "unit": unit, "better": better, "digits": digits, "what": what}


def row(
    label: str, choice: Choice | None, values: dict[str, float], seen: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One row: the model in one state. seen: what `pictures` found, None for dense."""
    return {
        "label": label,
        "call": call_text(choice),
        "method": choice[0] if choice else None,
        "options": choice[1] if choice else {},
        "executor": seen["executor"] if seen else "transformers",
        "reason": seen["reason"] if seen else "",
        "values": {**values, "density": seen["density"] if seen else 1.0},
    }


def part(
    model: Any,
    title: str,
    columns: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    results: list[Result],
    timings: dict[str, Any],
    seen: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """One table with all that belongs to it. The first row is dense; ratios are only ever taken within one run."""
    dense = rows[0]["values"]
    for r in rows:
        r["ratios"] = {k: v / dense[k] if dense.get(k) else None for k, v in r["values"].items()}
    evals = [result.to_dict() for result in results]
    return {
        "title": title,
        "model": describe_model(model),
        "columns": columns,
        "rows": rows,
        "evals": evals,
        "intervals": intervals(evals),
        "timings": timings,
        "pictures": dict(seen),
        "drawn": [],
        "notes": [],
    }


INTERVALS = {
    ("perplexity", "perplexity"): "perplexity",
    ("passkey", "accuracy"): "passkey",
    ("agreement", "cls_cosine"): "cls_cosine",
    ("agreement", "patch_cosine"): "patch_cosine",
    ("knn", "accuracy"): "knn",
}  # (task, metric) -> column


def intervals(evals: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Row label -> column key -> difference to dense with its interval, where a task has one."""
    found: dict[str, dict[str, Any]] = {}
    for result in evals:
        for variant in result["variants"]:
            for metric, difference in variant["difference"].items():
                key = INTERVALS.get((result["task"]["name"], metric))
                if key is not None:
                    found.setdefault(variant["label"], {})[key] = difference
    return found


def call_text(choice: Choice | None) -> str:
    """The line of Python that makes a row."""
    if choice is None:
        return "the model as it was loaded"
    name, options = choice
    shown = {k: Path(v).name if k == "plan" and isinstance(v, str) else v for k, v in options.items()}
    return f"hap.patch(model, {json.dumps(name)}{''.join(f', {k}={v!r}' for k, v in shown.items())})"


def state(model: Any, choice: Choice | None) -> Any:
    """Context manager: `model` with the patch of `choice`, or as it is."""
    return nullcontext() if choice is None else api.patched(model, choice[0], **choice[1])


def rounds(
    choices: Mapping[str, Choice],
    once: Callable[[str, Choice | None], float],
    repeats: int,
    what: str,
    step: Step,
) -> dict[str, list[float]]:
    """Seconds per label of `once(label, choice)`, dense and every choice in turns."""
    total = repeats * (len(choices) + 1)
    done = 0

    def timed(label: str, choice: Choice | None) -> Callable[[], float]:
        def go() -> float:
            nonlocal done
            seconds = once(label, choice)
            done += 1
            step(what, done, total)
            return seconds

        return go

    step(what, 0, total)
    runs = {DENSE: timed(DENSE, None), **{k: timed(k, v) for k, v in choices.items()}}
    return measurements.in_turns(runs, repeats)


def follow(step: Step, what: str, variants: int) -> Callable[[str, int, int], None]:
    """Progress of `eval.run` (per variant) as progress of one step."""
    begun: list[str] = []

    def progress(label: str, done: int, count: int) -> None:
        if label not in begun:
            begun.append(label)
        step(what, (len(begun) - 1) * count + done, variants * count)

    return progress
