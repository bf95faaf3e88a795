"""`run`: everything `cab` asks of some patches, in one go."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...env import command_line, environment
from ..harness import Choice, resolve
from . import leaks
from .bodies import PATTERNS, Shape
from .composite import LEAST, Column, IncompleteRow, Reference, reference_of
from .efficiency import Setting, measure, rows_of
from .micro_tasks import TASKS, Learned, Recipe, check_shape, learn
from .result import DENSE, Result

SECTIONS = ("patterns", "tasks", "efficiency")
Progress = Callable[[str, int, int], None]  # what, done, total


def run(
    patches: Sequence[Any] | Mapping[str, Any],
    *,
    patterns: Sequence[str] = tuple(PATTERNS),
    sections: Sequence[str] = SECTIONS,
    shape: Shape | None = None,
    recipe: Recipe | None = None,
    setting: Setting | None = None,
    test_length: int = 48,
    source_length: int = 37,
    reference: Reference | str | Path | None = None,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Look at `patches` through the four attention patterns.

    Args:
        patches: as for `eval.run`. patterns: of NS, CS, NC, CC. sections: of ``patterns`` (leak tests), ``tasks``
            (training, and the index), ``efficiency``.
        shape, recipe: sizes and training of the tasks. setting: what efficiency is measured on. test_length,
            source_length: target and source tokens of the leak tests.
        reference: set that indices refer to: a `Reference`, or the result.json (or its folder) of an earlier run with
            the same sizes. Default: the variants of this run, dense included.
        out: folder for ``result.json``. command: recorded; default: that of this process. progress: called as work
            gets done.

    Raises:
        SpecError: a patch cannot be understood. ValueError: sizes, names or a reference set that do not fit. All of it
        before the first second of work; a pattern that a patch does not accept is no error but a finding.
    """
    started, clock = datetime.datetime.now().astimezone(), time.perf_counter()
    choices = resolve(patches)
    shape, recipe, setting = shape or Shape(), recipe or Recipe(), setting or Setting()
    _known("pattern", patterns, PATTERNS)
    _known("section", sections, SECTIONS)
    if not choices:
        raise ValueError("cab: no patch was given; see `hf-attn-patch list`")
    if "tasks" in sections:
        check_shape(shape)
    task_settings = {"shape": asdict(shape), "recipe": asdict(recipe)}
    known = None if reference is None else _reference(reference, task_settings)
    say: Progress = progress or (lambda what, done, total: None)
    patterns = [p for p in PATTERNS if p in patterns]
    result = Result(
        variants={DENSE: {}, **{c.label: c.to_dict() for c in choices}},
        patterns=patterns,
        settings={
            **task_settings,
            "efficiency": asdict(setting),
            "leaks": {"length": test_length, "source": source_length},
            "sections": list(sections),
        },
        environment=environment(),
        command=command if command is not None else command_line(),
        started=started.isoformat(timespec="seconds"),
    )
    if "patterns" in sections:
        total = len(choices) * len(leaks.bodies(patterns))
        result.verdicts = leaks.verdicts(
            choices, patterns, test_length, source_length, partial(_step, say, "patterns", total)
        )
    if "tasks" in sections:
        result.learned = _learn_all(choices, patterns, shape, recipe, say)
        _add_index(result, known, task_settings)
    if "efficiency" in sections:
        for body in rows_of(patterns):
            tick = partial(_step, say, f"efficiency: {body.row}", len(setting.lengths))
            result.costs += measure(body, choices, setting, tick)
    result.seconds = time.perf_counter() - clock
    if out is not None:
        result.save(out)
    return result


def _known(what: str, asked: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    wrong = [name for name in asked if name not in known]
    if wrong or not asked:
        raise ValueError(
            f"cab: {what} {', '.join(map(repr, wrong)) or 'list is empty'}; known: {', '.join(known)}"
        )


def _learn_all(
    choices: Sequence[Choice], patterns: Sequence[str], shape: Shape, recipe: Recipe, say: Progress
) -> list[Learned]:
    """Dense and every choice on every body; a body that no choice accepts is not trained."""
    found: list[Learned] = []
    for body in rows_of(patterns):
        rows: list[Learned] = []
        for choice in [*choices, None]:  # dense last: only if there is something to compare
            if choice is None and all(r.state == "refused" for r in rows):
                break
            tick = partial(
                _step, say, f"{body.row}: {DENSE if choice is None else choice.label}", recipe.steps
            )
            rows.append(learn(body, choice, shape, recipe, tick))
        found += rows[-1:] + rows[:-1]
    return found


def _step(say: Progress, what: str, total: int, done: int) -> None:
    say(what, done, total)


def scores_of(learned: Sequence[Learned]) -> dict[str, dict[str, float | None]]:
    """label -> column key -> score."""
    found: dict[str, dict[str, float | None]] = {}
    for one in learned:
        row = found.setdefault(one.label, {})
        for task, numbers in one.scores.items():
            row.update({f"{one.row}/{task}/{metric}": value for metric, value in numbers.items()})
    return found


def columns_of(rows: Sequence[str]) -> list[Column]:
    """The columns of these rows, without constants."""
    return [
        column
        for row in rows
        for task in TASKS[row.split()[0]]
        for column in (
            Column(row, task, "accuracy", 1, 0.0, 0.0, 0.0, 1.0),
            Column(row, task, "loss", -1, 0.0, 0.0, 0.0),
        )
    ]


def _add_index(result: Result, known: Reference | None, settings: dict[str, Any]) -> None:
    scores = scores_of(result.learned)
    rows = list(dict.fromkeys(x.row for x in result.learned if x.state == "learned"))
    result.reference = known or reference_of(scores, columns_of(rows), settings)
    for row in rows:
        if known is None and not any(c.pattern == row for c in result.reference.columns):
            result.notes.append(
                f"{row}: no index, fewer than {LEAST} variants were learned. Add patches, or give a reference set "
                "(--reference RESULT)"
            )
            continue
        for label, own in scores.items():
            if not any(key.startswith(f"{row}/") for key in own):
                continue
            try:
                result.indices.setdefault(label, {})[row] = result.reference.index(row, own)
            except IncompleteRow as error:
                result.indices.setdefault(label, {})[row] = str(error)


def _reference(given: Reference | str | Path, settings: dict[str, Any]) -> Reference:
    """The set, checked to have been made with `settings`."""
    if isinstance(given, Reference):
        found = given
    else:
        path = Path(given)
        path = path / "result.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"cab: reference={str(given)!r} is no file and no folder with a result.json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cab: {path} is no JSON: {error}") from error
        found = Reference.from_dict((data.get("reference") if isinstance(data, dict) else None) or {})
    different = {
        f"{part}.{key}": (value, found.settings.get(part, {}).get(key))
        for part, values in settings.items()
        for key, value in values.items()
        if found.settings.get(part, {}).get(key) != value
    }
    if different:
        text = ", ".join(f"{key}={mine} here, {theirs} there" for key, (mine, theirs) in different.items())
        raise ValueError(
            f"cab: the reference set was made with other settings: {text}. Use the same, or none."
        )
    return found
