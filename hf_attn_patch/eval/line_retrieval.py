"""`line_retrieval`: many lines, each with a name and a number; which number stands in the line of that name?

Source: the lines task of LongEval (LongChat, lmsys.org/blog/2023-06-29-longchat; FastChat, Apache-2.0), and its use by
MoA (arXiv 2406.14909): 10 depth bins, greedy, at most 100 tokens, right if the last integer of the answer is the number
(READ; scoring checked against vectors of the original code). Harder than a passkey: every line looks like the needle.

Differs: the instructions are worded by us, so numbers are comparable between methods here and not with published ones.
Without ``chat`` the prompt ends in the middle of the answer and the answer ends with its line, because a base model
goes on with further lines and the *last* integer would then be a later one. With ``chat=true`` it is read whole.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .generation import Prompt, PromptTask, check_lengths, encode, fit
from .task import Metric
from .words import pairs

INTRODUCTION = "This is a record of lines. Every line has a name and a number, its REGISTER_CONTENT.\n\n"
LINE = "line {name}: REGISTER_CONTENT is <{number}>\n"
QUESTION = "\nThe record ends here. What is the REGISTER_CONTENT of line {name}? Answer with the number."
CONTINUED = (
    "\nThe record ends here. Question: what is the REGISTER_CONTENT of line {name}?\n"
    "Answer: line {name}: REGISTER_CONTENT is <"
)


@dataclass
class LineRetrieval(PromptTask):
    """Line retrieval.

    Attributes:
        lengths: prompt lengths in tokens. bins: the asked line is drawn from the first, second, … of so many equal
        parts of the record. repeats: items per length and bin. max_new_tokens: tokens to generate at most.
        batch_size: prompts per generate call. chat: ask through the chat template instead of a completion.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    bins: int = 10
    repeats: int = 1
    max_new_tokens: int = 100
    batch_size: int = 1
    chat: bool = False

    name: ClassVar[str] = "line_retrieval"
    summary: ClassVar[str] = "the number in the line of a given name (LongEval)"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "share", True, digits=2),)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("line_retrieval: lengths is empty")
        small = {
            k: v for k in ("bins", "repeats", "max_new_tokens", "batch_size") if (v := getattr(self, k)) < 1
        }
        if small:
            raise ValueError(f"line_retrieval: {small} must be at least 1")

    def items(self, model: Any, processor: Any, seed: int) -> list[Prompt]:
        check_lengths(self.name, model, processor, self.lengths, self.max_new_tokens)
        draw = random.Random(seed)
        return [
            self._prompt(processor, length, bin, draw)
            for length in self.lengths
            for bin in range(self.bins)
            for _ in range(self.repeats)
        ]

    def _prompt(self, processor: Any, length: int, bin: int, draw: random.Random) -> Prompt:
        names = pairs(length // 10 + self.bins, draw)  # a line is more than ten tokens with any tokenizer
        numbers = [draw.randint(1, 50000) for _ in names]
        where = draw.random()
        question = QUESTION if self.chat else CONTINUED

        def chosen(count: int) -> int:
            return min(int((bin + where) / self.bins * count), count - 1)

        def build(count: int) -> str:
            lines = "".join(LINE.format(name=n, number=v) for n, v in zip(names[:count], numbers))
            return INTRODUCTION + lines + question.format(name=names[chosen(count)])

        try:
            size = lambda text: len(encode(processor, text, self.chat))
            count = fit(build, size, length, self.bins, len(names))
        except ValueError as error:
            raise ValueError(f"line_retrieval: length {length} is too short, it {error}") from error
        return Prompt(
            ids=tuple(encode(processor, build(count), self.chat)),
            expected=(str(numbers[chosen(count)]),),
            new=self.max_new_tokens,
            group=str(length),
            facts={"length": length, "depth": (bin + 0.5) / self.bins, "lines": count},
            stop=None if self.chat else "\n",
        )

    def grade(self, answer: str, prompt: Prompt) -> dict[str, float]:
        return {"accuracy": float(last_integer(answer) == int(prompt.expected[0]))}


def last_integer(text: str) -> int:
    """The last run of decimal digits (of any script) as an integer, -1 if there is none; signs do not count."""
    runs = re.findall(r"\d+", text)
    return int(runs[-1]) if runs else -1
