"""What a `cab` run found: prints as tables, saves as JSON, and can be the reference set of later runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..result import jsonable
from .bodies import PATTERNS
from .composite import Index, Reference
from .efficiency import Costs
from .leaks import Verdict
from .micro_tasks import Learned

SCHEMA_VERSION = 1
DENSE = "dense"


@dataclass
class Result:
    """One run.

    variants: label -> name and options (dense: none). verdicts, learned, costs: what was tested, trained and timed.
    indices: label -> row -> its index, or why there is none. reference: the set that indices refer to.
    settings: everything that was asked for.
    """

    variants: dict[str, dict[str, Any]]
    patterns: list[str]
    settings: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    learned: list[Learned] = field(default_factory=list)
    costs: list[Costs] = field(default_factory=list)
    indices: dict[str, dict[str, Index | str]] = field(default_factory=dict)
    reference: Reference | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def supports(self, label: str) -> dict[str, str]:
        """Pattern -> state over all its bodies that accept the patch: the worst of them, or ``refused``."""
        found = {}
        for pattern in self.patterns:
            states = {v.state for v in self.verdicts if (v.label, v.row) == (label, pattern)}
            order = ("no", "partly", "yes", "no effect", "refused")
            found[pattern] = next((state for state in order if state in states), "not tested")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data; an efficiency length outside the measured range is null beside its root."""
        costs = []
        for cost in self.costs:
            row = asdict(cost)
            for kind, fit in cost.fits.items():
                row["fits"][kind] |= {"length": fit.length, "says": str(fit)}
            costs.append(row)
        indices = {
            label: {row: {"refused": i} if isinstance(i, str) else asdict(i) for row, i in rows.items()}
            for label, rows in self.indices.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "task": "cab",
            "variants": self.variants,
            "patterns": self.patterns,
            "settings": self.settings,
            "supports": {label: self.supports(label) for label in self.variants if label != DENSE},
            "verdicts": [asdict(v) for v in self.verdicts],
            "learned": [asdict(x) for x in self.learned],
            "costs": costs,
            "indices": indices,
            "reference": None if self.reference is None else self.reference.to_dict(),
            "notes": self.notes,
            "environment": self.environment,
            "command": self.command,
            "started": self.started,
            "seconds": self.seconds,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text; nan becomes null."""
        return json.dumps(jsonable(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False)

    def save(self, out: str | Path) -> Path:
        """Write ``result.json`` into the folder `out`; returns its path."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "result.json"
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        if self.verdicts:
            yield self._patterns_table()
            for verdict in self.verdicts:
                if verdict.state in ("no", "partly", "no effect"):
                    yield Text(str(verdict), style="yellow")
        if self.learned:
            yield self._tasks_table()
        if self.costs:
            yield self._costs_table()
        if self.indices:
            yield self._index_table()
        for note in self.notes:
            yield Text(f"note: {note}", style="dim")

    def _patterns_table(self) -> Any:
        """Who supports what."""
        table = _table("patterns", "", *(f"{p}, {PATTERNS[p]}" for p in self.patterns))
        styles = {"yes": "green", "no": "bold red", "partly": "yellow", "no effect": "yellow"}
        for label in self.variants:
            if label == DENSE:
                continue
            cells = []
            for pattern, state in self.supports(label).items():
                rows = [v for v in self.verdicts if (v.label, v.row) == (label, pattern)]
                text = state
                if state == "refused":
                    # the body where the patch belongs says more than those where it is not defined at all
                    said = min(
                        (row.reason for row in rows), key=lambda reason: "is not defined for" in reason
                    )
                    text = f"refused: {_short(said)}"
                elif state != "not tested":
                    text += f" ({', '.join(v.body.split()[0] for v in rows if v.state == state)})"
                cells.append(_styled(text, styles.get(state, "dim")))
            table.add_row(_styled(label), *cells)
        return table

    def _tasks_table(self) -> Any:
        names = list(dict.fromkeys((x.row, t) for x in self.learned for t in x.scores))
        table = _table("accuracy of held-out tokens (loss, nats)", "", *(f"{r}: {t}" for r, t in names))
        for label in self.variants:
            found = {x.row: x for x in self.learned if x.label == label}
            cells = []
            for row, task in names:
                scores = found[row].scores.get(task) if row in found else None
                cells.append(f"{scores['accuracy']:.3f} ({scores['loss']:.2f})" if scores else "refused")
            table.add_row(_styled(label), *(_styled(c, "dim" if c == "refused" else "") for c in cells))
        return table

    def _costs_table(self) -> Any:
        lengths = self.settings["efficiency"]["lengths"]
        ms, mib = (f"{unit} at {', '.join(map(str, lengths))}" for unit in ("ms", "MiB"))
        table = _table(
            "attention module", "", ms, mib, "efficiency length, time", "memory", "exponents of time"
        )
        trained = {(x.row, x.label) for x in self.learned if x.state == "learned"}
        for row in dict.fromkeys(c.row for c in self.costs):
            ours = [
                c for c in self.costs if c.row == row and (c.state == "measured" or (row, c.label) in trained)
            ]
            for cost in ours:
                if (
                    cost.state != "measured"
                ):  # accepted by the small body, refused by the wide one: worth a line
                    table.add_row(
                        _styled(f"{row}: {cost.label}"), _styled(f"refused {cost.reason}", "yellow")
                    )
                    continue
                fits = [str(cost.fits[k]) if cost.fits else "" for k in ("time", "memory")]
                slopes = cost.fits["time"].exponents if cost.fits else None
                slope = "" if slopes is None else f"{slopes[1]:.2f} (base {slopes[0]:.2f})"
                table.add_row(
                    _styled(f"{row}: {cost.label}"),
                    ", ".join(f"{x:.1f}" for x in cost.time),
                    ", ".join(f"{x:.1f}" for x in cost.memory),
                    *map(_styled, fits),
                    slope,
                    end_section=cost is ours[-1],
                )
        return table

    def _index_table(self) -> Any:
        rows = list(dict.fromkeys(row for found in self.indices.values() for row in found))
        members = len(self.reference.members) if self.reference else 0
        table = _table(f"composite index, {members} rows in the reference set", "", *rows)
        for label, found in self.indices.items():
            cells = [found.get(row, "") for row in rows]
            table.add_row(
                _styled(label),
                *(
                    _styled(f"{c.total:+.2f}") if isinstance(c, Index) else _styled(_short(c), "dim")
                    for c in cells
                ),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in columns:
        table.add_column(_styled(name), overflow="fold")
    return table


def _styled(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style=style)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
