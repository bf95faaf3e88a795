"""`run`: one task on a live model, as it is and with each patch, on the same items."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from .. import api
from ..env import command_line, environment
from . import variants as variant_kinds
from .journal import Journal, fingerprint
from .measure import Progress, measure
from .neutral import compare as compare_neutral
from .neutral import known_answers
from .result import Result, Variant
from .specs import PatchSpec, SpecError, parse_patch_spec, parse_task_spec
from .stats import paired_bootstrap, split
from .task import Task
from .team import Team
from .team import find as find_team

DENSE = "dense"
MOST_ATTACHMENTS = 100  # items that a page shows with their picture


@dataclass(frozen=True)
class Choice:
    """One patch (or two-stream decoding) to measure. what: name or config object for `hap.patch`; options: its keyword
    arguments. kind: ``patch`` or ``decoding``."""

    label: str
    what: Any
    options: dict[str, Any]
    kind: str = "patch"

    def to_dict(self) -> dict[str, Any]:
        config = asdict(self.what) if is_dataclass(self.what) and not isinstance(self.what, type) else {}
        name = (
            self.what if isinstance(self.what, str) else getattr(self.what, "name", type(self.what).__name__)
        )
        kind = {} if self.kind == "patch" else {"kind": self.kind}
        return {"name": name, "options": {**config, **self.options}, **kind}


def run(
    task: str | Task,
    model: Any,
    processor: Any = None,
    *,
    patches: Sequence[Any] | Mapping[str, Any] = (),
    decodings: Sequence[str] = (),
    compare: str = DENSE,
    limit: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    share: bool = True,
) -> Result:
    """Measure `model` as it is ("dense") and with each patch, on the same items.

    The model object is used as it stands, never reloaded, and is left as it was. If it carries patches already, they
    are part of everything that is measured, and the result says so.

    Args:
        task: name, ``name:key=value,…`` or a `Task`. processor: tokenizer or image processor of the model.
        patches: each a name, ``name:key=value,…``, a config object, or (name or object, options of `hap.patch`); a
            mapping gives labels of its own.
        decodings: two-stream methods (`hf_attn_patch.decoding`), each ``name:key=value,…``: variants of their own.
        compare: label that differences are taken from: ``dense``, or the label of a patch.
        limit: only the first items. seed: of items and bootstrap. out: folder to write ``result.json`` to. Finished
            items are kept there in ``items.jsonl``: the same call after a kill goes on where it stopped.
        command: recorded in the result; default: the command line of this process.
        progress: called as items finish.
        share: under ``accelerate launch``, deal the items out to the processes (all of them must call this); every one
            gets the whole result and rank 0 writes it. False: this process works alone.

    Raises:
        SpecError, TaskError: task or patch cannot be understood. ValueError: it does not fit the model.
        JournalError: `out` holds the items of another run. TeamError: several processes without accelerate.
        PatchError: a patch refuses the model. Nothing has been measured and nothing changed in any of these cases.
    """
    started, clock = datetime.datetime.now().astimezone(), time.perf_counter()
    job: Task = parse_task_spec(task) if isinstance(task, str) else task
    choices = resolve(patches, decodings)
    labels = [DENSE, *(c.label for c in choices)]
    if compare not in labels:
        raise SpecError(f"compare={compare!r} is none of the variants: {', '.join(labels)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    for choice in choices:
        variant_kinds.check(model, choice)  # every refusal comes before the first second of work

    carried = [str(handle) for handle in api.active(model)]
    with evaluating(model):
        items = job.items(model, processor, seed)[:limit]
        if not items:
            raise ValueError(f"{job.name}: no items")
        groups, weights = job.groups(items), job.weights(items)
        team = find_team(model) if share else Team()
        journal = _journal(job, model, items, choices, carried, seed, out, team)
        known = journal.known()
        reference = job.reference(model, items)
        states: list[tuple[str, Any]] = [(DENSE, None), *((c.label, c) for c in choices)]
        batches = job.neutral_batches(job.batches(items))
        neutral = {c.label: variant_kinds.neutral(model, c) for c in choices}
        again = [
            Choice(f"{c.label} at neutral", name, options, c.kind)
            for c in choices
            for name, options in [neutral[c.label]]
            if batches and options is not None
        ]
        states += [(c.label, c) for c in again]
        only = {c.label: batches for c in again}
        variants, partial = measure(
            job, model, processor, states, items, reference, progress, journal, team, only
        )
        pictures = job.attachments(items, MOST_ATTACHMENTS)
        if out is not None and team.rank == 0:  # for the page
            for known_ones, more in zip(
                pictures or [], job.pictures(model, processor, items, variants[0].answers or [])
            ):
                known_ones.update(more)
    base = next(v for v in variants if v.label == compare)
    for variant in variants:
        summarise(variant, base, job, weights, groups, seed)
        if variant.answers is not None:
            found = [job.marks(item, answer) for item, answer in zip(items, variant.answers)]
            variant.marks = found if any(found) else None
    dense = known_answers(variants[0])
    checks = [
        compare_neutral(c.label, neutral[c.label][1], dense, partial.get(f"{c.label} at neutral", {}))
        for c in choices
        if hasattr(job, "neutral")
    ]

    notes = [
        f"the model already carried {text}; this is part of all variants, dense included" for text in carried
    ]
    if known:
        total = len(items) * len(labels) + sum(map(len, batches)) * len(again)
        notes.append(f"{known} of {total} scores are from an earlier start ({out}/items.jsonl)")
    for variant in variants:
        notes += [f"{variant.label}: {text}" for text in job.remarks(items, variant.answers or [])]
    if team.size > 1:
        notes.append(f"shared by {team.size} processes")
    result = Result(
        task=job.to_dict(),
        metrics=job.metrics,
        model={**describe_model(model), "active_patches": carried},
        variants=variants,
        compare=compare,
        items=len(items),
        weights=weights,
        groups=groups,
        facts=job.facts(items),
        limit=limit,
        seed=seed,
        environment=environment(),
        command=command if command is not None else command_line(),
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        notes=notes,
        checks=checks,
        attachments=pictures,
        details=job.details({variant.label: variant.scores for variant in variants}),
    )
    if out is not None and team.rank == 0:
        result.save(out)
    team.wait()
    return result


def _journal(
    job: Task,
    model: Any,
    items: list[Any],
    choices: list[Choice],
    carried: list[str],
    seed: int,
    out: str | Path | None,
    team: Team,
) -> Journal:
    if out is None or job.in_turns:  # speeds of two starts have no common clock
        return Journal(None, {})
    patches = {c.label: c.to_dict() for c in choices}
    # the same command gives the same items; what is measured of them is in the first line
    asked = fingerprint(job.to_dict(), model, items, patches, carried, seed)
    journal = Journal(out, asked, team.rank)
    team.wait()  # nobody writes while somebody still reads
    return journal


def resolve(patches: Sequence[Any] | Mapping[str, Any], decodings: Sequence[str] = ()) -> list[Choice]:
    """Patches in any accepted form, and decodings as text, as `Choice` objects with distinct labels.

    Raises:
        SpecError: a form that is not accepted, or two patches of one label.
    """
    if isinstance(patches, str):
        patches = [patches]
    named = list(patches.items()) if isinstance(patches, Mapping) else [(None, p) for p in patches]
    choices: list[Choice] = []
    wanted = [_choice(patch, label) for label, patch in named]
    wanted += [
        Choice(*variant_kinds.decoding_choice(text), kind=variant_kinds.DECODING) for text in decodings
    ]
    for choice in wanted:
        if choice.label == DENSE or any(c.label == choice.label for c in choices):
            raise SpecError(
                f"two variants are called {choice.label!r}. Give labels of your own: patches={{label: patch}}."
            )
        choices.append(choice)
    return choices


def _choice(patch: Any, label: str | None) -> Choice:
    if isinstance(patch, str):
        spec = parse_patch_spec(patch)
        return Choice(label or spec.label, spec.name, dict(spec.options))
    if isinstance(patch, PatchSpec):
        return Choice(label or patch.label, patch.name, dict(patch.options))
    if isinstance(patch, tuple) and len(patch) == 2 and isinstance(patch[1], Mapping):
        what, options = patch
        shown = what if isinstance(what, str) else repr(what)
        return Choice(label or PatchSpec(shown, dict(patch[1])).label, what, dict(options))
    if is_dataclass(patch) and not isinstance(patch, type):
        return Choice(label or repr(patch), patch, {})
    raise SpecError(
        f"{patch!r} is not a patch. Give a name, 'name:key=value,…', a config object, or (name, {{options}})."
    )


def summarise(
    variant: Variant,
    base: Variant,
    job: Task,
    weights: list[float] | None,
    groups: list[str] | None,
    seed: int,
) -> None:
    """Fill aggregates, groups and the difference to `base`."""
    import numpy as np

    w = None if weights is None else np.asarray(weights)
    columns = {name: np.asarray(v, dtype=np.float64) for name, v in variant.scores.items()}
    for metric in job.metrics:
        parts = split(metric, len(next(iter(columns.values()))), groups)
        variant.aggregates[metric.name] = float(metric.at(columns, w, parts))
        if groups is not None:
            names = np.asarray(groups)
            variant.by_group[metric.name] = {
                g: float(metric.at(columns, w, [np.flatnonzero(names == g)])) for g in dict.fromkeys(groups)
            }
        if variant is not base:
            variant.difference[metric.name] = paired_bootstrap(
                base.scores, variant.scores, metric, weights, groups=groups, seed=seed
            )


def describe_model(model: Any) -> dict[str, Any]:
    """Class, origin, size and number format of a model."""
    return {
        "class": type(model).__name__,
        "name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": getattr(model.config, "_attn_implementation", None),
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode inside; the training flag of every module comes back afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
