"""`mme`: two questions per image, one with the answer yes and one no, on four hallucination subtasks.

Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394;
calculation.py and lmms-eval's copy READ, figures RAN (tests/golden/mme__four_tasks.json).

    acc = right questions / questions    acc+ = images with all questions right / images    score = 100 acc + 100 acc+

One item is one image with its questions. The score is the sum over subtasks (800 at most with these four), accuracies
are means over subtasks.

Differs: nothing in the rules; lmms-eval replaces the words "Please answer yes or no." at the end of a question, which
stay here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import vlm_sources as sources
from .task import Metric
from .vlm_data import NEUTRAL_ITEMS, ImageRef, Item, VlmTask

SUBTASKS = ("existence", "count", "position", "color")
SCENES = 100
PICTURES = (".jpg", ".jpeg", ".png")


def original(answer: str) -> str:
    """calculation.py: lower case; yes or no exactly, else the one that the first four characters hold, else other."""
    return _first_four(answer.lower())


def lmms(answer: str) -> str:
    """lmms-eval: lower case, strip, every "." removed, a single y or n taken, then as the original."""
    said = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(said) or _first_four(said)


def _first_four(said: str) -> str:
    if said in ("yes", "no"):
        return said
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


PARSERS = {"original": original, "lmms": lmms}


def grade(answers: Sequence[str], labels: Sequence[str], parser: str = "original") -> dict[str, float]:
    """acc, acc_plus and score of one image, from the answers to its questions and their labels (yes or no)."""
    right = [PARSERS[parser](a) == label for a, label in zip(answers, labels)]
    acc, plus = sum(right) / len(right), float(all(right))
    return {"acc": acc, "acc_plus": plus, "score": 100 * acc + 100 * plus}


@dataclass
class Mme(VlmTask):
    """MME's hallucination subtasks.

    Attributes:
        data: MME's folder (existence/*.jpg with existence/*.txt, or existence/images and
        existence/questions_answers_YN), or testbed:scenes. subtasks: folder names; any of MME's works.
        samples: images per subtask, the first ones, None = all (scenes: 100 images for all). parser: original or lmms.
        template: prompt with {image} and {text}, None = the chat template. neutral: items of the neutral check.
    """

    data: str = sources.SCENES
    subtasks: tuple[str, ...] = SUBTASKS
    samples: int | None = None
    parser: str = "original"
    template: str | None = None
    max_new_tokens: int = 16
    batch_size: int = 8
    neutral: int = NEUTRAL_ITEMS

    name: ClassVar[str] = "mme"
    summary: ClassVar[str] = "existence, count, position, color: two questions per image, acc and acc+ (MME)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("score", "points", True, digits=1, over="sum of groups"),
        Metric("acc", "share", True, digits=4, over="mean of groups"),
        Metric("acc_plus", "share", True, digits=4, over="mean of groups"),
    )

    def __post_init__(self) -> None:
        self.check_fields(samples=1)
        if self.parser not in PARSERS:
            raise ValueError(f"mme: parser={self.parser!r} is none of {', '.join(PARSERS)}")
        if not self.subtasks:
            raise ValueError(f"mme: subtasks is empty; name some of {', '.join(SUBTASKS)}")

    def read(self, seed: int) -> list[Item]:
        return (
            self._scenes(seed) if self.data == sources.SCENES else self._folder(Path(self.data).expanduser())
        )

    def _scenes(self, seed: int) -> list[Item]:
        count = self.samples or SCENES
        module, data = sources.scenes(count, seed)
        refs = sources.scene_images(data, count, seed)
        asked: dict[tuple[str, int], list[tuple[str, str]]] = {}
        for row in module.pairs(data, seed=seed):
            key = (row["subtask"], row["image_id"])
            asked.setdefault(key, []).append((row["question"], row["answer"].lower()))
        return [
            _item(refs[number], asked[subtask, number], subtask)
            for subtask in self.subtasks
            for number in range(len(data))
            if (subtask, number) in asked
        ]

    def _folder(self, root: Path) -> list[Item]:
        items = []
        for subtask in self.subtasks:
            folder = root / subtask
            if not folder.is_dir():
                there = ", ".join(sorted(p.name for p in root.glob("*") if p.is_dir())) or "no folder"
                raise ValueError(f"mme: {root} has no folder {subtask}; it has {there}")
            apart = (folder / "images").is_dir()
            texts = folder / "questions_answers_YN" if apart else folder
            files = sorted(texts.glob("*.txt"))[: self.samples]
            if not files:
                raise ValueError(f"mme: {texts} has no .txt files with questions")
            pictures = folder / "images" if apart else folder
            by_stem = {p.stem: p for p in pictures.iterdir() if p.suffix.lower() in PICTURES}
            missing = [f.stem for f in files if f.stem not in by_stem]
            if missing:
                raise ValueError(
                    f"mme: {len(missing)} of {len(files)} images of {subtask} are not in {pictures}: "
                    f"{', '.join(missing[: sources.SHOWN])}. Get them; none is left out silently."
                )
            items += [_item(ImageRef(str(by_stem[f.stem])), _questions(f), subtask) for f in files]
        return items

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        return grade(answers, item.expected, self.parser)


def _item(image: ImageRef, asked: list[tuple[str, str]], subtask: str) -> Item:
    return Item(image, tuple(q for q, _ in asked), tuple(a for _, a in asked), subtask)


def _questions(file: Path) -> list[tuple[str, str]]:
    """(question, yes or no) of each line "question<tab>answer"."""
    found: list[Any] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise ValueError(f"mme: {file}: {line!r} is not a question, a tab and Yes or No")
            found.append((question.strip(), answer.strip().lower()))
    if not found:
        raise ValueError(f"mme: {file} has no questions")
    return found
