"""One decoded token with edited scores: two small products and a softmax, no mask to build.

For edits that add to, scale, or add a share of the size of the scores of a key class, by a finite number, where every
key is visible. What depends on key classes alone (one number per key) is made once per forward: layers share classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..call.program import Program, ScoreEdit, head_selector

KINDS = ("add", "abs", "multiply")


def applies(program: Program) -> bool:
    """Whether `run` gives what the general way gives."""
    mask = program.mask
    if (
        program.q_len != 1
        or program.ragged
        or program.rules
        or program.mass_edits
        or torch.compiler.is_compiling()
    ):
        return False
    if program.softcap is not None or program.sink_logits is not None or program.position_bias is not None:
        return False
    if program.dropout or program.query_scale is not None or not program.score_edits:
        return False
    if not mask.arithmetic or mask.window is not None or mask.kv_offset or mask.has_padding:
        return False
    if mask.causal and mask.q_offset + 1 < mask.kv_len:
        return False
    return all(
        edit.kind in KINDS and isinstance(edit.amount, (int, float)) and math.isfinite(edit.amount)
        for edit in program.score_edits
    )


def run(program: Program) -> Tensor:
    """Attention output before blend and gate, [B, H, 1, Dv]."""
    key, value = program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    B, H, _, D = program.query.shape
    kv = key.shape[1]
    query = program.query.reshape(B, kv, H // kv, D) * program.scale
    scores = (query @ key.mT).reshape(B, H, 1, -1)
    for edit in program.score_edits:
        amount = _amounts(program, edit)
        if edit.kind == "multiply":
            scores = scores * amount
        elif edit.kind == "abs":
            scores = torch.addcmul(scores, scores.abs(), amount)
        else:
            scores = scores + amount
    weights = torch.softmax(scores, -1).reshape(B, kv, H // kv, -1)
    return (weights @ value).reshape(B, H, 1, -1)


def _amounts(program: Program, edit: ScoreEdit) -> Tensor:
    """What an edit does to each key, broadcastable to [B, H, 1, S]; the neutral amount where it does not apply."""
    kept: dict[Any, tuple[Any, Tensor]] = program.mask.__dict__.setdefault("amounts of one token", {})
    dtype, classes = program.query.dtype, program.key_class
    name = (edit.kind, edit.amount, edit.key_class, edit.heads, id(edit.rows), id(classes), dtype)
    if name in kept:  # what the ids are of is held beside, so they are not given to others meanwhile
        return kept[name][1]
    neutral = 1.0 if edit.kind == "multiply" else 0.0
    target = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=program.query.device)
    if edit.key_class is not None and classes is not None:
        target = target & (classes == edit.key_class)[:, None, None, : program.mask.kv_len]
    if edit.rows is not None:
        target = target & edit.rows[:, None, :, None]
    if (heads := head_selector(edit.heads, program.num_heads, target.device)) is not None:
        target = target & heads
    number = lambda x: torch.tensor(x, dtype=dtype, device=target.device)
    found = torch.where(target, number(float(edit.amount)), number(neutral))
    kept[name] = ((edit.rows, classes), found)
    return found
