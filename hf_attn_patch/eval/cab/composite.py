"""The composite index: scores of different tasks on one scale, relative to a reference set that is kept with them.

Formula (CAB, arXiv 2210.07661, Shark-NLP/CAB scripts/compositional_index): ``z = sign * (score - mean) / deviation``
per metric, sign -1 where lower is better; a task is the mean of its metrics' z, a pattern the mean of its tasks. mean
and deviation are those of the reference set. Adding a method would change both, so an index means something only beside
its set: that is stored with the result and can be read back.

Differs from the original: a row with a missing or impossible score is refused (theirs scores a placeholder of -100 as
z = 14.7), a set of one or two has no deviation worth the name, and a metric without any is named and not divided by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LEAST = 3  # members of a set: two are always one deviation apart
Scores = Mapping[str, float | None]  # key of a column -> score


class IncompleteRow(ValueError):
    """A row that has no index; the message names the columns."""


@dataclass(frozen=True)
class Column:
    """One metric of one task of one pattern, with the constants of the reference set.

    sign: 1 = higher is better, -1 = lower is. low, high: the range of possible scores, None = no limit.
    """

    pattern: str
    task: str
    metric: str
    sign: int
    mean: float
    deviation: float
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        """``CS/mqar/accuracy``."""
        return f"{self.pattern}/{self.task}/{self.metric}"

    def problem(self, score: float | None) -> str | None:
        """Why a score cannot stand in an index, or None."""
        if score is None or not math.isfinite(score):
            return f"{self.key} is missing"
        if (self.low is not None and score < self.low) or (self.high is not None and score > self.high):
            return f"{self.key}={score:g} is impossible ({self.low} to {self.high})"
        if not self.deviation > 0:
            return f"{self.key} is the same in the whole reference set"
        return None

    def z(self, score: float) -> float:
        """Deviations better than the mean of the set."""
        return self.sign * (score - self.mean) / self.deviation


@dataclass(frozen=True)
class Index:
    """One row's index of one pattern. tasks: task -> mean z of its metrics; total: their mean."""

    pattern: str
    tasks: dict[str, float]
    total: float

    def __str__(self) -> str:
        return (
            f"{self.pattern}: {self.total:+.3f} ({', '.join(f'{t} {z:+.3f}' for t, z in self.tasks.items())})"
        )


@dataclass(frozen=True)
class Reference:
    """A reference set. members: label -> its scores; settings: how they were made (sizes, steps, seed)."""

    columns: tuple[Column, ...]
    members: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, pattern: str) -> list[Column]:
        """The columns of a pattern.

        Raises:
            IncompleteRow: the set has none.
        """
        found = [c for c in self.columns if c.pattern == pattern]
        if not found:
            have = ", ".join(dict.fromkeys(c.pattern for c in self.columns)) or "nothing"
            raise IncompleteRow(f"the reference set has no {pattern}; it has {have}")
        return found

    def index(self, pattern: str, scores: Scores) -> Index:
        """The index of one row.

        Raises:
            IncompleteRow: a score of the pattern is missing, impossible, or has no deviation in the set.
        """
        columns = self.of(pattern)
        problems = [text for c in columns if (text := c.problem(scores.get(c.key)))]
        if problems:
            raise IncompleteRow(f"{pattern} has no index: {'; '.join(problems)}")
        by_task: dict[str, list[float]] = {}
        for column in columns:
            by_task.setdefault(column.task, []).append(column.z(float(scores[column.key] or 0.0)))
        tasks = {task: statistics.fmean(z) for task, z in by_task.items()}
        return Index(pattern, tasks, statistics.fmean(tasks.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it."""
        return {
            "columns": [asdict(c) for c in self.columns],
            "members": self.members,
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reference:
        """Raises ValueError if `data` is no reference set."""
        try:
            columns = tuple(Column(**c) for c in data["columns"])
            return cls(columns, dict(data["members"]), dict(data["settings"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"cab: this is no reference set (columns, members, settings): {error}. Take result.json of a run of "
                "`hf-attn-patch cab --out`."
            ) from error

    def __str__(self) -> str:
        patterns = ", ".join(dict.fromkeys(c.pattern for c in self.columns)) or "no pattern"
        return f"reference set of {len(self.members)}: {', '.join(self.members)} ({patterns})"


def reference_of(
    members: Mapping[str, Scores], blank: Sequence[Column], settings: Mapping[str, Any]
) -> Reference:
    """The set of `members`: mean and sample deviation (n - 1) per column, over the rows that have its pattern whole.

    Args:
        members: label -> scores. blank: columns, their constants unused. Patterns with fewer than `LEAST` whole rows
            are left out.
    """
    columns: list[Column] = []
    kept: dict[str, dict[str, float]] = {}
    for pattern in dict.fromkeys(c.pattern for c in blank):
        own = [_with(c, 0.0, 1.0) for c in blank if c.pattern == pattern]
        whole = {
            label: row for label, row in members.items() if not any(c.problem(row.get(c.key)) for c in own)
        }
        if len(whole) < LEAST:
            continue
        for column in own:
            values = [float(row[column.key] or 0.0) for row in whole.values()]
            columns.append(_with(column, statistics.fmean(values), statistics.stdev(values)))
            for label, value in zip(whole, values):
                kept.setdefault(label, {})[column.key] = value
    return Reference(tuple(columns), kept, dict(settings))


def _with(column: Column, mean: float, deviation: float) -> Column:
    return Column(**{**asdict(column), "mean": mean, "deviation": deviation})
