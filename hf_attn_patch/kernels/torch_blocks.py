"""The torch executor: every `Program` in linear memory, on any device, differentiable; the fast path on CPUs.

It only chooses. Unedited softmax over a static layout runs bucket by bucket and dense attention in one
SDPA call (`plain`), everything else goes row block by row block (`row_blocks`). Where edits
touch only some rows, the others still take the cheap way; (head, token) pairs behind a closed gate are left out
(`ragged_rows`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call.program import MassEdit, Program, ScoreEdit
from ..call.rules import Rule
from . import one_token, ragged_rows, reference
from .hidden_keys import poisoned, without_hidden
from .plain import run_plain
from .ragged_rows import run_open
from .row_blocks import mean_values, run_ragged, run_rows


def why_not(program: Program) -> str | None:
    """Reason this executor cannot run `program`, or None."""
    if program.need_weights:
        return "attention probabilities were asked for, only the reference executor keeps them"
    return reference.why_not(program)


def run(program: Program) -> tuple[Tensor, None]:
    """Execute `program` with memory linear in its length: (output [B, H, L, Dv], None)."""
    output = _run(program)
    if poisoned(program, output):
        output = _run(without_hidden(program))
    return output, None


def _run(program: Program) -> Tensor:
    targets = {blend.target for blend in program.blends if isinstance(blend.target, str)}
    rules = [blend.target for blend in program.blends if isinstance(blend.target, Rule)]
    if program.ragged:
        return reference.finish(program, run_ragged(program, program_is_edited(program)), None, None)
    output = attend(program)
    mean = mean_values(program) if "mean_value" in targets else None
    own = reference.own_values(program, program.value) if "value" in targets else None  # type: ignore[arg-type]
    by_rule = [attend(program.reading(t)) for t in rules]
    return reference.finish(program, output, mean, own, by_rule)


def program_is_edited(program: Program) -> bool:
    """True if scores or masses differ from plain softmax on at least one row."""
    return program.edits_scores or program.position_bias is not None


def attend(program: Program) -> Tensor:
    """Attention output before blend and gate, [B, H, L, Dv]."""
    if not program_is_edited(program):
        return run_open(program, run_plain) if ragged_rows.applies(program) else run_plain(program)
    if one_token.applies(program):
        return one_token.run(program)
    rows = edited_rows(program)
    if rows is None or 2 * rows.numel() > program.q_len:
        return run_rows(program, edited=True)
    cheap = run_plain(replace(program, score_edits=[], mass_edits=[]))
    if not rows.numel():
        return cheap
    return cheap.index_copy(2, rows, run_rows(program, rows, edited=True).to(cheap.dtype))


def edited_rows(program: Program) -> Tensor | None:
    """int64 [n], rows that an edit touches in some row of the batch; None = all."""
    if program.softcap is not None or program.sink_logits is not None or program.position_bias is not None:
        return None
    if torch.compiler.is_compiling():  # how many rows there are would depend on the values of a tensor
        return None
    touched = torch.zeros(program.q_len, dtype=torch.bool, device=program.query.device)
    edits: list[ScoreEdit | MassEdit] = [*program.score_edits, *program.mass_edits]
    for edit in edits:
        if edit.rows is None:
            return None
        touched |= edit.rows.any(0)
    return touched.nonzero()[:, 0]
