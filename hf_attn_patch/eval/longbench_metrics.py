"""The metrics of LongBench (arXiv 2308.14508): answer and truth as text -> a score in 0 … 1.

ROUGE-L, edit similarity and Chinese word cutting come from the packages that the benchmark uses (rouge, jieba) or from
one that computes the same (rapidfuzz for fuzzywuzzy, rounded to whole percent as there).

Differs: the original's `classification` removes class names from a list while it walks through it, and so may keep a
name that it should drop; here every name that is only a part of the right one is dropped.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = {
    "rouge": ("rouge",),
    "rouge_zh": ("rouge", "jieba"),
    "qa_f1_zh": ("jieba",),
    "code": ("rapidfuzz",),
}
_WIDE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def require(metrics: Sequence[str]) -> None:
    """Raises ValueError, with the extra to install, if a package of one of `metrics` is missing."""
    missing = []
    for package in {p for m in metrics for p in PACKAGES.get(m, ())}:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(
            f"longbench: {', '.join(sorted(missing))} not installed: pip install 'hf_attn_patch[longbench]', "
            "or choose datasets that do without (datasets=hotpotqa)."
        )


def score(metric: str, answer: str, truths: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score of `answer` against any of the `truths`."""
    return max((METRICS[metric](answer, truth, classes) for truth in truths), default=0.0)


def f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, each as often as it comes."""
    same = sum((Counter(said) & Counter(true)).values())
    return 2 * same / (len(said) + len(true)) if same else 0.0


def qa_f1(answer: str, truth: str, classes: Sequence[str]) -> float:
    """F1 of lower-case words without punctuation and articles (SQuAD)."""
    return f1(_words(answer), _words(truth))


def qa_f1_zh(answer: str, truth: str, classes: Sequence[str]) -> float:
    """F1 of words as jieba cuts them, without punctuation."""
    return f1(_words_zh(answer), _words_zh(truth))


def rouge(answer: str, truth: str, classes: Sequence[str]) -> float:
    """F of ROUGE-L; 0 where one side has no words."""
    from rouge import Rouge

    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, truth)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # "Hypothesis is empty", or only full stops; a very long line
        return 0.0


def rouge_zh(answer: str, truth: str, classes: Sequence[str]) -> float:
    """`rouge` of words as jieba cuts them."""
    import jieba

    return rouge(" ".join(jieba.cut(answer)), " ".join(jieba.cut(truth)), classes)


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """1 / number of class names that were said, if the right one is among them."""
    said = [c for c in classes if c in answer and (c == truth or c not in truth)]
    return 1.0 / len(said) if truth in said else 0.0


def count(answer: str, truth: str, classes: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(str(truth)) / len(numbers) if numbers else 0.0


def retrieval(answer: str, truth: str, classes: Sequence[str]) -> float:
    """`count` of the number of the right paragraph (``Paragraph 7``, ``段落7``)."""
    wanted = re.search(r"(?:Paragraph |段落)(\d+)", truth)
    return count(answer, wanted[1], classes) if wanted else 0.0


def code(answer: str, truth: str, classes: Sequence[str]) -> float:
    """Edit similarity of the first line that is neither a comment nor a fence."""
    from rapidfuzz import fuzz

    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, truth)) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "code": code,
}


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _words_zh(text: str) -> list[str]:
    import jieba

    drop: Any = set(string.punctuation + _WIDE)
    cut = ("".join(c for c in word.lower() if c not in drop and not c.isspace()) for word in jieba.cut(text))
    return [word for word in cut if word]
