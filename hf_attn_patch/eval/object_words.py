"""Objects named in a caption: a table of synonyms, words of one or more tokens, plurals; no tagger, no downloads.

Source: CHAIR, arXiv 1809.02156, LisaAnne/Hallucination (READ), and its nltk variant in OPERA and PAI (READ; RAN, see
tests/golden/chair__*.json). Both make a lemma of every token and look it up. Here a token is looked up as it stands,
then with the endings of plurals taken off, and a few activities ("skiing") count as their object: a word that is in
the table needs no dictionary.

"men" is no object, though "man", "women" and "policemen" are: WordNet has a noun "men" (a work force), so the lemma of
the nltk variant, which papers since 2023 report, is not "man" (RAN: none of the recorded captions counts it). The 2018
original (pattern) counts it; a table of your own may name "men".

Differs: no part of speech, so a verb spelled like an object ("it can bear") is one, as in the 2018 original. On the
golden captions all totals agree; tests/test_eval_vlm.py has the share of captions whose words are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.IGNORECASE)
IRREGULAR = {
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "wives": "wife",
    "teeth": "tooth",
    "feet": "foot",
}
# ending -> what may stand there instead; the first result that is in the table is taken
ENDINGS = (
    ("ies", ("y", "ie")),
    ("ves", ("fe", "f")),
    ("men", ("man",)),
    ("es", ("", "e")),
    ("s", ("",)),
)
# What is done with an object and named after it. No rule for -ing: without a tagger "caring", "training", "bowling" and
# "booking" would be a car, a train, a bowl and a book.
ACTIVITIES = {
    "skateboarding": "skateboard",
    "snowboarding": "snowboard",
    "surfboarding": "surfboard",
    "skiing": "ski",
    "biking": "bike",
    "bicycling": "bicycle",
    "motorcycling": "motorcycle",
}


@dataclass(frozen=True)
class Mention:
    """One object named in a text: the canonical name, and the characters start:end."""

    name: str
    start: int
    end: int


@dataclass
class ObjectWords:
    """A table of objects.

    names: word (one token or several, with blanks) -> canonical name. joined: words of several tokens -> the word they
    count as; None = every word of `names` with a blank stands for itself. dropped: word -> the object beside which it
    is not counted, see `coco`.
    """

    names: dict[str, str]
    joined: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str = "synonyms") -> ObjectWords:
        """From ``{canonical: [synonyms]}``, or an object with such a table as "synonyms" and, if wanted, "joined"
        (words of two tokens -> what they count as; default: all words of several tokens) and "dropped".

        Raises:
            ValueError: not such a table, or one word for two objects.
        """
        rows = table.get("synonyms", table) if isinstance(table, Mapping) else None
        if not isinstance(rows, Mapping) or not all(
            isinstance(v, (list, tuple)) and all(isinstance(w, str) for w in v) for v in rows.values()
        ):
            raise ValueError(f"{where} must be a table {{object: [synonyms]}}")
        names: dict[str, str] = {}
        for name, words in rows.items():
            for word in (name, *words):
                if names.setdefault(word, name) != name and "joined" not in table:
                    raise ValueError(
                        f"{where}: {word!r} stands for {names[word]!r} and for {name!r}. Keep it in one of the two."
                    )
                names[word] = name  # the published table has such words; the later line counts there
        joined = table.get("joined") if "joined" in table else {w: w for w in names if " " in w}
        return cls(names, dict(joined or {}), dict(table.get("dropped") or {}))

    @classmethod
    def coco(cls) -> ObjectWords:
        """The 80 objects of COCO, with the published words, pairs of words and their quirks ("motor bike" and
        "cheesecake" never count; a seat beside a toilet is no chair)."""
        text = resources.files(__package__).joinpath("coco_synonyms.json").read_text(encoding="utf-8")
        return cls.of(json.loads(text))

    @classmethod
    def load(cls, source: str) -> ObjectWords:
        """``coco``, or a JSON file as `of` takes it.

        Raises:
            ValueError: no such file, or not a table.
        """
        if source == "coco":
            return cls.coco()
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"synonyms={source!r} is neither coco nor a JSON file {{object: [synonyms]}}")
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")), str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"synonyms={source!r} is no JSON: {error}") from error

    def canonical(self, word: str) -> str | None:
        """The object a word stands for, in singular or plural; None if it is none."""
        found = self._lemma(word.lower())
        return self.names.get(self.joined.get(found, found))

    def mentions(self, text: str) -> list[Mention]:
        """Every object named in `text`, in order; each mention counts."""
        words = list(self._words(text))
        lemmas = {word for word, _, _ in words}
        return [
            Mention(self.names[word], start, end)
            for word, start, end in words
            if word in self.names and not self._beside(word, lemmas)
        ]

    def _beside(self, word: str, lemmas: set[str]) -> bool:
        return word in self.dropped and self.dropped[word] in lemmas

    def _words(self, text: str) -> Iterator[tuple[str, int, int]]:
        """(word, start, end) with words of several tokens joined; the longest that fits is taken."""
        tokens = [(self._lemma(m.group().lower()), m.start(), m.end()) for m in TOKEN.finditer(text)]
        longest = max((w.count(" ") + 1 for w in self.joined), default=1)
        i = 0
        while i < len(tokens):
            for size in range(min(longest, len(tokens) - i), 0, -1):
                group = tokens[i : i + size]
                word = " ".join(t[0] for t in group)
                last = self._lemma(word) if size > 1 else word
                if size == 1 or last in self.joined:
                    yield self.joined.get(last, last), group[0][1], group[-1][2]
                    i += size
                    break

    def _lemma(self, word: str) -> str:
        """`word`, or the first of its shorter forms that is an object or a part of one."""
        if self._known(word):
            return word
        for table in (IRREGULAR, ACTIVITIES):
            if word in table and self._known(table[word]):
                return table[word]
        for ending, instead in ENDINGS:
            if word.endswith(ending) and len(word) > len(ending) + 1:
                for new in instead:
                    shorter = word[: len(word) - len(ending)] + new
                    if self._known(shorter):
                        return shorter
        return word

    def _known(self, word: str) -> bool:
        return word in self.names or word in self.joined or word in self._parts

    @property
    def _parts(self) -> set[str]:
        parts = self.__dict__.get("_parts_of_words")
        if parts is None:
            parts = {token for word in self.joined for token in word.split()}
            self.__dict__["_parts_of_words"] = parts
        return parts


def words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return TOKEN.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Sentences of a text, as lists of words joined by blanks; only those that have words."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [s for s in (" ".join(words(part)) for part in parts) if s]


def duplicate_share(text: str) -> float:
    """Share of sentences that were said before in the same text; 0 without sentences."""
    said = sentences(text)
    return 1 - len(set(said)) / len(said) if said else 0.0


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
