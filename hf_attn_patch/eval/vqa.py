"""`vqa`: short answers against those of ten people (VQA accuracy).

Source: VQAv2's VQAEval, lmms-eval's vqav2 and textvqa, LLaVA's M4C evaluator: rules READ, 36 answers RAN through all of
them (tests/golden/vqa__accuracy.json).

    accuracy = mean over the people of min(1, how many of the OTHERS gave the answer / 3)

after normalising both sides. The four differ in the normalising only, see `normalise`.

Differs: contractions are restored from a list of English ones (the published table is shorter and has misprints).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import vlm_sources as sources
from .task import Metric
from .vlm_data import NEUTRAL_ITEMS, ImageRef, Item, VlmTask

NUMBERS = "none zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(max(i - 1, 0)) for i, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NOT = (
    "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won "
    "wouldn"
).split()
_OTHERS = (
    "could've he's how'd how'll how's i'm i've it'd it'll let's ma'am might've must've o'clock she's should've "
    "that'd that's there'd there're there's they'd they'll they're they've we've what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's would've y'all you'd you'll you're "
    "you've"
).split()
CONTRACTIONS = {word.replace("'", ""): word for word in [*(f"{n}'t" for n in _NOT), *_OTHERS]}
_COMMA = re.compile(r"\d,\d")

RULES = ("official", "vqav2", "textvqa")


def punctuation(text: str) -> str:
    """Marks removed if one touches a blank somewhere or a digit,digit comma occurs, else replaced by a blank; periods
    that no digit follows removed."""
    out = text
    for mark in MARKS:
        if f"{mark} " in text or f" {mark}" in text or _COMMA.search(text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return re.sub(r"\.(?!\d)", "", out)


def normalise(text: str, rule: str = "official") -> str:
    """The form that answers are compared in: punctuation, digits for number words, no articles, contractions.

    rule: official and vqav2 alike; textvqa (and M4C) first drops commas and question marks and splits off 's.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    if rule == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = punctuation(text).lower().split()
    words = [DIGITS.get(w, w) for w in words]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def accuracy(answer: str, people: Sequence[str], rule: str = "official") -> float:
    """VQA accuracy of one answer, 0 … 1.

    rule: official (normalises only if the people disagree), vqav2 (always), textvqa (always, with its extra steps).

    Raises:
        ValueError: no such rule, or no answers of people.
    """
    if rule not in RULES:
        raise ValueError(f"vqa: rule={rule!r} is none of {', '.join(RULES)}")
    if not people:
        raise ValueError("vqa: no answers of people to compare with")
    plain = [p.replace("\n", " ").replace("\t", " ").strip() for p in people]
    said = answer.replace("\n", " ").replace("\t", " ").strip()
    if rule != "official" or len(set(plain)) > 1:
        plain, said = [normalise(p, rule) for p in people], normalise(answer, rule)
    same = [p.lower() == said.lower() for p in plain]
    return sum(min(1.0, (sum(same) - s) / 3) for s in same) / len(same)


@dataclass
class Vqa(VlmTask):
    """VQA accuracy.

    Attributes:
        data: a JSON-lines file with image, question and answers (a list of strings), or a hub id with these columns (as
        lmms-lab/VQAv2, lmms-lab/textvqa). images: folder of the images of a file. split: of a hub id.
        samples: questions, the first ones, None = all. rule: official, vqav2 or textvqa. suffix: follows a question.
        template: prompt with {image} and {text}, None = the chat template. neutral: items of the neutral check.
    """

    data: str = "lmms-lab/VQAv2"
    images: str | None = None
    split: str = "validation"
    samples: int | None = None
    rule: str = "official"
    suffix: str = "\nAnswer the question using a single word or phrase."
    template: str | None = None
    max_new_tokens: int = 16
    batch_size: int = 8
    neutral: int = NEUTRAL_ITEMS

    name: ClassVar[str] = "vqa"
    summary: ClassVar[str] = "short answers about images against those of ten people (VQA accuracy)"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "share", True, digits=4),)

    def __post_init__(self) -> None:
        self.check_fields(samples=1)
        if self.rule not in RULES:
            raise ValueError(f"vqa: rule={self.rule!r} is none of {', '.join(RULES)}")

    def read(self, seed: int) -> list[Item]:
        path = Path(self.data).expanduser()
        if path.is_file():
            rows = sources.rows("vqa", path, ("image", "question", "answers"))[: self.samples]
            refs = sources.images("vqa", self.images, (r["image"] for r in rows))
            return [self._item(refs[r["image"]], r) for r in rows]
        parts = sources.hub("vqa", self.data)
        if self.split not in parts:
            raise ValueError(f"vqa: {self.data} has no split {self.split!r}; it has {', '.join(parts)}")
        data = parts[self.split]
        table = data.remove_columns("image").select(range(min(self.samples or len(data), len(data))))
        return [
            self._item(ImageRef(f"{self.data}/{self.split}/{n}", data, n), row) for n, row in enumerate(table)
        ]

    def _item(self, image: ImageRef, row: dict[str, Any]) -> Item:
        answers = [a["answer"] if isinstance(a, dict) else str(a) for a in row["answers"]]
        return Item(image, (row["question"] + self.suffix,), tuple(answers), str(row.get("answer_type", "")))

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        return {"accuracy": accuracy(answers[0], item.expected, self.rule)}
