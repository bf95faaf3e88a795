"""`ruler`: synthetic long-context questions at any length: needles, variable tracking, common and frequent words.

Source: RULER, "What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654 (subtasks, counts
of needles, hops, word frequencies, answer lengths and the metric: READ). The score of an item is the share of expected
strings that the answer holds, upper and lower case alike.

Differs: texts are worded by us, the haystack is the prose of the testbed instead of essays and repeated noise, keys are
pairs of words; below 4k tokens the common words of `cwe` come less often than 30 times, as 300 words would not fit.
Numbers are comparable between methods here, and not with published tables. Without ``chat`` the prompt ends with the
beginning of the answer and the answer ends with its line; `length` counts the prompt, answer not included.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from .generation import Prompt, PromptTask, check_lengths, encode, fit
from .ruler_questions import SUBTASKS, Setting
from .task import Metric


@dataclass
class Ruler(PromptTask):
    """RULER-style questions.

    Attributes:
        lengths: prompt lengths in tokens. subtasks: some of niah_single, niah_multikey, niah_multivalue,
        niah_multiquery, vt, cwe, fwe. samples: items per subtask and length. max_new_tokens: tokens to generate,
        None = as the paper does per subtask (30 … 128). batch_size: prompts per generate call. chat: ask through the
        chat template instead of a completion.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    subtasks: tuple[str, ...] = tuple(SUBTASKS)
    samples: int = 10
    max_new_tokens: int | None = None
    batch_size: int = 1
    chat: bool = False

    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "needles, variable tracking, common and frequent words at any length (RULER)"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("recall", "share", True, digits=2),)

    def __post_init__(self) -> None:
        unknown = [t for t in self.subtasks if t not in SUBTASKS]
        if unknown or not self.subtasks:
            raise ValueError(f"ruler: subtasks={list(self.subtasks)}, choose among {', '.join(SUBTASKS)}")
        if not self.lengths:
            raise ValueError("ruler: lengths is empty")
        small = {
            k: v
            for k in ("samples", "max_new_tokens", "batch_size")
            if (v := getattr(self, k)) is not None and v < 1
        }
        if small:
            raise ValueError(f"ruler: {small} must be at least 1")

    def items(self, model: Any, processor: Any, seed: int) -> list[Prompt]:
        check_lengths(self.name, model, processor, self.lengths, max(map(self._new, self.subtasks)))
        return [
            self._prompt(processor, subtask, length, sample, seed)
            for subtask in self.subtasks
            for length in self.lengths
            for sample in range(self.samples)
        ]

    def _new(self, subtask: str) -> int:
        return self.max_new_tokens or SUBTASKS[subtask][1]

    def _prompt(self, processor: Any, subtask: str, length: int, sample: int, seed: int) -> Prompt:
        from ..testbed.prose import filler_sentences

        # a seed per item: the same question whatever else is asked for
        draw = random.Random(f"{seed}/{subtask}/{length}/{sample}")
        setting = Setting(draw, length, (sample + 0.5) / self.samples, filler_sentences())
        question = SUBTASKS[subtask][0](setting)
        tail = question.asked if self.chat else question.asked + question.opening

        def build(n: int) -> str:
            return question.build(n) + tail

        def size(text: str) -> int:
            return len(encode(processor, text, self.chat))

        try:
            n = fit(build, size, length, question.least, question.most)
        except ValueError as error:
            raise ValueError(f"ruler: length {length} is too short for {subtask}, it {error}") from error
        if n == question.most:
            raise ValueError(
                f"ruler: the prose of this machine does not fill {length} tokens for {subtask}. Ask for less."
            )
        facts = {"length": length, "subtask": subtask}
        return Prompt(
            ids=tuple(encode(processor, build(n), self.chat)),
            expected=tuple(question.expected),
            new=self._new(subtask),
            group=f"{subtask} {length}",
            facts=facts if question.depth is None else {**facts, "depth": question.depth},
            stop=None if self.chat else "\n",
        )

    def grade(self, answer: str, prompt: Prompt) -> dict[str, float]:
        return {"recall": found(answer, prompt.expected)}


def found(answer: str, expected: tuple[str, ...]) -> float:
    """Share of the `expected` strings that stand in `answer`, upper and lower case alike."""
    return sum(e.lower() in answer.lower() for e in expected) / len(expected)
