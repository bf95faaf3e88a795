"""`perplexity`: how well a language model predicts the next token of English prose.

The text is cut into contexts of `context` tokens. With a `stride` smaller than the context, contexts overlap and only
the tokens that no earlier context has predicted are counted (the *sliding window* of the transformers guide on
perplexity), so that every counted token but the first ones has a long past. Items are runs of `chunk` counted tokens:
neighbouring tokens are not independent, so intervals resample runs and not tokens. An item's score is its mean
negative log-likelihood in nats; the aggregate is exp of the token-weighted mean, that is the corpus perplexity.

With ``answers=FILE`` only the tokens of answers count: the perplexity of a model's or a writer's replies, given their
prompts (what MoA, arXiv 2406.14909, measures on long questions). There an item is one whole answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .task import Metric, Scores, Task, Tick, require_language_model

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on prose


@dataclass(frozen=True)
class Chunk:
    """Tokens first … last - 1 of the text, predicted inside the context [start, end)."""

    start: int
    end: int
    first: int
    last: int


@dataclass
class Perplexity(Task):
    """Perplexity of prose.

    Attributes:
        tokens: how many tokens of text. context: tokens a forward sees. stride: new tokens per context, None =
        context (no overlap). chunk: counted tokens per item. text: a text file to use instead of the prose that comes
        with Python and scikit-learn. answers: a JSONL file with the fields ``prompt`` and ``answer`` per line instead;
        only answer tokens count, `tokens`, `stride` and `chunk` are not used, `context` is the most tokens of a line.
    """

    tokens: int = 2048
    context: int = 2048
    stride: int | None = None
    chunk: int = 64
    text: str | None = None
    answers: str | None = None

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity of English prose (language models)"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("perplexity", "ppl", False, "exp_mean", digits=2),)

    def __post_init__(self) -> None:
        stride = self.context if self.stride is None else self.stride
        if self.context < 2 or self.tokens < 2 or self.chunk < 1:
            raise ValueError(
                f"perplexity: tokens={self.tokens} and context={self.context} must be at least 2, "
                f"chunk={self.chunk} at least 1"
            )
        if not 1 <= stride <= self.context:
            raise ValueError(f"perplexity: stride={self.stride} must be between 1 and context={self.context}")

        if self.text is not None and self.answers is not None:
            raise ValueError(f"perplexity: text={self.text!r} and answers={self.answers!r}: give one of them")

    def items(self, model: Any, processor: Any, seed: int) -> list[Chunk]:
        require_language_model(self.name, model, processor)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.context > limit:
            raise ValueError(
                f"perplexity: context={self.context}, the model has {limit} positions. Ask for at most {limit}."
            )
        if self.answers is not None:
            return self._replies(processor)
        self._ids = self._tokens(processor)
        chunks, done, stride = [], 0, self.stride or self.context
        for start in range(0, self.tokens, stride):
            end = min(start + self.context, self.tokens)
            if end <= done:
                break
            # the first token of a context has no past to be predicted from
            for first in range(max(done, start + 1), end, self.chunk):
                chunks.append(Chunk(start, end, first, min(first + self.chunk, end)))
            done = end
        return chunks

    def score(self, model: Any, processor: Any, items: list[Chunk], reference: Any, tick: Tick) -> Scores:
        import torch

        scores: list[float] = []
        nll: Any = None
        held: tuple[int, int] | None = None
        with torch.inference_mode():
            for item in items:
                if held != (item.start, item.end):
                    held = (item.start, item.end)
                    nll = token_nll(model, self._ids[:, item.start : item.end])
                # nll[i] belongs to token start + 1 + i
                offset = item.start + 1
                scores.append(float(nll[item.first - offset : item.last - offset].mean()))
                tick(1)
        return {"perplexity": scores}

    def batches(self, items: list[Chunk]) -> list[list[int]]:
        """One context each: its chunks come from one forward."""
        runs: dict[tuple[int, int], list[int]] = {}
        for i, item in enumerate(items):
            runs.setdefault((item.start, item.end), []).append(i)
        return list(runs.values())

    def weights(self, items: list[Chunk]) -> list[float]:
        return [float(item.last - item.first) for item in items]

    def _replies(self, processor: Any) -> list[Chunk]:
        """One chunk per line of the file: its answer, in the context of its prompt."""
        import torch

        ids: list[int] = []
        chunks = []
        for number, prompt, answer in read_replies(str(self.answers)):
            asked = list(processor(prompt)["input_ids"])
            said = list(processor(answer, add_special_tokens=False)["input_ids"])
            where = f"perplexity: {self.answers}, line {number}"
            if not asked or not said:
                raise ValueError(f"{where}: the {'answer' if asked else 'prompt'} has no tokens")
            if len(asked) + len(said) > self.context:
                raise ValueError(
                    f"{where} has {len(asked) + len(said)} tokens, context={self.context}. Ask for a larger context."
                )
            start = len(ids)
            ids += asked + said
            chunks.append(Chunk(start, len(ids), start + len(asked), len(ids)))
        self._ids = torch.tensor([ids])
        return chunks

    def _tokens(self, processor: Any) -> Any:
        """int64 [1, tokens]."""
        if self.text is not None:
            path = Path(self.text)
            if not path.is_file():
                raise ValueError(f"perplexity: text={self.text!r} is not a file")
            text = path.read_text(encoding="utf-8")
        else:
            text = longest_prose(self.tokens * CHARACTERS_PER_TOKEN)
        ids = processor(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.shape[1] < self.tokens:
            raise ValueError(
                f"perplexity: asked for {self.tokens} tokens, the text has {ids.shape[1]}. "
                "Ask for fewer, or give a longer file with text=PATH."
            )
        return ids[:, : self.tokens]


def read_replies(path: str) -> list[tuple[int, str, str]]:
    """(line number, prompt, answer) of each line of a JSONL file that is not empty.

    Raises:
        ValueError: no such file, no line, or a line that is not an object with the texts ``prompt`` and ``answer``.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"perplexity: answers={path!r} is not a file")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'perplexity: {path}, line {number} is not {{"prompt": …, "answer": …}}: {line[:80]!r}'
            ) from error
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError(f"perplexity: {path}, line {number}: prompt and answer must be texts")
        found.append((number, prompt, answer))
    if not found:
        raise ValueError(f"perplexity: {path} has no lines")
    return found


def longest_prose(characters: int) -> str:
    """At most `characters` characters of the testbed's prose."""
    from ..testbed import prose

    try:
        return prose.prose(characters)
    except ValueError:
        available = len(prose._text())
        return prose.prose(min(characters, available))


def token_nll(model: Any, ids: Any, rows: int = 256) -> Any:
    """Negative log-likelihood of each token but the first: ids int64 [1, n] -> float32 [n - 1], in nats."""
    import torch

    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    target = ids[0, 1:]
    parts = [  # in pieces: a float32 copy of all logits would be the largest tensor of the run
        torch.nn.functional.cross_entropy(
            logits[i : i + rows].float(), target[i : i + rows], reduction="none"
        )
        for i in range(0, len(target), rows)
    ]
    return torch.cat(parts)
