"""Paired bootstrap: how sure a difference between two runs on the same items is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .task import Metric

RESAMPLES = 2000
AT_ONCE = 4_000_000  # numbers per step of the bootstrap, so that 9000 items do not take gigabytes


@dataclass(frozen=True)
class Difference:
    """`value` = aggregate of the second minus the first; `low`/`high` its 95 % interval (None: fewer than 2 items in
    a group, or an aggregate that some resamples do not have, such as a share of nothing)."""

    value: float
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool:
        """True if the interval exists and does not contain 0."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def paired_bootstrap(
    first: Sequence[float] | Mapping[str, Sequence[float]],
    second: Sequence[float] | Mapping[str, Sequence[float]],
    metric: Metric,
    weights: list[float] | None = None,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Percentile interval of ``metric(second) - metric(first)``, items resampled in pairs (`scipy.stats.bootstrap`).

    Args:
        first, second: one score per item, same items in the same order; a mapping column -> scores for metrics of
        several columns. weights: one per item, or None. groups: label per item; a metric over groups resamples
        within each, as the number of items of a split or subtask is no accident.

    Raises:
        ValueError: different numbers of items, or none.
    """
    from scipy import stats

    a, b = _columns(first, metric), _columns(second, metric)
    shapes = {v.shape for v in (*a.values(), *b.values())}
    if len(shapes) != 1 or next(iter(shapes)) == (0,):
        found = " and ".join(str(s) for s in sorted(shapes))
        raise ValueError(f"a paired bootstrap needs the same items on both sides, found {found}")
    parts = split(metric, len(next(iter(a.values()))), groups)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)

    def difference(*chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        picked = [c.astype(np.int64) for c in chosen]
        return metric.at(b, w, picked) - metric.at(a, w, picked)

    value = float(difference(*parts))
    if min(map(len, parts)) < 2:
        return Difference(value, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of nan, which is dealt with below
        made: Any = stats.bootstrap(
            tuple(parts),
            difference,
            n_resamples=resamples,
            batch=max(1, AT_ONCE // sum(map(len, parts))),
            vectorized=True,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = float(made.confidence_interval.low), float(made.confidence_interval.high)
    if not np.isfinite([low, high]).all():
        return Difference(value, None, None)
    return Difference(value, low, high)


def split(metric: Metric, count: int, groups: Sequence[str] | None) -> list[np.ndarray]:
    """Item numbers per group, for a metric over groups; otherwise one part of all."""
    if metric.over == "items" or not groups:
        return [np.arange(count)]
    names = np.asarray(groups)
    return [np.flatnonzero(names == name) for name in dict.fromkeys(groups)]


def _columns(
    scores: Sequence[float] | Mapping[str, Sequence[float]], metric: Metric
) -> dict[str, np.ndarray]:
    given = scores if isinstance(scores, Mapping) else {metric.name: scores}
    return {name: np.asarray(given[name], dtype=np.float64) for name in metric.columns}
