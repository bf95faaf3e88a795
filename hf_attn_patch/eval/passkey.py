"""`passkey`: a five-digit number is hidden in prose; can the model still say it at the end?

The classic needle test for the reach of attention (Mohtashami & Jaggi, arXiv 2305.16300). Filler is distinct real
sentences, not one sentence repeated, so that retrieval is the only way. The answer is generated greedily by
``model.generate`` with its KV cache: what is measured is the patched model as users run it, cache included.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .generation import Prompt, PromptTask, check_lengths
from .task import Metric

# "pass key" would be found in the filler too: it is the documentation of a programming language, full of keys. A
# number that is called secret is not, and the dense SmolLM2-135M then answers every item.
NEEDLE = "\n\nThe secret number is {key}. Remember it: the secret number is {key}.\n\n"
QUESTION = "\n\nThe secret number is"


@dataclass(frozen=True)
class Haystack:
    """One prompt. ids: int64 [1, n] with n just below `length`. depth: of the needle, 0 = start, 1 = end."""

    length: int
    depth: float
    key: str
    ids: Any


@dataclass
class Passkey(PromptTask):
    """Passkey retrieval.

    Attributes:
        lengths: prompt lengths in tokens. depths: positions of the needle as shares of the filler.
        max_new_tokens: tokens to generate; the answer is right if the key is the first number in them.
        batch_size: prompts per generate call.
    """

    lengths: tuple[int, ...] = (600, 1200, 2300, 4500)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
    max_new_tokens: int = 8
    batch_size: int = 1

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "find a number in long prose, through generate() and its KV cache"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "share", True, digits=2),)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"passkey: lengths={list(self.lengths)} must be at least 64 tokens each")
        if not self.depths or not all(0.0 <= d <= 1.0 for d in self.depths):
            raise ValueError(f"passkey: depths={list(self.depths)} must lie between 0 and 1")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"passkey: max_new_tokens={self.max_new_tokens} and batch_size={self.batch_size} must be at least 1"
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Prompt]:
        check_lengths(self.name, model, processor, self.lengths, self.max_new_tokens)
        return [
            Prompt(
                ids=tuple(h.ids[0].tolist()),
                expected=(h.key,),
                new=self.max_new_tokens,
                group=str(h.length),
                facts={"length": h.length, "depth": h.depth},
            )
            for h in self.haystacks(processor, seed)
        ]

    def haystacks(self, processor: Any, seed: int) -> list[Haystack]:
        """The prompts for a tokenizer alone, without asking whether a model has positions for them."""
        from ..testbed.prose import filler_sentences

        sentences = filler_sentences()
        spaced = [" " + s for s in sentences]  # as they stand in running text
        counts = [len(ids) for ids in processor(spaced, add_special_tokens=False)["input_ids"]]
        draw = random.Random(seed)
        return [
            self._haystack(processor, sentences, counts, length, depth, draw)
            for length in self.lengths
            for depth in self.depths
        ]

    def _haystack(
        self,
        processor: Any,
        sentences: Sequence[str],
        counts: Sequence[int],
        length: int,
        depth: float,
        draw: random.Random,
    ) -> Haystack:
        key = str(draw.randint(10000, 99999))
        needle = NEEDLE.format(key=key)
        room = length - len(processor.encode(needle)) - len(processor.encode(QUESTION))
        at = draw.randrange(len(sentences))
        filler: list[str] = []
        while room >= counts[at % len(sentences)]:  # in the order of the text, from a random place on, cyclic
            if len(filler) == len(sentences):
                raise ValueError(
                    f"passkey: the prose of this machine does not fill {length} tokens. Ask for less."
                )
            filler.append(sentences[at % len(sentences)])
            room -= counts[at % len(sentences)]
            at += 1
        cut = round(depth * len(filler))
        text = " ".join(filler[:cut]) + needle + " ".join(filler[cut:]) + QUESTION
        return Haystack(length, depth, key, processor(text, return_tensors="pt")["input_ids"])

    def grade(self, answer: str, prompt: Prompt) -> dict[str, float]:
        return {"accuracy": float(is_right(answer, prompt.expected[0]))}


def is_right(answer: str, key: str) -> bool:
    """True if the first run of digits in `answer` (commas ignored) is the key."""
    digits = ""
    for char in answer.replace(",", ""):
        if char.isdigit():
            digits += char
        elif digits:
            break
    return digits == key
