"""Yes or no: what published evaluations take for an answer, and the counts their figures are made of.

Each parser maps (answer, label) to "yes", "no" or None (neither). They differ on odd strings only, and by up to the
whole score there: "Yes." is wrong for lmms-eval. Rules READ in the sources and checked on RAN answers (tests/golden):

- ``official``: RUCAIBox/POPE evaluate.py. Cut at the first ".", drop ",", split on blanks; "no" if one of the words is
  No, not or no, else "yes", so anything that is not a no is a yes.
- ``pai``: LALBJ/PAI pope_ans.py, the same in shikiw/OPERA. Drop "." and ","; "no" also for NO and for words in n't.
- ``vcd``: DAMO-NLP-SG/VCD eval_pope.py. Lower case; right if the label is a substring of the answer, so that "not",
  "know" and "another" are a no. It reads the label: the answer counts as the other one if the label is not in it.
- ``lmms``: lmms-eval. Lower case and strip; exactly "yes" or "no", everything else is neither and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .task import Metric

Parser = Callable[[str, str], "str | None"]


def official(answer: str, label: str) -> str | None:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pai(answer: str, label: str) -> str | None:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return "no" if any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words) else "yes"


def vcd(answer: str, label: str) -> str | None:
    if label in answer.lower().strip():
        return label
    return "no" if label == "yes" else "yes"


def lmms(answer: str, label: str) -> str | None:
    said = answer.lower().strip()
    return said if said in ("yes", "no") else None


PARSERS: dict[str, Parser] = {"official": official, "pai": pai, "vcd": vcd, "lmms": lmms}


def counts(said: str | None, label: str, positive: str = "yes") -> dict[str, float]:
    """The numbers of one answer that `yes_no_metrics` add up. An answer that is neither is wrong, and counts neither as
    positive nor as missed, as in lmms-eval."""
    tp = float(said == positive and label == positive)
    found = float(said == positive)
    missed = float(said is not None and said != positive and label == positive)
    return {
        "accuracy": float(said == label),
        "tp": tp,
        "said_positive": found,
        "missed_or_found": tp + missed,
        "tp_twice": 2 * tp,
        "f1_bottom": tp + found + missed,
        "yes_ratio": float(said == "yes"),
    }


def yes_no_metrics(over: str) -> tuple[Metric, ...]:
    """Accuracy, precision, recall, F1 of the positive answer, and the share of yes; 0 where nothing was positive.

    over: ``items`` or ``mean of groups`` (the average of splits that papers give). F1 = 2 TP / (2 TP + FP + FN), which
    is the harmonic mean of precision and recall.
    """

    def ratio(name: str, top: str, bottom: str) -> Metric:
        return Metric(name, "share", True, "ratio", 4, top, bottom, over, empty=0.0)

    return (
        Metric("accuracy", "share", True, digits=4, over=over),
        ratio("precision", "tp", "said_positive"),
        ratio("recall", "tp", "missed_or_found"),
        ratio("f1", "tp_twice", "f1_bottom"),
        Metric("yes_ratio", "share", None, digits=4, over=over),
    )


def figures(
    answers: Sequence[str], labels: Sequence[str], parser: str = "official", positive: str = "yes"
) -> dict[str, float]:
    """The published figures of given answers: TP, FP, TN, FN, accuracy, precision, recall, f1, yes_ratio.

    Raises:
        ValueError: different numbers of answers and labels, or none; no such parser.
    """
    if parser not in PARSERS:
        raise ValueError(f"parser={parser!r} is none of {', '.join(PARSERS)}")
    if len(answers) != len(labels) or not answers:
        raise ValueError(f"{len(answers)} answers and {len(labels)} labels: give one label per answer")
    import numpy as np

    said = [PARSERS[parser](a, label) for a, label in zip(answers, labels)]
    rows = [counts(s, label, positive) for s, label in zip(said, labels)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    out = {m.name: float(m.at(columns, None, [np.arange(len(rows))])) for m in yes_no_metrics("items")}
    pairs = [(s == positive, label == positive) for s, label in zip(said, labels) if s is not None]
    return {
        **{n: pairs.count(k) for n, k in (("TP", (True, True)), ("FP", (True, False)), ("TN", (False, False)),
                                          ("FN", (False, True)))},
        **out,
    }  # fmt: skip
