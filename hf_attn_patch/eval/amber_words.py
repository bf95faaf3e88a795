"""What AMBER's generative part needs from outside: nouns of a caption (nltk) and likeness of words (spaCy vectors).

UNVERIFIED: neither the tagger's data nor the vectors could be had where this was written; the figures that follow from
nouns and likeness are checked (tests/golden/amber__generative_nouns.json).
"""

from __future__ import annotations

import functools
from typing import Any

VECTORS = "en_core_web_lg"
ALIKE = 0.8
NLTK_DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")


class Words:
    """Nouns and likeness, loaded once.

    Raises:
        ValueError: a package or its data are missing; the message names the commands.
    """

    def __init__(self) -> None:
        try:
            import spacy

            self._vectors: Any = spacy.load(VECTORS)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"amber: part=generative compares words by the vectors of spaCy's {VECTORS}, which is not here "
                f"({error}). pip install spacy && python -m spacy download {VECTORS}; or take part=discriminative, "
                "which needs none."
            ) from error
        try:
            import nltk

            self._nltk: Any = nltk
            self.nouns("a cat")
        except (ImportError, LookupError) as error:
            first = next((line for line in str(error).splitlines() if line.strip(" *")), "")
            raise ValueError(
                f"amber: part=generative finds nouns with nltk and its data ({', '.join(NLTK_DATA)}): {first.strip()} "
                f"pip install nltk && python -m nltk.downloader {' '.join(NLTK_DATA)}; or take part=discriminative."
            ) from error

    def nouns(self, text: str) -> list[str]:
        """Lemmas of the nouns of `text`, in order."""
        lemma = self._nltk.stem.WordNetLemmatizer().lemmatize
        tagged = self._nltk.pos_tag(self._nltk.word_tokenize(text))
        return [lemma(word) for word, tag in tagged if tag.startswith("NN")]

    def alike(self, first: str, second: str) -> bool:
        """Whether the cosine of the vectors of two words is above 0.8."""
        return float(self._vector(first).similarity(self._vector(second))) > ALIKE

    @functools.lru_cache(maxsize=20_000)  # noqa: B019  (one object per run, and it lives as long)
    def _vector(self, word: str) -> Any:
        return self._vectors(word)
