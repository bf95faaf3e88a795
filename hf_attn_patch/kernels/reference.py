"""The truth: every `Program` in plain dense torch, any dtype up to float64, written like the formula.

Memory is O(B H L S). Nothing here is optimised; every other executor is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call.program import Program, head_selector
from ..call.rules import Rule


def visible(program: Program, rows: Tensor, cols: Tensor) -> Tensor:
    """Keys that mask and rules allow: bool [B, H|1, Lq, Sk] (1 where all heads see the same).

    Args:
        rows: int64 [Lq] query columns. cols: int64 [Sk] or [B, Sk] key columns, -1 = empty slot.
    """
    mask = program.mask
    seen = mask.block(rows, cols)
    rule = program.rule
    if rule is not None:
        head = torch.arange(rule.heads, device=rows.device).reshape(1, -1, 1, 1)
        # what was chosen for this call was chosen by columns (padding inside rows is cut out before that)
        at = mask.columns_from_start if rule.dynamic else mask.positions_at
        read = rule.visible(head, at(rows).transpose(2, 3), at(cols))
        seen = seen & (
            read if rule.heads == 1 else read.repeat_interleave(program.num_heads // rule.heads, 1)
        )
    return seen.expand(program.batch, -1, -1, -1)


def readable(program: Program, allowed: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, S, .] with 0 where no query reads: what is there may be NaN, and 0 * NaN is NaN.

    allowed: bool [B, H|1, Lq, S].
    """
    seen = allowed.any(2)
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (key.shape[1], -1)).any(2)
    # a mean over heads reads the key of every head, also of those that do not attend to it
    mixed = any(edit.kind == "mean_abs" for edit in program.score_edits)
    keys_seen = seen.any(1, keepdim=True) if mixed else seen
    return key.masked_fill(~keys_seen[..., None], 0.0), value.masked_fill(~seen[..., None], 0.0)


def masked_softmax(scores: Tensor, allowed: Tensor, sink_logits: Tensor | None = None) -> Tensor:
    """Softmax over allowed keys, [B, H, L, S]; a row with no allowed key gives zeros, never NaN."""
    # keys that an edit took out with -inf are masked too: no gradient comes back through a row that saw nothing
    scores = scores.masked_fill(~allowed | (scores == float("-inf")), float("-inf"))
    if sink_logits is not None:
        extra = sink_logits.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1].masked_fill(~allowed, 0.0)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def attend(
    program: Program,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    rows: Tensor,
    cols: Tensor,
    row_index: Tensor | None = None,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All score-level semantics of `program` for a piece of it. The reference calls it once with everything;
    the torch executor calls it on row blocks.

    Args:
        query: [B, H', Lq, D]. key, value: [B, Hkv', Sk, D|Dv], Hkv' divides H' (query head h reads h // (H'/Hkv')).
        allowed: bool, broadcastable to [B, H', Lq, Sk]. rows: int64 [Lq] columns of the queries. cols: int64 [Sk]
            or [B, Sk].
        row_index: int64 [Lq], which rows of the program these are (default: all). heads: int64 [H'], which
            query heads these are (default: all).

    Returns:
        (output before blend and gate [B, H', Lq, Dv], edited probabilities [B, H', Lq, Sk]).
    """
    device = query.device
    row_index = torch.arange(program.q_len, device=device) if row_index is None else row_index

    def pick(x: float | Tensor) -> float | Tensor:  # [B|1, H|1, L|1, .] -> the rows and heads of this piece
        if not isinstance(x, Tensor) or x.ndim < 4:
            return x
        x = x[:, heads] if heads is not None and x.shape[1] > 1 else x
        return x[:, :, row_index] if x.shape[2] > 1 else x

    def rows_of(flags: Tensor | None) -> Tensor | None:  # bool [B|1, L] -> [B|1, 1, Lq, 1]
        return None if flags is None else flags[:, row_index][:, None, :, None]

    def heads_of(chosen: tuple[int, ...] | None) -> Tensor | None:
        selector = head_selector(chosen, program.num_heads, device)
        return selector if selector is None or heads is None else selector[:, heads]

    def where(*conditions: Tensor | None) -> Tensor | None:
        found = None
        for c in conditions:
            if c is not None:
                found = c if found is None else found & c
        return found

    classes = None
    if program.key_class is not None:
        at = cols.clamp(min=0)
        wide = program.key_class.expand(program.batch, -1)
        classes = wide[:, at] if at.ndim == 1 else torch.gather(wide, 1, at.expand(wide.shape[0], -1))
        classes = classes[:, None, None, :]  # [B, 1, 1, Sk]

    # the query heads that share a KV head are rows of one product: K and V are never repeated
    scores = (_by_kv_head(query, key.shape[1]) @ key.mT).reshape(
        *query.shape[:3], key.shape[2]
    ) * program.scale
    if program.query_scale is not None:
        scores = scores * pick(program.query_scale)
    if program.softcap is not None:
        scores = program.softcap * torch.tanh(scores / program.softcap)
    bias = program.mask.bias(rows, cols)
    if bias is not None:
        bias = bias[:, heads] if heads is not None and bias.shape[1] > 1 else bias
        scores = scores + bias
    if program.position_bias is not None:
        full = program.position_bias
        full = full[:, heads] if heads is not None and full.shape[1] > 1 else full
        full = full[:, :, row_index] if full.shape[2] > 1 else full
        at = (cols - program.mask.kv_offset).clamp(min=0)  # empty slots are not allowed anyway
        if at.ndim == 1:
            full = full[..., at]
        else:  # every row of the batch holds keys of its own
            index = at[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1)
            full = torch.gather(full.expand(at.shape[0], -1, -1, -1), 3, index)
        scores = scores + full
    for number, edit in enumerate(program.score_edits):
        target = where(
            None
            if number == 0 or edit.kind == "add"
            else scores != float("-inf"),  # what was taken out stays out
            heads_of(edit.heads),
            rows_of(edit.rows),
            None if edit.key_class is None or classes is None else classes == edit.key_class,
        )
        amount = pick(edit.amount)
        if edit.kind == "add":
            changed = scores + amount
        elif edit.kind == "abs":
            changed = scores + amount * scores.abs()
        elif edit.kind == "multiply":
            changed = scores * amount
        elif edit.kind == "mean_abs":
            size = scores.abs() if number == 0 else scores.masked_fill(scores == float("-inf"), 0.0).abs()
            changed = scores + amount * size.mean(1, keepdim=True)
        else:
            raise ValueError(f"unknown score edit {edit.kind!r}")
        scores = changed if target is None else torch.where(target, changed, scores)

    sinks = program.sink_logits
    probs = masked_softmax(scores, allowed, sinks if sinks is None or heads is None else sinks[heads])
    for mass in program.mass_edits:
        assert classes is not None, (
            "a mass edit needs key classes: the patch must call program.classify first"
        )
        onehot = torch.stack([(classes == c) for c in range(mass.classes)], -1)  # [B, 1, 1, Sk, C]
        masses = torch.stack([(probs * onehot[..., c]).sum(-1) for c in range(mass.classes)], -1)
        counts = torch.stack([(allowed & onehot[..., c]).sum(-1) for c in range(mass.classes)], -1)
        factors = mass.weights(masses, counts.to(masses.dtype), rows)  # [B, H', Lq, C]
        per_key = sum(factors[..., c : c + 1] * onehot[..., c] for c in range(mass.classes))
        target = where(heads_of(mass.heads), rows_of(mass.rows))
        probs = probs * per_key if target is None else torch.where(target, probs * per_key, probs)
    used = torch.nn.functional.dropout(probs, program.dropout) if program.dropout else probs
    output = _by_kv_head(used, value.shape[1]) @ value
    return output.reshape(*query.shape[:3], value.shape[3]), probs


def probabilities(program: Program, rows: Tensor) -> Tensor:
    """Attention probabilities [B, H, n, S] of the rows with indices `rows` (int64 [n]), all edits included.

    One block of rows at a time is what statistics need, so no L x S matrix has to exist. Not for ragged caches.
    """
    at, columns = program.mask.query_columns[rows], program.mask.key_columns
    assert not program.ragged, "a cache with a span per head has no common keys"
    query, key, value = program.query[:, :, rows], program.key, program.value
    allowed = visible(program, at, columns)
    return attend(program, query, key, value, allowed, at, columns, rows)[1]  # type: ignore[arg-type]


def dense_probabilities(program: Program) -> Tensor:
    """Probabilities [B, H, L, S] of a call that reads every key its mask allows, whatever its rules; no gradient."""
    key, value = program.key, program.value
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    rows = torch.arange(program.q_len, device=program.query.device) + program.mask.q_offset
    with torch.no_grad():
        allowed = program.mask.block(rows, program.mask.key_columns)
        return attend(program, program.query, key, value, allowed, rows, program.mask.key_columns)[1]


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, L, E] -> [B, Hkv, H / Hkv * L, E]."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def finish(
    program: Program,
    output: Tensor,
    allowed_mean: Tensor | None,
    own_value: Tensor | None,
    by_rule: Sequence[Tensor] = (),
) -> Tensor:
    """Blends and head gate on the output [B, H, L, Dv] (the epilogue shared by executors).

    by_rule: outputs of `Program.reading`, one for each blend whose target is a rule, in order.
    """
    outputs = iter(by_rule)
    for blend in program.blends:
        if isinstance(blend.target, Rule):
            target: Tensor | None = next(outputs)
        else:
            target = own_value if blend.target == "value" else allowed_mean
        assert target is not None, f"the executor did not compute {blend.target}"
        mixed = (1 - blend.amount) * output + blend.amount * target
        selector = head_selector(blend.heads, program.num_heads, output.device)
        output = mixed if selector is None else torch.where(selector, mixed, output)
    return gated(program, output)


def gated(program: Program, output: Tensor) -> Tensor:
    """`output` [B, H, L, Dv] times the head gate."""
    if program.head_gate is None:
        return output
    gate = program.head_gate.to(output.dtype)
    gate = gate.reshape((1,) * (3 - gate.ndim) + tuple(gate.shape))
    return output * gate.permute(0, 2, 1)[..., None]


def per_query_head(tensor: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, H, S, D] (query head h reads KV head h // (H / Hkv))."""
    return tensor.repeat_interleave(num_heads // tensor.shape[1], 1)


def own_values(program: Program, value: Tensor) -> Tensor:
    """Value at each query's own column, [B, H, L, Dv]."""
    own = value[:, :, program.mask.query_columns - program.mask.kv_offset]
    return per_query_head(own, program.num_heads)


def run(program: Program) -> tuple[Tensor, Tensor | None]:
    """Execute `program` densely: (output [B, H, L, Dv], edited probabilities [B, H, L, S]; 0 at evicted keys)."""
    rows = program.mask.query_columns
    H = program.num_heads
    if program.ragged:
        outputs = weights = torch.empty(0)
        group_size = H // program.num_kv_heads
        for group in program.key.groups:  # type: ignore[union-attr]
            heads = torch.tensor([g * group_size + i for g in group.heads for i in range(group_size)])
            heads = heads.to(program.query.device)
            allowed = visible(program, rows, group.columns)
            allowed = allowed[:, heads] if allowed.shape[1] > 1 else allowed
            key, value = readable(program, allowed, group.key, group.value)
            part, probs = attend(
                program,
                program.query[:, heads],
                key,
                value,
                allowed,
                rows,
                group.columns,
                heads=heads,
            )
            if outputs.numel() == 0:
                outputs = part.new_empty(part.shape[0], H, *part.shape[2:])
                weights = probs.new_zeros(*outputs.shape[:3], program.mask.kv_len + 1)
            outputs[:, heads] = part
            # empty slots go to a column of their own, which is cut off
            at = torch.where(group.columns < 0, program.mask.kv_len, group.columns - program.mask.kv_offset)
            weights[:, heads] = weights[:, heads].scatter(3, at[:, None, None, :].expand_as(probs), probs)
        return finish(program, outputs, None, None), weights[..., :-1]
    assert isinstance(program.key, Tensor) and isinstance(program.value, Tensor)
    cols = program.mask.key_columns
    allowed = visible(program, rows, cols)
    key, value = readable(program, allowed, program.key, program.value)
    output, probs = attend(program, program.query, key, value, allowed, rows, cols)
    mean = own = None
    if any(b.target == "mean_value" for b in program.blends):
        value = per_query_head(value, H)
        share = allowed.to(value.dtype)
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        mean = share @ value
    if any(b.target == "value" for b in program.blends):
        own = own_values(program, program.value)
    by_rule: list[Tensor] = []
    for blend in program.blends:
        if isinstance(blend.target, Rule):
            part, restricted = run(program.reading(blend.target))
            assert restricted is not None
            by_rule.append(part)
            selector = head_selector(blend.heads, H, output.device)
            mixed = (1 - blend.amount) * probs + blend.amount * restricted
            probs = mixed if selector is None else torch.where(selector, mixed, probs)
    return finish(program, output, mean, own, by_rule), probs


def why_not(program: Program) -> str | None:
    """Reason the reference cannot run `program`, or None."""
    if program.operator != "softmax":
        return f"operator {program.operator!r} is not implemented"
    if program.ragged and (program.blends or any(e.kind == "mean_abs" for e in program.score_edits)):
        return "blends and head-mean score edits need all heads over the same keys (use cache='keep')"
    return None
