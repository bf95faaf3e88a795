"""Texts for training: a text file, JSON lines, a hub data set or the testbed's prose -> token ids and labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import need

HELD_OUT = 40_000  # characters of the testbed's prose that `eval perplexity` reads, and training does not
IGNORED = -100


def examples(source: str, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Examples ``{"input_ids": [...], "labels": [...]}`` of at most `length` tokens.

    Texts are joined by the end token and cut into pieces of `length`; the rest is dropped. A prompt with its answer is
    an example of its own, with labels on the answer only; a prompt that is too long loses its beginning.

    Args:
        source: ``testbed:prose``; a ``.jsonl`` file whose lines hold "text", or "prompt" and "answer"; any other file
            is read as text; ``name``, ``name:split`` or ``name@config:split`` of a hub data set with such fields.
        tokenizer: of the model.

    Raises:
        ConfigError: nothing is there, a line has no text or no answer, or there are fewer tokens than one example.
    """
    if length < 2:
        raise ConfigError(f"length={length} tokens, expected at least 2")
    rows = _rows(source)
    found: list[dict[str, list[int]]] = []
    stream: list[int] = []
    for where, row in rows:
        if isinstance(row.get("text"), str):
            ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            stream += ids + _end(tokenizer)
        elif (
            isinstance(row.get("prompt"), str)
            and isinstance(row.get("answer"), str)
            and row["answer"].strip()
        ):
            found.append(_answer(tokenizer, row["prompt"], row["answer"], length))
        else:
            raise ConfigError(
                f'{where} has no training target: expected "text", or "prompt" and a non-empty "answer"; found '
                f"{', '.join(map(repr, row)) or 'nothing'}"
            )
    for start in range(0, len(stream) - length + 1, length):
        piece = stream[start : start + length]
        found.append({"input_ids": piece, "labels": list(piece)})
    if not found:
        raise ConfigError(f"{source} has {len(stream)} tokens, fewer than one example of length={length}")
    return found


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _answer(tokenizer: Any, prompt: str, answer: str, length: int) -> dict[str, list[int]]:
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = (tokenizer(answer, add_special_tokens=False)["input_ids"] + _end(tokenizer))[: length - 1]
    asked = asked[max(len(asked) + len(said) - length, 0) :]
    return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a source."""
    if source == "testbed:prose":
        from ..testbed import prose

        yield source, {"text": prose.prose(len(prose._text()) - HELD_OUT, HELD_OUT)}
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield from (
            _lines(path) if path.suffix in (".jsonl", ".json") else [(source, {"text": path.read_text()})]
        )
        return
    if path.suffix in (".txt", ".jsonl", ".json", ".md") or source.startswith((".", "/", "~")):
        raise ConfigError(f"data {source!r}: no such file")
    yield from ((f"{source} row {n}", row) for n, row in enumerate(_hub(source)))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is no JSON ({error}); expected one object per line") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where} holds a {type(row).__name__}, expected an object")
        yield where, row


def _hub(source: str) -> Iterable[dict[str, Any]]:
    datasets = need("datasets", "eval")
    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # offline, unknown name, unknown split: each has its own error class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data {source!r} is no file here, and the hub gives no data set: {first}"
        ) from error


class Collate:
    """Right-pads a list of examples to a batch: ids, attention mask, labels (IGNORED on padding), int64 [B, L]."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = lambda key, value: torch.tensor(
            [row[key] + [value] * (longest - len(row[key])) for row in rows]
        )
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": fill("input_ids", self.pad),
            "attention_mask": torch.tensor(mask),
            "labels": fill("labels", IGNORED),
        }
