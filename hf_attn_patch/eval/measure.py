"""Score every variant batch by batch: finished batches are skipped, the rest is dealt out to the processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .journal import Journal
from .result import Variant
from .task import Task
from .team import Team
from .variants import applied

Progress = Callable[[str, int, int], None]  # (variant label, items done, items in all)
State = tuple[str, Any]  # label, and the patch as `harness.Choice` or None


def measure(
    job: Task,
    model: Any,
    processor: Any,
    states: list[State],
    items: list[Any],
    reference: Any,
    progress: Progress | None,
    journal: Journal,
    team: Team,
    only: Mapping[str, list[list[int]]] | None = None,
) -> tuple[list[Variant], dict[str, dict[int, Any]]]:
    """Scores of `items` in every state, in their order; what `journal` knows already costs no forward.

    Args:
        only: label -> the batches that this state is run on; the others are run on all.

    Returns:
        The variants that saw every item, and label -> finished items of those that did not.

    Raises:
        ValueError: the task's batches do not hold every item once, or it gave too few scores.
    """
    batches = job.batches(items)
    if sorted(i for batch in batches for i in batch) != list(range(len(items))):
        raise ValueError(f"{job.name}: batches() must hold each of the {len(items)} items once")
    if job.in_turns and team.size > 1:
        raise ValueError(
            f"{job.name}: {team.size} processes would slow each other down. Start one, without accelerate launch."
        )
    only = only or {}
    todo = {
        label: _open(only.get(label, batches), journal[label].items)[team.rank :: team.size]
        for label, _ in states
    }
    done = {label: len(journal[label].items) for label, _ in states}
    totals = {label: done[label] + sum(map(len, todo[label])) for label, _ in states}

    for (label, choice), part in _turns(states, todo, job.in_turns):
        tick = _ticker(label, done, totals, progress)
        with applied(model, choice) as handle:
            for batch in part:
                start = time.perf_counter()
                scores = job.score(model, processor, [items[i] for i in batch], reference, tick)
                seconds = time.perf_counter() - start
                # the report of the last batch stands for the variant, whichever process ran it
                sites = report_rows(handle) if handle is not None and batch == batches[-1] else []
                journal.add(label, _entries(job, batch, scores), seconds, sites)
    journal.close()
    whole = [_variant(job, n, c, len(items), journal, team) for n, c in states if n not in only]
    return whole, {label: _gathered(label, journal, team)[1] for label, _ in states if label in only}


def report_rows(handle: Any) -> list[dict[str, Any]]:
    """Rows of ``handle.report()`` as plain values."""
    keys = ("path", "layer", "part", "executor", "reason", "density")
    return [{k: getattr(row, k, None) for k in keys} for row in handle.report().sites]


def _open(batches: list[list[int]], known: dict[int, Any]) -> list[list[int]]:
    """Batches with an item that is not known yet. They stay whole: an answer may depend, in the last bits, on its
    neighbours in the batch."""
    return [batch for batch in batches if any(i not in known for i in batch)]


def _turns(
    states: list[State], todo: dict[str, list[list[int]]], in_turns: bool
) -> Iterator[tuple[State, list[list[int]]]]:
    if not in_turns:
        for state in states:
            if todo[state[0]]:
                yield state, todo[state[0]]
        return
    for turn in range(max(len(part) for part in todo.values())):
        for state in states:
            if turn < len(todo[state[0]]):
                yield state, [todo[state[0]][turn]]


def _ticker(
    label: str, done: dict[str, int], totals: dict[str, int], progress: Progress | None
) -> Callable[[int], None]:
    def tick(count: int) -> None:
        done[label] = min(done[label] + count, totals[label])
        if progress is not None:
            progress(label, done[label], totals[label])

    tick(0)
    return tick


def _entries(job: Task, batch: list[int], scores: dict[str, list[float]]) -> dict[int, dict[str, Any]]:
    names = job.columns()
    wrong = [name for name in names if len(scores.get(name, ())) != len(batch)]
    if wrong:
        raise ValueError(f"{job.name}: score gave no {len(batch)} numbers for {', '.join(wrong)}")
    answers = getattr(job, "answers", None) or [None] * len(batch)
    return {
        i: {"scores": {name: float(scores[name][n]) for name in names}, "answer": answers[n]}
        for n, i in enumerate(batch)
    }


def _variant(job: Task, label: str, choice: Any, count: int, journal: Journal, team: Team) -> Variant:
    parts, items = _gathered(label, journal, team)
    answers = [items[i]["answer"] for i in range(count)]
    return Variant(
        label=label,
        patch=None if choice is None else choice.to_dict(),
        scores={name: [items[i]["scores"][name] for i in range(count)] for name in job.columns()},
        sites=next((part.sites for part in parts if part.sites), []),
        answers=None if all(a is None for a in answers) else answers,
        seconds=sum(part.seconds for part in parts),
    )


def _gathered(label: str, journal: Journal, team: Team) -> tuple[list[Any], dict[int, dict[str, Any]]]:
    """What every process finished of a variant, and all of it together."""
    parts = team.gather(journal[label])
    items: dict[int, dict[str, Any]] = {}
    for part in parts:
        items.update(part.items)
    return parts, items
