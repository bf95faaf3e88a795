"""`pasta`: steer chosen heads to marked spans of the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...call.program import ScoreEdit
from ...errors import ConfigError
from ...forward.needs import PromptLength
from ...model import head_sets
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

Span = tuple[int, int]


def token_span(text: str, part: str, offsets: Any, occurrence: int = 0) -> Span:
    """[start, end) of the tokens that hold characters of the `occurrence`-th `part` of `text`.

    Args:
        offsets: (begin, end) in characters per token, from ``tokenizer(text, return_offsets_mapping=True)``,
            without padding. Tokens that only touch `part`, and empty ones such as BOS, are not taken (the original's
            finder takes a token that ends where `part` begins).

    Raises:
        ConfigError: `part` is not there that often, or no token holds it.
    """
    begin = -1
    for _ in range(occurrence + 1):
        begin = text.find(part, begin + 1) if part else -1
        if begin < 0:
            raise ConfigError(f"pasta: {part!r} occurs {text.count(part) if part else 0} times in the text, "
                              f"occurrence {occurrence} (from 0) was asked for")  # fmt: skip
    end = begin + len(part)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin and b > a]
    if not inside:
        raise ConfigError(
            f"pasta: no token covers {part!r}; were the offsets cut off, or made for another text?"
        )
    return inside[0], inside[-1] + 1


def read_spans(spans: Any) -> list[list[Span]]:
    """Spans per row of the batch from ``[[start, end], ...]`` (one list for every row) or one such list per row.

    Raises:
        ConfigError: not numbers, or not 0 <= start < end.
    """
    data = spans.tolist() if isinstance(spans, Tensor) else spans
    pair = lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and all(_is_int(n) for n in x)
    if not isinstance(data, (list, tuple)):
        raise ConfigError(f"pasta: marked={spans!r} is no list of [start, end] token ranges")
    rows = [data] if all(pair(x) for x in data) else data
    for row in rows:
        for span in row if isinstance(row, (list, tuple)) else [row]:
            if not pair(span) or not 0 <= span[0] < span[1]:
                raise ConfigError(
                    f"pasta: span {span!r} is no [start, end] with 0 <= start < end, in tokens counted from the first "
                    "real token of a row, end excluded"
                )
    return [[(int(a), int(b)) for a, b in row] for row in rows]


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


@register_patch("pasta")
@dataclass
class Pasta(Patch):
    """Steer chosen heads to marked spans of the prompt by a bias on the other keys.

    Source: Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs, arXiv 2311.02262
    (QingruZhang/PASTA 56a9138, READ and RAN).

    Formula: ``s_ij <- s_ij + log(alpha)`` in the chosen heads, every query row i and the keys j of ``target``, s
    [B, H, L, S] before softmax; the same as multiplying their probabilities by alpha and renormalising.
    target "complement" (PASTA's exclude, its default): prompt keys outside the spans; "span": the spans themselves
    (alpha > 1 emphasises); "prompt" (PASTA's generation): the whole prompt. Keys behind the prompt
    are edited only where they are marked themselves.

    Neutral value: alpha = 1.

    Defaults: alpha 0.01 (the original's). Which heads matter differs by model; the original profiles them (steer one
    head at a time on about 1000 samples, rank, intersect over tasks) and ships lists for llama-7b and gptj.

    Spans are token ranges ``[start, end)`` counted from the first real token of a row, for all rows by the option, or
    per forward and per row by ``with hap.prompt(model, marked=...)``, which wins; `token_span` finds them. Tokens that
    a row does not have are ignored, and a row without spans is left alone.

    Differs from the original code: several spans count as their union (the original adds log(alpha) outside each of
    them, so that spans weaken each other). PASTA's include is "complement" with 1 / alpha. Works on batches, left
    padding and any executor (the original needs eager masks). The prompt ends where the first forward that fills the
    cache ends; ``length``, or ``hap.prompt(model, length=...)``, says it for texts scored in one forward.
    """

    counts = "edit"
    paper = "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs"
    arxiv = "2311.02262"
    head_state = ("_set",)
    parts = ("text", "decoder")
    default_part = "text"
    needs = (PromptLength(),)
    exclusive = frozenset({"key classes"})

    marked: list = option(default_factory=list, help="[[start, end], ...] in tokens; [] = hap.prompt says it")
    alpha: float = option(0.01, help="factor on the probability of the target keys, before renormalising")
    target: Literal["complement", "span", "prompt"] = option(
        "complement", help="keys whose probability changes"
    )
    head_config: dict | list | str | None = option(
        None, help="{layer: [heads]} or a head-set file; None = every head (or those of heads=)", path=True
    )
    length: int | None = option(
        None, help="tokens of the prompt of each row; None = what filled the cache first"
    )
    _set: Any = field(default=None, init=False, repr=False, compare=False)
    _marked: Any = field(default=None, init=False, repr=False, compare=False)

    def validate(self) -> None:
        self.require(self.alpha > 0 and math.isfinite(self.alpha), "alpha", "a finite number > 0 (1 = dense)")
        self.require(self.length is None or self.length >= 1, "length", ">= 1 or None")
        rows = read_spans(self.marked)
        if len(rows) != 1:
            raise ConfigError(
                f"pasta: marked={self.marked!r} holds one list per row; the option is for all rows, say rows with "
                "hap.prompt(model, marked=...)"
            )
        self._marked = rows
        self.marked = [list(span) for span in rows[0]]
        if self.head_config is not None:
            self.head_config = head_sets.plain(self.head_config, self.name, "head_config")
            self._set = head_sets.read(self.head_config, self.name)

    def check(self, site: Site) -> None:
        if self._set is not None:
            self._set.check(site, self.name)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        return [] if self._set is None else self._set.check_model(model, sites, self.name)

    def _rows(self, call: Call, batch: int) -> list[list[Span]]:
        """Spans of each row of the batch."""
        said = call.context.override.get("marked") if call.context is not None else None
        if said is None and not self.marked and self.target != "prompt":
            raise ConfigError(
                "pasta: no spans are known in this forward. Give marked=[[start, end], ...] to the patch, call the "
                "model within hap.prompt(model, marked=...), or switch the patch off with handle.disabled()"
            )
        rows = self._marked if said is None else read_spans(said)
        if not rows or batch % len(rows):
            raise ConfigError(
                f"pasta: hap.prompt gave spans for {len(rows)} rows, the batch has {batch}; give one list of spans per "
                "row, or one for all"
            )
        beams = batch // len(rows)  # rows of one item share its spans
        return [row for row in rows for _ in range(beams)]

    def _classes(self, program: Program, call: Call) -> Tensor:
        """int8 [B, columns], 1 on the keys whose score changes."""
        mask, device = program.mask, program.query.device
        columns = torch.arange(mask.kv_offset + mask.kv_len, device=device)
        start = mask.start.to(device)[:, None]
        position = columns - start  # [B, columns]
        known = call.context.prompt_length if call.context is not None else None
        prompt = position >= 0
        if self.length is not None:
            prompt = prompt & (position < self.length)
        elif known is not None:
            prompt = prompt & (columns < known)
        if self.target == "prompt":
            return prompt.to(torch.int8)
        rows = self._rows(call, program.batch)
        bounds = torch.full((len(rows), max(1, max(map(len, rows))), 2), -1)
        for row, spans in enumerate(rows):
            if spans:
                bounds[row, : len(spans)] = torch.tensor(spans)
        bounds = bounds.to(device)
        at = position[..., None]
        inside = ((at >= bounds[:, None, :, 0]) & (at < bounds[:, None, :, 1])).any(-1)
        has_spans = torch.tensor([bool(spans) for spans in rows], device=device)[:, None]
        chosen = inside if self.target == "span" else prompt & ~inside & has_spans
        return chosen.to(torch.int8)

    def edit(self, program: Program, call: Call) -> None:
        heads = call.heads
        if self._set is not None:
            own = self._set.of_layer(call.layer, program.num_heads, program.num_kv_heads)
            heads = own if heads is None else tuple(h for h in own if h in heads)
            if not heads:
                return
        classes = self._classes(program, call)
        if program.key_class is None or not torch.equal(
            program.key_class, classes
        ):  # heads with other options
            program.classify(classes)
        program.score_edits.append(ScoreEdit("add", math.log(self.alpha), 1, heads=heads))

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"alpha": 1.0, "marked": [[0, 2]]}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [
            {"marked": [[1, 4]], "alpha": 0.05, "length": 12},
            {"marked": [[0, 2], [5, 8]], "alpha": 5.0, "target": "span", "head_config": {0: [0, 1], 1: [3]}},
            {"alpha": 0.2, "target": "prompt", "length": 5},
        ]
