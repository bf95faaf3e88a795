"""`vertical_slash`: the prompt is read along the columns and diagonals that its last queries point at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...call.rules import ColumnsDiagonals
from ...errors import CacheError, ConfigError, ModelMismatchError
from ...forward.needs import PromptLength
from ...kernels.reference import masked_softmax
from ...options import option, option_file
from ...registry import Patch, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

KIND = "vertical_and_slash"
Pair = tuple[int, int]  # (columns, diagonals)


@register_patch("vertical_slash")
@dataclass
class VerticalSlash(Patch):
    """The prompt is read along columns and diagonals that its last queries point at (MInference); decoding is dense.

    Source: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, arXiv
    2407.02490 (microsoft/MInference fb56c91, READ; its choice of lines RAN).

    Formula: per query head, P = softmax of the last `last` queries of the prompt over all keys, [last, n]. Columns are
    scored by ``sum_r P[r, k]``, diagonals by ``sum_r P[r, q_r - d]``. The best `vertical` columns (the first `sinks`
    always) and the best `slash` diagonals (the nearest `recent` always) are read: query q reads key k iff k is one of
    the columns or q - k one of the distances. Counts include what is always read.

    Prefill only: queries behind the prompt (as `hap.prompt(model, length=...)` or ``generate`` says, else every forward
    of several tokens is one) read everything, as do single queries. A prompt that comes in pieces (by hand, or
    ``prefill_chunk_size``) is read by other lines than at once: every piece chooses by its own last queries.

    `patterns`: sizes per query head, the original's JSON (a list with one ``{head: ["vertical_and_slash", vertical,
    slash, score]}`` per layer; heads that are not listed take `vertical` and `slash`), or what ``calibrate
    vertical_slash`` writes.

    Neutral value: `vertical` at least the length of the prompt.

    Differs from the original code: a diagonal is read element by element (the original's kernel widens it to blocks of
    64, which reads more for the same sizes); batches with padding, where every row counts from its first real token to
    its last; equal scores go to the earlier column and the shorter distance; a head without a pattern takes the
    options, not 1000 and 6096. No KV head is repeated. Layers with a sliding window stay as they are. No gradient flows
    through the choice.
    """

    counts = "edit"
    paper = "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention"
    arxiv = "2407.02490"
    head_state = ("_table",)
    parts = ("text", "decoder")
    default_part = "text"
    needs = (PromptLength(),)
    causal_only = True

    vertical: int = option(500, help="columns per head, the first ones included")
    slash: int = option(700, help="diagonals per head, the nearest ones included")
    patterns: list | dict | str | None = option(
        None,
        help="sizes per layer and query head: MInference's JSON (list of dicts), or a path to it",
        path=True,
    )
    sinks: int = option(30, help="first columns that are always read")
    recent: int = option(100, help="nearest diagonals that are always read, the query's own key included")
    last: int = option(64, help="queries at the end of the prompt that choose")
    _table: Any = field(default=None, init=False, repr=False, compare=False)

    def validate(self) -> None:
        self.require(self.vertical >= 0, "vertical", ">= 0")
        self.require(self.slash >= 0, "slash", ">= 0")
        self.require(self.sinks >= 0, "sinks", ">= 0")
        self.require(self.recent >= 1, "recent", ">= 1 (a query always reads its own key)")
        self.require(self.last >= 1, "last", ">= 1")
        if self.patterns is not None:
            data = _load(self.patterns) if isinstance(self.patterns, str) else self.patterns
            self._table = _read(data)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        if self._table is None:
            return []
        layers = max(s.layer for s in sites) + 1
        layers = max(layers, getattr(model.config.get_text_config(), "num_hidden_layers", layers))
        if len(self._table) != layers:
            raise ModelMismatchError(
                f"vertical_slash: patterns have {len(self._table)} layers, the model has {layers} (text part). They "
                "belong to one model: find them with `hf-attn-patch calibrate vertical_slash`"
            )
        return []

    def check(self, site: Site) -> None:
        if self._table is None or site.layer >= len(self._table):
            return  # check_model says it better
        highest = max(self._table[site.layer], default=-1)
        if site.num_heads is None or highest >= site.num_heads:
            raise ModelMismatchError(
                f"vertical_slash: patterns name head {highest} in layer {site.layer}, {site.path} has "
                f"{site.num_heads or 'an unknown number of'} query heads"
            )

    def sizes(self, layer: int, num_heads: int) -> list[Pair]:
        """(columns, diagonals) of every query head of `layer`."""
        row = self._table[layer] if self._table is not None else {}
        return [row.get(head, (self.vertical, self.slash)) for head in range(num_heads)]

    def edit(self, program: Program, call: Call) -> None:
        mask = program.mask
        if mask.window is not None or program.q_len == 1:
            return
        if not isinstance(program.key, Tensor) or mask.kv_offset:
            raise CacheError(
                f"{self.name}: this cache has dropped tokens, so columns and diagonals cannot be chosen among all "
                "keys. Patch the method that freed them with cache='keep', and start with a fresh cache"
            )
        prompt = call.context.prompt_length if call.context is not None else None
        end = min(mask.q_offset + mask.q_len, mask.q_offset + mask.q_len if prompt is None else prompt)
        if end <= mask.q_offset:
            return  # no query of this call belongs to the prompt
        scores = [line_scores(program, b, end, self.last) for b in range(program.batch)]
        pairs = self.sizes(call.layer, program.num_heads)
        columns = chosen(torch.stack([c for c, _, _ in scores]), [v for v, _ in pairs], self.sinks)
        diagonals = chosen(torch.stack([d for _, d, _ in scores]), [s for _, s in pairs], self.recent)
        if call.heads is not None:
            others = [h for h in range(program.num_heads) if h not in call.heads]
            columns[:, others] = True
        until = torch.tensor([n for _, _, n in scores], device=columns.device)
        rule = ColumnsDiagonals(columns, diagonals, until)
        program.share = _share(rule, program)
        program.restrict(rule)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"vertical": 1 << 20}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        small = {"sinks": 1, "recent": 2, "last": 5}
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1) or 1
        table = [{"0": [KIND, 1, 2, 1.0], "1": [KIND, 2, 4, 0.5]} for _ in range(layers)]
        return [{"vertical": 2, "slash": 3, **small}, {"vertical": 0, "slash": 3, "patterns": table, **small}]


@torch.no_grad()
def line_scores(program: Program, b: int, end: int, last: int) -> tuple[Tensor, Tensor, int]:
    """Mass per column and per diagonal under the last queries of one row of the batch.

    Args:
        b: row of the batch. end: column behind its prompt. last: queries to ask.

    Returns:
        (columns [H, S], by position; diagonals [H, S], by distance; length of its prompt in real tokens). All 0 for a
        row of which this call holds no real query.
    """
    mask, H = program.mask, program.num_heads
    assert isinstance(program.key, Tensor)
    start, size = mask.starts[b], mask.kv_len
    device = program.query.device
    if mask.padding is not None:
        real = mask.padding.expand(mask.batch, -1)[b, :end].nonzero()[:, 0]
        end = int(real[-1]) + 1 if len(real) else start
    dtype = torch.promote_types(program.query.dtype, torch.float32)
    columns = torch.zeros(H, size, dtype=dtype, device=device)
    diagonals = torch.zeros_like(columns)
    begin = max(end - last, start, mask.q_offset)
    if begin >= end:
        return columns, diagonals, max(end - start, 0)
    at = torch.arange(begin, end, device=device)
    query, key = program.query[b, :, at - mask.q_offset], program.key[b]
    grouped = query.reshape(key.shape[0], -1, query.shape[2])
    with torch.autocast(
        device.type, enabled=False
    ):  # lines are chosen in `dtype`, whatever the model computes in
        scores = (grouped.to(dtype) @ key.to(dtype).mT).reshape(H, len(at), size) * program.scale
    allowed = mask.block(at, mask.key_columns.to(device))
    allowed = allowed[b if allowed.shape[0] > 1 else 0].expand(H, -1, -1)
    mass = masked_softmax(scores[None], allowed[None])[0]
    columns[:, : size - start] = mass.sum(1)[:, start:]
    distance = at[:, None] - torch.arange(size, device=device)
    mass = mass * (distance >= 0)
    diagonals.scatter_add_(1, distance.clamp(min=0).flatten().expand(H, -1), mass.flatten(1))
    return columns, diagonals, end - start


def chosen(scores: Tensor, sizes: list[int], always: int) -> Tensor:
    """The best lines of each head, bool [B, H, n], from scores [B, H, n]: the first `always`, then by falling score, up
    to `sizes[h]` in all (never fewer than `always`). Equal scores: the lower number."""
    ranked = scores.clone()
    ranked[..., :always] = torch.inf
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    count = torch.tensor(sizes, device=scores.device).clamp(min=always)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, taken.expand(scores.shape))


def _share(rule: ColumnsDiagonals, program: Program) -> Tensor:
    """Share of the (query, key) pairs of this call that is read, 0-d."""
    mask = program.mask
    counts = rule.counts()
    at = mask.query_columns.to(counts.device) - mask.start.to(counts.device)[:, None]  # [B, L]
    inside = (at >= 0) & (at < counts.shape[2])
    at = at.clamp(0, counts.shape[2] - 1)
    read = counts.gather(2, at[:, None].expand(-1, counts.shape[1], -1))
    possible = ((at + 1) * inside).sum() * counts.shape[1]
    return (read * inside[:, None]).sum() / possible.clamp(min=1)


def _load(path: str) -> Any:
    try:
        return json.loads(option_file("vertical_slash", "patterns", path, "patterns file"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"vertical_slash: patterns file {path} is not valid JSON: {error}") from error


def _read(data: Any) -> list[dict[int, Pair]]:
    """Sizes per layer and query head."""
    if isinstance(data, dict) and "patterns" in data:
        data = data["patterns"]
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data) or not data:
        raise ConfigError(
            'vertical_slash: patterns are a list with one {head: ["vertical_and_slash", vertical, slash, score]} per '
            f"layer (MInference's JSON), found a {type(data).__name__}"
        )
    table: list[dict[int, Pair]] = []
    for layer, row in enumerate(data):
        table.append({})
        for head, entry in row.items():
            where = f"layer {layer} head {head}"
            if not str(head).isdigit():
                raise ConfigError(f"vertical_slash: layer {layer} names head {head!r}, expected a number")
            if not isinstance(entry, (list, tuple)) or len(entry) < 3:
                raise ConfigError(
                    f"vertical_slash: pattern of {where} is {entry!r}, expected [kind, v, s, score]"
                )
            kind, vertical, slash = entry[:3]
            if kind != KIND:
                raise ConfigError(
                    f"vertical_slash: pattern of {where} is {kind!r}; only {KIND!r} is computed here (A-shape heads: "
                    "patch them with streaming and heads=...; block-sparse ones: block_topk)"
                )
            sizes = (vertical, slash)
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
                raise ConfigError(f"vertical_slash: sizes of {where} are {sizes}, expected two numbers >= 0")
            table[-1][int(head)] = sizes
    return table
