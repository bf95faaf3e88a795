"""Progress on the terminal: bars where there is one, a line per step where output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


def bars(console: Console) -> Progress:
    """The bars of this package."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def variant_progress(what: str, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """For `eval.run(progress=)`: one bar per variant on stderr, nothing if `quiet` or not a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with bars(console) as progress:
        rows: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in rows:
                rows[label] = progress.add_task(f"{what}: {label}", total=total)
            progress.update(rows[label], completed=done)

        yield update


class Steps:
    """One bar per step, finished steps stay on screen; without a terminal, one line when a step ends."""

    def __init__(self, console: Console):
        self.console = console
        self.live = console.is_terminal
        self.progress = bars(console) if self.live else None
        self.rows: dict[str, Any] = {}
        self.started: dict[str, float] = {}

    def __enter__(self) -> Steps:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.progress is not None:
            self.progress.stop()

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of the step `what`."""
        if what not in self.started:
            self.started[what] = time.perf_counter()
            if self.progress is not None:
                self.rows[what] = self.progress.add_task(what, total=total)
        if self.progress is not None:
            self.progress.update(self.rows[what], completed=done, total=total)
        elif done >= total:
            self.console.print(f"  {what}: {time.perf_counter() - self.started[what]:.1f} s")

    def under(self, prefix: str) -> Callable[[str, int, int], None]:
        """`step` with a prefix before each name."""
        return lambda what, done, total: self.step(f"{prefix}: {what}", done, total)
