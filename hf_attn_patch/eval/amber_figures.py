"""AMBER's figures as its script computes and rounds them.

Source: Wang et al., "AMBER", arXiv 2311.07397; junyangwang0410/AMBER inference.py (Apache-2.0), READ, figures RAN
(tests/golden/amber__*.json). All in percent with one decimal. Denominators start at 0.001 (three times that for the
attribute group), and F1 is made of P and R that are rounded already: figures of few items differ from plain ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

START = 0.001
ATTRIBUTES = ("state", "number", "action")


def kind(name: str) -> str:
    """existence, state, number, action or relation, from AMBER's name of a type of question.

    Raises:
        ValueError: it is none of them.
    """
    last = name.rsplit("-", 1)[-1]
    known = {"hallucination": "existence", **{k: k for k in (*ATTRIBUTES, "relation", "existence")}}
    if last not in known:
        raise ValueError(f"amber: no type of question is called {name!r}")
    return known[last]


def normalised(answer: str) -> str:
    """Yes or No for answers that start with it in any case, else the answer as it is."""
    said = answer.strip().lower()
    return next((word.capitalize() for word in ("yes", "no") if said.startswith(word)), answer)


def discriminative(
    kinds: Sequence[str], truths: Sequence[str], answers: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Group -> accuracy, precision, recall, f1 in percent; precision and recall are those of the answer "No".

    Groups: all, attribute, and each kind that occurs. truths: yes or no. answers: exactly "Yes" or "No", anything else
    is wrong and answers nothing; `normalised` brings answers to this form.
    """
    groups = {"all": None, "existence": ("existence",), "attribute": ATTRIBUTES} | {
        k: (k,) for k in (*ATTRIBUTES, "relation")
    }
    rows = list(zip(kinds, truths, answers))
    out = {}
    for group, members in groups.items():
        mine = [r for r in rows if members is None or r[0] in members]
        if not mine:
            continue
        start = START * (3 if group == "attribute" else 1)
        right = sum(a == t.capitalize() for _, t, a in mine)
        said = sum(a == "No" for _, _, a in mine)
        there = sum(t == "no" for _, t, _ in mine)
        found = sum(a == "No" and t == "no" for _, t, a in mine)
        accuracy, precision, recall = (
            _percent(n / (d + start)) for n, d in ((right, len(mine)), (found, said), (found, there))
        )
        small = 1e-3 if group == "existence" else 1e-4
        p, r = precision / 100, recall / 100
        f1 = _percent(2 * p * r / (p + r + small))
        out[group] = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return out


def generative_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    association: Mapping[str, Sequence[str]],
    safe: Collection[str],
    similar: Callable[[str, str], bool],
) -> dict[str, float]:
    """Numbers of one caption: bad, kept (nouns); covered, there (objects); hal (0 or 1); imagined, imaginable.

    Each noun covers the first object that it names, or else the first it is similar to; a noun like an object of
    `hallu` counts as imagined even if it is similar to one of `truth`.

    Args:
        nouns: lemmas of the nouns of a caption. truth, hallu: objects of the image, and such as models like to imagine.
        association: object -> words that name it. safe: words that are never wrong. similar: of two different words.
    """
    vocabulary = set(association) | {w for words in association.values() for w in words}
    kept = [n for n in nouns if n in vocabulary]
    right, wrong = _names(truth, association), _names(hallu, association)
    bad, covered, imagined = 0, set[int](), set[int]()
    for noun in kept:
        if noun in safe:
            continue
        exact = [i for word, i in right if word == noun]
        if exact:
            covered.add(exact[0])
            continue
        imagined.update([i for word, i in wrong if word == noun][:1])
        imagined.update([i for word, i in wrong if word == noun or similar(noun, word)][:1])
        near = [i for word, i in right if similar(noun, word)]
        covered.update(near[:1])
        bad += not near
    return {
        "bad": float(bad),
        "kept": float(len(kept)),
        "covered": float(len(covered)),
        "there": float(len(truth)),
        "hal": float(bad > 0),
        "imagined": float(len(imagined)),
        "imaginable": float(len(hallu)),
    }


def generative(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """chair, cover, hal, cog in percent from `generative_counts` of every caption."""
    total = {k: sum(row[k] for row in rows) for k in rows[0]}
    pairs: dict[str, Any] = {
        "chair": (total["bad"], total["kept"]),
        "cover": (total["covered"], total["there"]),
        "hal": (total["hal"], len(rows)),
        "cog": (total["imagined"], total["imaginable"]),
    }
    return {name: _percent(n / (d + START)) for name, (n, d) in pairs.items()}


def _names(things: Sequence[str], association: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(word, number of the thing it names), in the order in which the first match is looked for."""
    associated = [(word, i) for i, thing in enumerate(things) for word in association.get(thing, ())]
    return [*associated, *((thing, i) for i, thing in enumerate(things))]


def _percent(share: float) -> float:
    return round(100 * share, 1)
