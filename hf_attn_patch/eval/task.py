"""`Task`: what is asked of a model, item by item, so that dense and patched answers can be paired.

A task is one dataclass in one file: its fields are its configuration, its command-line options and its JSON. It says
which items there are, and gives one number per item and metric. Everything else (patching, pairing, intervals,
records) is the business of `hf_attn_patch.eval.harness`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One number per item, and how the numbers of many items become one.

    name: as printed. unit: of the aggregate. higher_is_better: direction.
    aggregate: ``mean``, or ``exp_mean`` = exp(weighted mean), which turns mean NLLs into a perplexity.
    digits: decimals in tables.
    """

    name: str
    unit: str
    higher_is_better: bool
    aggregate: str = "mean"
    digits: int = 3

    def of(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Aggregate over the last axis: scores [..., n] (weights alike or [n]) -> [...]."""
        if weights is None:
            mean = scores.mean(-1)
        else:
            mean = (scores * weights).sum(-1) / weights.sum(-1)
        if self.aggregate == "exp_mean":
            return np.exp(mean)
        if self.aggregate != "mean":
            raise ValueError(f"metric {self.name}: aggregate {self.aggregate!r} is not 'mean' or 'exp_mean'")
        return mean


Scores = dict[str, list[float]]  # metric name -> one number per item, in the order of the items
Tick = Callable[[int], None]  # called with the number of items just finished


class Task:
    """Base of all tasks. Subclasses are dataclasses; `metrics[0]` is the main metric."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    in_turns: ClassVar[bool] = False  # True: variants take turns batch by batch, in one process (speed)

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
        """One number per metric and item. The model may be patched; the task neither knows nor cares."""
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


def require_vision_model(task: str, model: Any, processor: Any) -> None:
    """Raises ValueError unless `model` takes pixels and `processor` makes them."""
    main_input = getattr(model, "main_input_name", None)
    if main_input != "pixel_values":
        raise ValueError(
            f"{task}: {type(model).__name__} takes {main_input!r}, not pixel_values. "
            "Give a vision model (ViT, DINOv2, CLIP vision tower, …)."
        )
    if not callable(processor):
        found = "nothing" if processor is None else type(processor).__name__
        raise ValueError(f"{task}: needs a `processor` that turns images into pixel_values, found {found}.")
