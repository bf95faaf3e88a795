"""Real English prose that is already on disk: CPython's language reference and scikit-learn's dataset descriptions.

`pydoc_data.topics` comes with every CPython and the `.rst` files with every scikit-learn, so text for perplexity and
haystacks costs no download. The text depends on the versions of both: a number measured on it is comparable on one
machine, between methods, and not with numbers of WikiText.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path


def prose(n_chars: int, offset: int = 0) -> str:
    """`n_chars` characters of clean paragraphs, starting `offset` characters in; the same at every call.

    Raises:
        ValueError: fewer characters are available.
    """
    text = _text()
    if n_chars < 0 or offset < 0 or offset + n_chars > len(text):
        raise ValueError(
            f"prose: asked for {n_chars} characters from {offset}, this machine has {len(text)}. Ask for fewer."
        )
    return text[offset : offset + n_chars]


@functools.cache
def filler_sentences() -> tuple[str, ...]:
    """Distinct sentences of 40 to 200 characters in the order of the text, as filler for retrieval tests."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", _text())
    return tuple(dict.fromkeys(s for s in sentences if 40 <= len(s) <= 200 and "\n" not in s))


@functools.cache
def _text() -> str:
    paragraphs = [p for source in (_pydoc_topics(), _sklearn_descriptions()) for p in _paragraphs(source)]
    return "\n\n".join(dict.fromkeys(paragraphs))


def _pydoc_topics() -> str:
    from pydoc_data.topics import topics

    # longest first: the long topics are chapters with connected prose, the short ones are stubs
    return "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: (-len(topics[name]), name)))


def _sklearn_descriptions() -> str:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        return ""
    folder = Path(spec.origin).parent / "datasets" / "descr"
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))


def _paragraphs(source: str) -> list[str]:
    """Paragraphs that read as prose: no code, tables, lists of names, or headings; inline markup removed."""
    kept = []
    for block in re.split(r"\n\s*\n", source):
        lines = block.strip("\n").splitlines()
        if not lines or min(len(line) - len(line.lstrip()) for line in lines) > 3:
            continue  # code samples are indented by 3 or more in the topics, by 4 in the .rst files
        text = " ".join(line.strip() for line in lines)
        text = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
        text = re.sub(r"`([^`<]*?)(?:\s*<[^`]*>)?`__?", r"\1", text)
        text = re.sub(r"``?|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", text)
        text = re.sub(r"\s+", " ", text).strip()
        words = re.findall(r"[A-Za-z]{2,}", text)
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(words) < 12 or letters < 0.85 * len(text) or not text[0].isupper() or text[-1] not in ".!?":
            continue
        if "::" in text or "-->" in text or ">>>" in text or "|" in text or "==" in text:
            continue
        kept.append(text)
    return kept
