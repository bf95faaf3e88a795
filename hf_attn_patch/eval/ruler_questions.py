"""The questions of `ruler`: each subtask as a text that grows with one number, and the strings of its right answer."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .words import coined, pairs, vocabulary


@dataclass(frozen=True)
class Question:
    """build(n): the text with n units of filling (sentences or words), without the answer's beginning.

    asked: the question, last in the text. opening: how the answer begins, for a model that continues text.
    expected: strings of the right answer. least, most: bounds of n. depth: of what is asked, 0 … 1.
    """

    build: Callable[[int], str]
    asked: str
    opening: str
    expected: Sequence[str]
    least: int
    most: int
    depth: float | None = None


@dataclass(frozen=True)
class Setting:
    """What a subtask may use. share: of the item among its group, 0 … 1: the depth of a single needle."""

    draw: random.Random
    length: int
    share: float
    sentences: Sequence[str]


HIDDEN = "Some access numbers are hidden in the following text. Remember them.\n\n"
NEEDLE = "The access number of {key} is {value}."


def niah_single(s: Setting) -> Question:
    """One key, one value."""
    return _needles(s, keys=1, values=1, asked=1)


def niah_multikey(s: Setting) -> Question:
    """Four keys, one of them asked: the others look like it."""
    return _needles(s, keys=4, values=1, asked=1)


def niah_multivalue(s: Setting) -> Question:
    """One key with four values, all asked."""
    return _needles(s, keys=1, values=4, asked=1)


def niah_multiquery(s: Setting) -> Question:
    """Four keys, all asked."""
    return _needles(s, keys=4, values=1, asked=4)


def vt(s: Setting, hops: int = 4) -> Question:
    """Variable tracking: one variable gets a number, each of `hops` others is set to the one before; name them all."""

    def chain() -> tuple[str, list[str], list[str]]:
        value = str(s.draw.randint(10000, 99999))
        names = ["".join(s.draw.choices(string.ascii_uppercase, k=5)) for _ in range(hops + 1)]
        lines = [f"VAR {names[0]} = {value}."]
        return value, names, lines + [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:])]

    def question(value: str) -> str:
        return f"\n\nQuestion: find all variables that hold the value {value}, directly or through other variables.\n"

    shown, known, example = chain()
    opening = "Answer: the variables that hold {} are".format
    head = f"{' '.join(example)}{question(shown)}{opening(shown)} {', '.join(known)}.\n\n"
    value, names, lines = chain()
    spread, start = sorted(s.draw.random() for _ in lines), _start(s)
    return Question(
        lambda n: head + _spread(s.sentences, start, n, list(zip(spread, lines))),
        question(value), opening(value), names, len(lines), len(s.sentences),
    )  # fmt: skip


def cwe(s: Setting, common: int = 10) -> Question:
    """Common words: ten words of a numbered list come 30 times each, the others 3 times; name the ten."""
    often, seldom = _frequencies(s.length)
    pool = list(vocabulary())
    s.draw.shuffle(pool)
    order = s.draw.random()

    def listed(top: list[str], rest: list[str], often: int, seldom: int) -> str:
        words = top * often + rest * seldom
        random.Random(order).shuffle(words)
        return "Below is a numbered list of words. Some come more often than others.\n" + " ".join(
            f"{i}. {w}" for i, w in enumerate(words, 1)
        )

    question = f"\nQuestion: what are the {common} most common words in the list above?\n"
    opening = f"Answer: the {common} most common words are:"
    top, known, others = pool[:common], pool[common : 2 * common], pool[2 * common : 2 * common + 10]
    example = f"{listed(known, others, 3, 1)}{question}{opening} {', '.join(known)}.\n\n"
    rest = pool[2 * common + 10 :]
    return Question(
        lambda n: example + listed(top, rest[:n], often, seldom),
        question, opening, top, 1, len(rest),
    )  # fmt: skip


def fwe(s: Setting, asked: int = 3, alpha: float = 2.0) -> Question:
    """Frequent words: coined words with frequencies 1 / rank^alpha, the first rank blotted out; name the next three."""
    size = max(s.length // 50, asked + 3)
    words = coined(size, s.draw)
    total = sum(rank**-alpha for rank in range(1, size + 1))
    seed = s.draw.random()

    def build(n: int) -> str:
        text = []
        for rank, word in enumerate(words, 1):
            count = max(round(n * rank**-alpha / total), 1)
            text += ["..."] * count if rank == 1 else [word] * count
        random.Random(seed).shuffle(text)
        return "Read this coded text. Dots are unreadable words, leave them out.\n\n" + " ".join(text)

    question = f"\n\nQuestion: what are the {asked} most frequent coded words in the text above?\n"
    opening = f"Answer: the {asked} most frequent words are:"
    expected = words[1 : 1 + asked]
    return Question(build, question, opening, expected, 60, s.length)


SUBTASKS: dict[str, tuple[Callable[[Setting], Question], int]] = {  # name -> (question, tokens of an answer)
    "niah_single": (niah_single, 128),
    "niah_multikey": (niah_multikey, 128),
    "niah_multivalue": (niah_multivalue, 128),
    "niah_multiquery": (niah_multiquery, 128),
    "vt": (vt, 30),
    "cwe": (cwe, 120),
    "fwe": (fwe, 50),
}


def _needles(s: Setting, keys: int, values: int, asked: int) -> Question:
    names = pairs(keys, s.draw)
    numbers = {k: [str(s.draw.randint(1_000_000, 9_999_999)) for _ in range(values)] for k in names}
    wanted = names[:asked]
    one = keys * values == 1 or asked * values == 1
    placed = [
        (s.share if one and k in wanted else s.draw.random(), NEEDLE.format(key=k, value=v))
        for k in names
        for v in numbers[k]
    ]
    start = _start(s)
    who = ", ".join(wanted)
    question = (
        f"\n\nQuestion: what {'is' if one else 'are all'} the access number{'' if one else 's'} of {who}?\n"
    )
    opening = f"Answer: the access number{'' if one else 's'} of {who} {'is' if one else 'are'}"
    expected = [v for k in wanted for v in numbers[k]]
    return Question(
        lambda n: HIDDEN + _spread(s.sentences, start, n, placed),
        question, opening, expected, len(placed), len(s.sentences), s.share if one else None,
    )  # fmt: skip


def _start(s: Setting) -> int:
    return s.draw.randrange(len(s.sentences))


def _spread(sentences: Sequence[str], start: int, count: int, needles: list[tuple[float, str]]) -> str:
    """`count` sentences from `start` on, cyclic, with each (depth, text) put in at its depth."""
    text: list[str] = [sentences[(start + i) % len(sentences)] for i in range(count)]
    for depth, needle in sorted(needles, reverse=True):  # from the end: earlier places stay where they are
        text.insert(round(depth * count), needle)
    return " ".join(text)


def _frequencies(length: int) -> tuple[int, int]:
    """How often common and other words come: 30 and 3 from 4k on, fewer where 300 words do not fit."""
    return (30, 3) if length >= 4096 else (max(length // 250, 4), 1)
