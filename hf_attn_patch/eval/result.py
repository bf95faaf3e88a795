"""`Result`: what a run found, with everything needed to believe or repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .neutral import NeutralCheck
from .stats import Difference
from .task import Detail, Metric

SCHEMA_VERSION = 1
MOST_COLUMNS, MOST_ROWS = 6, 80  # groups that a table shows beside the variants, or below them


@dataclass
class Variant:
    """The model in one state: as given (`patch` None), or with one patch.

    scores: column of a metric -> one number per item. aggregates: metric -> number. by_group: metric -> group ->
    number.
    difference: metric -> variant minus baseline with its interval (empty for the baseline itself).
    sites: rows of the handle's report: path, layer, part, executor, reason, density.
    marks: per item, (start, end, "good" or "bad") of words of the answer.
    """

    label: str
    patch: dict[str, Any] | None
    scores: dict[str, list[float]]
    aggregates: dict[str, float] = field(default_factory=dict)
    by_group: dict[str, dict[str, float]] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] | None = None
    seconds: float = 0.0
    marks: list[list[tuple[int, int, str]]] | None = None


@dataclass
class Result:
    """One task on one model, dense and patched, on the same items. Prints as a table; `to_json` is the record.

    checks: each patch at its neutral value against dense, for tasks that ask for it. attachments: pictures of the first
    items, title -> data URI or SVG text; for the page, not in the record. Add to them before writing a page. details:
    further tables of the task.
    """

    task: dict[str, Any]
    metrics: tuple[Metric, ...]
    model: dict[str, Any]
    variants: list[Variant]
    compare: str
    items: int
    weights: list[float] | None
    groups: list[str] | None
    limit: int | None
    seed: int
    environment: dict[str, Any]
    command: str
    started: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    facts: list[dict[str, Any]] | None = None
    checks: list[NeutralCheck] = field(default_factory=list)
    attachments: list[dict[str, str]] | None = None
    details: list[Detail] = field(default_factory=list)

    @property
    def baseline(self) -> Variant:
        """The variant all differences are taken from."""
        return self[self.compare]

    def __getitem__(self, label: str) -> Variant:
        for variant in self.variants:
            if variant.label == label:
                return variant
        raise KeyError(f"no variant {label!r}; there are {', '.join(v.label for v in self.variants)}")

    def __iter__(self) -> Iterator[Variant]:
        return iter(self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain Python values."""
        variants = []
        for variant in self.variants:
            row = asdict(variant)
            for metric, difference in variant.difference.items():
                row["difference"][metric]["significant"] = difference.significant
            variants.append(row)
        return {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "metrics": [asdict(m) for m in self.metrics],
            "model": self.model,
            "compare": self.compare,
            "items": self.items,
            "weights": self.weights,
            "groups": self.groups,
            "facts": self.facts,
            "limit": self.limit,
            "seed": self.seed,
            "notes": self.notes,
            "checks": [check.to_dict() for check in self.checks],
            "details": [asdict(detail) for detail in self.details],
            "variants": variants,
            "environment": self.environment,
            "command": self.command,
            "started": self.started,
            "seconds": self.seconds,
        }

    def to_json(self, indent: int | None = 1) -> str:
        """`to_dict` as JSON text; numbers that JSON does not have (nan, inf) become null."""
        return json.dumps(jsonable(self.to_dict()), indent=indent, allow_nan=False)

    def save(self, out: str | Path) -> Path:
        """Write ``result.json`` into the folder `out` (made if needed); returns its path."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "result.json"
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def table(self) -> Any:
        """A rich table: one row per variant; per metric its aggregate and difference; a column per group if few."""
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.task['name']} · {self.model['class']} · {self.items} items · seed {self.seed}"
        table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
        table.add_column("", overflow="fold")
        groups = self._group_names()
        if len(self.metrics) > 2:
            return self._metric_rows(table, groups)
        for metric in self.metrics:
            table.add_column(f"{metric.name} {arrow(metric)}".rstrip(), justify="right")
            table.add_column(escape(f"vs {self.compare} [95 %]"), justify="right")
        for group in groups:
            table.add_column(group, justify="right")
        table.add_column("seconds", justify="right", style="dim")
        for variant in self.variants:
            cells = [escape(variant.label)]
            for metric in self.metrics:
                cells.append(shown(variant.aggregates[metric.name], metric.digits))
                difference = variant.difference.get(metric.name)
                cells.append(escape(format_difference(difference, metric.digits)))
            first = self.metrics[0]
            for group in groups:
                cells.append(shown(variant.by_group[first.name][group], first.digits))
            cells.append(f"{variant.seconds:.1f}")
            table.add_row(*cells)
        return table

    def _metric_rows(self, table: Any, groups: list[str]) -> Any:
        """Many metrics side by side would be columns of three characters: one row per metric and variant instead."""
        from rich.markup import escape

        for name in ("", "all", f"vs {self.compare} [95 %]", *groups):
            table.add_column(escape(name), justify="right" if name else "left")
        for metric in self.metrics:
            for n, variant in enumerate(self.variants):
                table.add_row(
                    f"{metric.name}, {metric.unit} {arrow(metric)}" if n == 0 else "",
                    escape(variant.label),
                    shown(variant.aggregates[metric.name], metric.digits),
                    escape(format_difference(variant.difference.get(metric.name), metric.digits)),
                    *(shown(variant.by_group[metric.name][g], metric.digits) for g in groups),
                    end_section=variant is self.variants[-1],
                )
        return table

    def group_table(self, groups: list[str]) -> Any:
        """A rich table of the main metric: one row per group, one column per variant."""
        from rich.markup import escape
        from rich.table import Table

        first = self.metrics[0]
        table = Table(title=first.name, title_justify="left", header_style="bold")
        table.add_column("", overflow="fold")
        for variant in self.variants:
            table.add_column(escape(variant.label), justify="right")
        for group in groups:
            cells = [shown(v.by_group[first.name][group], first.digits) for v in self.variants]
            table.add_row(escape(group), *cells)
        return table

    def _group_names(self, most: int = MOST_COLUMNS) -> list[str]:
        names = list(dict.fromkeys(self.groups or []))
        return names if 1 < len(names) <= most else []

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self.table()
        groups = list(dict.fromkeys(self.groups or []))
        if MOST_COLUMNS < len(groups) <= MOST_ROWS:
            yield self.group_table(groups)
        for detail in self.details:
            yield detail_table(detail)
            if detail.note:
                yield Text(detail.note, style="dim")
        for check in self.checks:
            yield Text(str(check), style={True: "green", False: "bold red"}.get(check.ok, "yellow"))  # type: ignore[arg-type]
        for note in self.notes:
            yield Text(f"note: {note}", style="dim")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def detail_table(detail: Detail) -> Any:
    """A rich table of a `Detail`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=detail.title, title_justify="left", header_style="bold")
    for number, head in enumerate(detail.columns):
        table.add_column(escape(head), justify="right" if number else "left")
    for row in detail.rows:
        table.add_row(*map(escape, row))
    return table


def shown(value: float, digits: int) -> str:
    """A number for a table; nan is a dash."""
    return "–" if value != value else f"{value:.{digits}f}"


def arrow(metric: Metric) -> str:
    """``↑``, ``↓``, or nothing where neither direction is better."""
    return "" if metric.higher_is_better is None else "↑" if metric.higher_is_better else "↓"


def format_difference(difference: Difference | None, digits: int) -> str:
    """``+1.20 [+0.90, +1.50]``; empty for the baseline, and where one side has no number."""
    if difference is None or difference.value != difference.value:
        return ""
    text = f"{difference.value:+.{digits}f}"
    if difference.low is None:
        return text
    return f"{text} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def jsonable(value: Any) -> Any:
    """`value` with everything JSON lacks turned into something it has; nan and inf become None."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict())
    return str(value)
