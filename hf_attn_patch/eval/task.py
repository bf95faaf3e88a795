"""`Task`: what is asked of a model, item by item, so that dense and patched answers can be paired.

A task is one dataclass in one file: its fields are its configuration, its command-line options and its JSON. It says
which items there are, and gives one number per item and metric. Everything else (patching, pairing, intervals,
records) is the business of `hf_attn_patch.eval.harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Metric:
    """Numbers per item, and how the numbers of many items become one.

    name: as printed. unit: of the aggregate. higher_is_better: direction; None = neither is.
    aggregate: ``mean``; ``exp_mean`` = exp(weighted mean), which turns mean NLLs into a perplexity; ``ratio`` = sum of
    the numbers called `top` over the sum of those called `bottom` (precision, recall, F1, CHAIR_i).
    over: ``items`` = one number for all of them; ``mean of groups``, ``sum of groups`` = one number per group first,
    which is what benchmarks with splits or subtasks publish.
    scale: factor of the aggregate (100 = percent). empty: a ratio whose bottom is 0. digits: decimals in tables.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    aggregate: str = "mean"
    digits: int = 3
    top: str = ""
    bottom: str = ""
    over: str = "items"
    scale: float = 1.0
    empty: float = float("nan")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers per item that it is made of."""
        return (self.top, self.bottom) if self.aggregate == "ratio" else (self.name,)

    def of(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Aggregate of one column over the last axis: scores [..., n] (weights alike or [n]) -> [...]."""
        if weights is None:
            mean = scores.mean(-1)
        else:
            mean = (scores * weights).sum(-1) / weights.sum(-1)
        if self.aggregate == "exp_mean":
            return self.scale * np.exp(mean)
        if self.aggregate != "mean":
            raise ValueError(f"metric {self.name}: aggregate {self.aggregate!r} is not 'mean' or 'exp_mean'")
        return self.scale * mean

    def at(
        self, columns: Mapping[str, np.ndarray], weights: np.ndarray | None, parts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The aggregate of chosen items.

        Args:
            columns: name -> number per item [n]. weights: [n] or None; a ratio takes none.
            parts: item numbers [..., m] of each group, one part if all count as one; leading axes are resamples.
        """
        found = [self._one(columns, weights, part) for part in parts]
        if self.over == "sum of groups":
            return np.sum(found, axis=0)
        return found[0] if len(found) == 1 else np.mean(found, axis=0)

    def _one(
        self, columns: Mapping[str, np.ndarray], weights: np.ndarray | None, chosen: np.ndarray
    ) -> np.ndarray:
        if self.aggregate != "ratio":
            return self.of(columns[self.name][chosen], None if weights is None else weights[chosen])
        top, bottom = columns[self.top][chosen].sum(-1), columns[self.bottom][chosen].sum(-1)
        return np.where(bottom > 0, self.scale * top / np.where(bottom > 0, bottom, 1.0), self.empty)


@dataclass(frozen=True)
class Detail:
    """A table beside that of the metrics. columns: heads, the first one of the rows' names. rows: cells as text. note:
    a sentence below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


Scores = dict[str, list[float]]  # column of a metric -> one number per item, in the order of the items
Tick = Callable[[int], None]  # called with the number of items just finished


class Task:
    """Base of all tasks. Subclasses are dataclasses; `metrics[0]` is the main metric (one number per item)."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    in_turns: ClassVar[bool] = False  # True: variants take turns batch by batch, in one process (speed)
    takes: ClassVar[str] = "tokenizer"  # what the command line loads beside the model: tokenizer or processor

    def columns(self) -> list[str]:
        """Names of the numbers that `score` gives per item."""
        return list(dict.fromkeys(c for metric in self.metrics for c in metric.columns))

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        """The items, the same for the same arguments; called once per run, before anything is patched.

        Raises:
            ValueError: the configuration does not fit the model or the data.
        """
        raise NotImplementedError

    def reference(self, model: Any, items: list[Any]) -> Any:
        """What `score` compares with, computed once on the model as it was given. Default: nothing."""
        return None

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        """One number per column and item. The model may be patched; the task neither knows nor cares."""
        raise NotImplementedError

    def weights(self, items: list[Any]) -> list[float] | None:
        """Weight of each item in the aggregate; None = all alike."""
        return None

    def groups(self, items: list[Any]) -> list[str] | None:
        """A label per item, for aggregates per group (lengths, classes); None = no groups."""
        return None

    def batches(self, items: list[Any]) -> list[list[int]]:
        """Indices of items that one call of `score` gets: what is kept after a kill, and dealt out to processes.

        Every index stands in one batch. Default: one batch of everything, right for any task, and with nothing to keep.
        """
        return [list(range(len(items)))]

    def facts(self, items: list[Any]) -> list[dict[str, Any]] | None:
        """What the record says about each item (length, depth, expected answer, …); None = nothing."""
        return None

    def neutral_batches(self, batches: list[list[int]]) -> list[list[int]]:
        """Batches that each patch is also run on at its neutral value, to see that the answers are those of the dense
        model (`eval.neutral`). Default: none."""
        return []

    def marks(self, item: Any, answer: str) -> list[tuple[int, int, str]]:
        """(start, end, ``good`` or ``bad``) of words to mark in an answer on the page. Default: none."""
        return []

    def remarks(self, items: list[Any], answers: list[str]) -> list[str]:
        """Notes on the answers of one variant, e.g. figures as the official script rounds them. Default: none."""
        return []

    def details(self, scores: Mapping[str, Scores]) -> list[Detail]:
        """Further tables (by layer, …) from variant -> column -> number per item, dense first. Default: none."""
        return []

    def attachments(self, items: list[Any], most: int) -> list[dict[str, str]] | None:
        """Pictures of the first `most` items for the page: title -> data URI or SVG text. Default: none."""
        return None

    def pictures(
        self, model: Any, processor: Any, items: list[Any], answers: list[str]
    ) -> list[dict[str, str]]:
        """Further pictures of the first items, made with the dense model after the measurement. Default: none."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Name and configuration, ready for JSON."""
        return {"name": self.name, "config": asdict(self) if is_dataclass(self) else {}}


def require_language_model(task: str, model: Any, processor: Any) -> None:
    """Raises ValueError unless `model` predicts tokens and `processor` is a tokenizer."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{task}: {type(model).__name__} has no language-model head, so it predicts no tokens. "
            "Give a causal language model, or one of the vision tasks (agreement, knn) for a vision model."
        )
    if not callable(getattr(processor, "encode", None)):
        found = "nothing" if processor is None else type(processor).__name__
        raise ValueError(f"{task}: needs the tokenizer of the model as `processor`, found {found}.")


def require_pixels(task: str, model: Any) -> None:
    """Raises ValueError unless `model` takes pixels."""
    main_input = getattr(model, "main_input_name", None)
    if main_input != "pixel_values":
        raise ValueError(
            f"{task}: {type(model).__name__} takes {main_input!r}, not pixel_values. "
            "Give a vision model (ViT, DINOv2, CLIP vision tower, …)."
        )


def require_vision_model(task: str, model: Any, processor: Any) -> None:
    """Raises ValueError unless `model` takes pixels and `processor` makes them."""
    require_pixels(task, model)
    if not callable(processor):
        found = "nothing" if processor is None else type(processor).__name__
        raise ValueError(f"{task}: needs a `processor` that turns images into pixel_values, found {found}.")
