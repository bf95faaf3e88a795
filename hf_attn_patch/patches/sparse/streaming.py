"""`streaming`: attention sinks + sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...call.rules import SinkWindow
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...forward.running import Running
    from ...install.stack import Call


@register_patch("streaming")
@dataclass
class Streaming(Patch):
    """Attention sinks + sliding window; the KV cache stays at sinks + window tokens.

    Source: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453 (mit-han-lab/streaming-llm;
    mask checked against mit-han-lab/duo-attention, READ and RAN).

    Formula: query i reads key j iff ``j <= i and (j < sinks or i - j < window)``; bidirectional layers read
    ``|i - j| < window``. Positions count from the first real token of each row, so left padding moves nothing.

    Neutral value: ``window >= sequence length``.

    Differs from the original code: positions stay absolute (the original re-numbers the kept tokens inside the
    cache, "pos_shift", to run past the trained length; not offered here). The window counts the query itself;
    the original perplexity script evicts *after* each step, so that a query there sees one key more: use
    ``window=recent + 1`` to get its numbers. A chunk of n tokens after the prompt: here every query has a window of
    its own, as if the tokens came one by one; the original's ``evict_for_space(n)`` cuts the cache once, before the
    chunk, to ``window - n`` recent tokens, so that the first query of a chunk reads n - 1 keys fewer than here (and one
    of n >= window nothing before the chunk but the sinks); for n = 1 the two agree. The prefill is masked
    too (in the original only the cache is cut).
    """

    counts = "rule"
    steady = True
    paper = "Efficient Streaming Language Models with Attention Sinks"
    arxiv = "2309.17453"
    head_state = ()
    parts = ("text", "encoder", "decoder", "audio")
    default_part = "text"
    needs = ()
    frees_cache = True

    sinks: int = option(4, help="first tokens of each row that stay visible (0 = plain sliding window)")
    window: int = option(256, help="most recent tokens that are visible, the query's own included")

    def validate(self) -> None:
        self.require(self.sinks >= 0, "sinks", ">= 0")
        self.require(self.window >= 1, "window", ">= 1 (a window counts the query's own key)")

    def edit(self, program: Program, call: Call) -> None:
        program.restrict(SinkWindow(self.sinks, self.window), call.heads)

    def spans(self, facts: dict[str, Any], context: Running | None) -> list[tuple[int, int]] | None:
        return [(self.sinks, self.window)] * facts["num_kv_heads"]

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"window": 1 << 20}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [{"sinks": 2, "window": 5}, {"sinks": 0, "window": 3}, {"sinks": 9, "window": 1}]
