"""Paired bootstrap: how sure a difference between two runs on the same items is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .task import Metric

RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """`value` = aggregate of the second minus the first; `low`/`high` its 95 % interval (None: fewer than 2 items)."""

    value: float
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool:
        """True if the interval exists and does not contain 0."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def paired_bootstrap(
    first: list[float],
    second: list[float],
    metric: Metric,
    weights: list[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Percentile interval of ``metric(second) - metric(first)``, items resampled in pairs.

    Args:
        first, second: one score per item, same items in the same order. weights: one per item, or None.

    Raises:
        ValueError: different numbers of items, or none.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(
            f"a paired bootstrap needs the same items on both sides, found {a.shape} and {b.shape}"
        )
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    value = float(metric.of(b, w) - metric.of(a, w))
    if a.size < 2:
        return Difference(value, None, None)
    pick = np.random.default_rng(seed).integers(0, a.size, size=(resamples, a.size))
    wp = None if w is None else w[pick]
    differences = metric.of(b[pick], wp) - metric.of(a[pick], wp)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Difference(value, float(low), float(high))
