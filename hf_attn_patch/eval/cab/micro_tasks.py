"""One synthetic task per pattern, learned from scratch with the patch on: can a model with this attention learn it?

NS: 30 % of a sequence that repeats every `length` / 4 tokens are masked, the model says what they were. CS, half of the
rows each: *mqar*, pairs of key and value, then keys in any order, each answered by its value (multi-query associative
recall, arXiv 2312.04927); *induction*, a random piece of random length repeated to the end, copied from the second time
on. NC: values of keys in a source without order. CC: the source, backwards, then the start token again.

All variants start from the same weights and see the same rows. Scores are of rows that were never trained on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..variants import applied
from .bodies import FIRST, MASK, START, Body, Shape, learner

if TYPE_CHECKING:
    from ..harness import Choice

IGNORED = -100
TASKS = {
    "NS": ("recovery",),
    "CS": ("mqar", "induction"),
    "NC": ("look-up",),
    "CC": ("reversal",),
}


@dataclass(frozen=True)
class Recipe:
    """How a task is learned. steps: of AdamW; rows: per step; lr: the highest, after 10 % of the steps, falling to a
    tenth; held_out: rows that are scored; seed: of weights and rows."""

    steps: int = 400
    rows: int = 32
    lr: float = 3e-3
    held_out: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        small = {k: v for k in ("steps", "rows", "held_out") if (v := getattr(self, k)) < 2}
        if small or not self.lr > 0:
            raise ValueError(f"cab: {small or {'lr': self.lr}} must be at least 2 (lr: above 0)")


@dataclass(frozen=True)
class Rows:
    """inputs: of the learner. targets: int64 [B, L], `IGNORED` where nothing is asked. task: int64 [B], which of the
    pattern's tasks a row belongs to."""

    inputs: dict[str, Tensor]
    targets: Tensor
    task: Tensor


@dataclass
class Learned:
    """Scores of one variant on one body. scores: task -> {accuracy: share, loss: nats}, over all asked tokens of the
    task. losses: training loss in nats, 20 points. state: ``learned`` or ``refused``, with the reason."""

    row: str
    label: str
    state: str
    reason: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def check_shape(shape: Shape) -> None:
    """Raises ValueError if the tasks do not fit into `shape`."""
    if shape.length < 16 or shape.length % 8:
        raise ValueError(f"cab: length={shape.length} must be a multiple of 8 and at least 16")
    needed = shape.length // 2 + FIRST
    if shape.vocabulary < needed:
        raise ValueError(
            f"cab: vocabulary={shape.vocabulary} is too small for rows of length={shape.length} without ambiguous "
            f"answers. Give at least vocabulary={needed}."
        )


def distinct(generator: torch.Generator, rows: int, count: int, vocabulary: int) -> Tensor:
    """Random tokens with content, none twice in a row of [rows, count]."""
    order = torch.rand(rows, vocabulary - FIRST, generator=generator).argsort(1)
    return FIRST + order[:, :count]


def recovery(generator: torch.Generator, rows: int, shape: Shape) -> Rows:
    """A repeated piece [B, L] with masked tokens."""
    piece = torch.randint(FIRST, shape.vocabulary, (rows, shape.length // 4), generator=generator)
    whole = piece.repeat(1, 4)
    hidden = torch.rand(rows, shape.length, generator=generator) < 0.3
    return Rows(
        {"input_ids": whole.masked_fill(hidden, MASK)},
        whole.masked_fill(~hidden, IGNORED),
        torch.zeros(rows).long(),
    )


def recall(generator: torch.Generator, rows: int, shape: Shape) -> Rows:
    """Half mqar, half induction, [B, L]; targets are the next tokens."""
    length, pairs = shape.length, shape.length // 8
    first = rows // 2
    tokens = distinct(generator, first, 2 * pairs, shape.vocabulary)
    keys, values = tokens[:, :pairs], tokens[:, pairs:]
    pick = torch.randint(0, pairs, (first, length // 2 - pairs), generator=generator)
    asked = torch.stack([keys.gather(1, pick), values.gather(1, pick)], -1).flatten(1)
    mqar = torch.cat([torch.stack([keys, values], -1).flatten(1), asked], 1)

    longest = length // 2
    piece = distinct(generator, rows - first, longest, shape.vocabulary)
    period = torch.randint(pairs, longest + 1, (rows - first, 1), generator=generator)
    place = torch.arange(length)[None]
    copied = piece.gather(1, place % period)

    ids = torch.cat([mqar, copied])
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORED)], 1)
    # only the value of a key can be known
    silent_mqar = ((place < 2 * pairs) | (place % 2 == 1)).expand(first, -1)
    # where the first period ends is not known before its first token comes again
    silent = torch.cat([silent_mqar, place < period])
    task = (torch.arange(rows) >= first).long()
    return Rows({"input_ids": ids}, targets.masked_fill(silent, IGNORED), task)


def look_up(generator: torch.Generator, rows: int, shape: Shape) -> Rows:
    """`length` / 2 pairs in the source, `length` / 4 of them asked for."""
    pairs = shape.length // 2
    keys = distinct(generator, rows, pairs, shape.vocabulary)
    values = torch.randint(FIRST, shape.vocabulary, (rows, pairs), generator=generator)
    pick = torch.randint(0, pairs, (rows, shape.length // 4), generator=generator)
    inputs = {"asked": keys.gather(1, pick), "keys": keys, "values": values}
    return Rows(inputs, values.gather(1, pick), torch.zeros(rows).long())


def reversal(generator: torch.Generator, rows: int, shape: Shape) -> Rows:
    """A source of `length` / 4 tokens; the target has one more, the start token as its end."""
    source = torch.randint(FIRST, shape.vocabulary, (rows, shape.length // 4), generator=generator)
    start = torch.full((rows, 1), START)
    backwards = source.flip(1)
    inputs = {"input_ids": source, "decoder_input_ids": torch.cat([start, backwards], 1)}
    return Rows(inputs, torch.cat([backwards, start], 1), torch.zeros(rows).long())


MAKERS: dict[str, Callable[[torch.Generator, int, Shape], Rows]] = {
    "NS": recovery,
    "CS": recall,
    "NC": look_up,
    "CC": reversal,
}


def learn(
    body: Body,
    choice: Choice | None,
    shape: Shape,
    recipe: Recipe,
    tick: Callable[[int], None] = lambda step: None,
) -> Learned:
    """Train a new model of `body` with `choice` on (None: dense), and score it on rows of its own.

    A patch that the body does not accept, before or while it runs, is reported as refused. tick: called per step.
    """
    from ...errors import PatchError

    label, started = ("dense" if choice is None else choice.label), time.perf_counter()
    model = learner(body, shape, recipe.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a window that saves nothing on a short strip is no news
            with applied(model, None if choice is None else body.place(choice)):
                losses = _train(model, body, shape, recipe, tick)
                scores = _score(model, body, shape, recipe)
    except PatchError as error:
        return Learned(body.row, label, "refused", str(error))
    return Learned(body.row, label, "learned", "", scores, losses, time.perf_counter() - started)


def _train(
    model: nn.Module, body: Body, shape: Shape, recipe: Recipe, tick: Callable[[int], None]
) -> list[float]:
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=recipe.lr, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1, anneal_strategy="linear",
        div_factor=100.0, final_div_factor=0.1, cycle_momentum=False,
    )  # fmt: skip
    model.train()
    kept = []
    for step in range(recipe.steps):
        rows = MAKERS[body.pattern](generator, recipe.rows, shape)
        loss = nn.functional.cross_entropy(model(**rows.inputs).flatten(0, 1), rows.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(recipe.steps // 20, 1) == 0:
            kept.append(float(loss.detach()))
        tick(step + 1)
    return kept


def _score(model: nn.Module, body: Body, shape: Shape, recipe: Recipe) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(recipe.seed + 1_000_003)  # no row of the training
    model.eval()
    sums: Any = {name: [0.0, 0.0, 0] for name in TASKS[body.pattern]}
    with torch.inference_mode():
        for start in range(0, recipe.held_out, recipe.rows):
            rows = MAKERS[body.pattern](generator, min(recipe.rows, recipe.held_out - start), shape)
            logits = model(**rows.inputs).float()
            losses = nn.functional.cross_entropy(
                logits.transpose(1, 2), rows.targets, reduction="none", ignore_index=IGNORED
            )
            for number, name in enumerate(TASKS[body.pattern]):
                asked = (rows.targets != IGNORED) & (rows.task == number)[:, None]
                right = (logits.argmax(-1) == rows.targets) & asked
                for place, value in enumerate((right.sum(), losses[asked].sum(), asked.sum())):
                    sums[name][place] += value.item()
    return {name: {"accuracy": right / n, "loss": loss / n} for name, (right, loss, n) in sums.items()}
