"""`amber`: yes-or-no questions on existence, attributes and relations; or captions against lists of objects.

Source: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv
2311.07397, junyangwang0410/AMBER (Apache-2.0): rules READ, figures RAN (tests/golden/amber__*.json). Precision, recall
and F1 are those of the answer NO. The notes give the figures as AMBER's script rounds them.

Differs: an answer that starts with yes or no in any case is one (the script wants exactly "Yes" or "No"; lmms-eval does
the same); intervals are of plain ratios.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import amber_figures as figures
from . import vlm_sources as sources
from .task import Metric
from .vlm_data import NEUTRAL_ITEMS, Item, VlmTask
from .yes_no import counts, yes_no_metrics

PARTS = ("discriminative", "generative")
QUERIES = {"discriminative": "query_discriminative.json", "generative": "query_generative.json"}


def _ratio(name: str, better: bool, top: str, bottom: str) -> Metric:
    return Metric(name, "%", better, "ratio", 1, top, bottom, scale=100)


GENERATIVE = (
    Metric("hal", "%", False, digits=1, scale=100),
    _ratio("chair", False, "bad", "kept"),
    _ratio("cover", True, "covered", "there"),
    _ratio("cog", False, "imagined", "imaginable"),
)


@dataclass
class Amber(VlmTask):
    """AMBER.

    Attributes:
        data: AMBER's folder data/ (query_discriminative.json or query_generative.json, annotations.json; for generative
        also relation.json and safe_words.txt). images: folder of its images. part: discriminative or generative (which
        needs spaCy's en_core_web_lg and nltk's data). samples: questions, the first ones, None = all.
        template: prompt with {image} and {text}, None = the chat template. neutral: items of the neutral check.
    """

    data: str = ""
    images: str | None = None
    part: str = "discriminative"
    samples: int | None = None
    template: str | None = None
    max_new_tokens: int | None = None  # type: ignore[assignment]
    batch_size: int = 8
    neutral: int = NEUTRAL_ITEMS

    name: ClassVar[str] = "amber"
    summary: ClassVar[str] = "existence, attributes, relations; captions against lists of objects (AMBER)"
    metrics: ClassVar[tuple[Metric, ...]] = yes_no_metrics("items")

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"amber: part={self.part!r} is none of {', '.join(PARTS)}")
        if not self.data:
            raise ValueError(
                "amber: data=FOLDER says where AMBER's data/ is, and images=FOLDER where its images are"
            )
        self.check_fields(samples=1)
        if self.max_new_tokens is None:
            self.max_new_tokens = 16 if self.part == "discriminative" else 512
        if self.part == "generative":
            self.metrics = GENERATIVE  # type: ignore[misc]

    def read(self, seed: int) -> list[Item]:
        folder = Path(self.data).expanduser()
        if self.part == "generative":
            self._prepare(folder)
        asked = sources.rows("amber", folder / QUERIES[self.part], ("id", "image", "query"))[: self.samples]
        notes = sources.rows("amber", folder / "annotations.json", ("id", "type", "truth"))
        by_id = {row["id"]: row for row in notes}
        unknown = [row["id"] for row in asked if row["id"] not in by_id]
        if unknown:
            raise ValueError(
                f"amber: annotations.json has no {', '.join(map(str, unknown[: sources.SHOWN]))}"
            )
        refs = sources.images("amber", self.images, (row["image"] for row in asked))
        return [self._item(refs[row["image"]], row, by_id[row["id"]]) for row in asked]

    def _prepare(self, folder: Path) -> None:
        from .amber_words import Words

        missing = [n for n in ("relation.json", "safe_words.txt") if not (folder / n).is_file()]
        if missing:
            raise ValueError(f"amber: {folder} has no {', '.join(missing)}, which part=generative needs")
        self._association = json.loads((folder / "relation.json").read_text(encoding="utf-8"))
        self._safe = set((folder / "safe_words.txt").read_text(encoding="utf-8").split("\n")) - {""}
        self._words = Words()

    def _item(self, image: Any, row: dict[str, Any], note: dict[str, Any]) -> Item:
        facts = {"id": row["id"]}
        if self.part == "generative":
            return Item(image, (row["query"],), tuple(note["truth"]), "", facts, tuple(note.get("hallu", ())))
        return Item(image, (row["query"],), (str(note["truth"]).lower(),), figures.kind(note["type"]), facts)

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        if self.part == "discriminative":
            said = figures.normalised(answers[0]).lower()
            return counts(said if said in ("yes", "no") else None, item.expected[0], positive="no")
        return figures.generative_counts(
            self._words.nouns(answers[0]), item.expected, item.extra, self._association, self._safe, self._words.alike
        )  # fmt: skip

    def groups(self, items: list[Item]) -> Any:
        return super().groups(items) if self.part == "discriminative" else None

    def remarks(self, items: list[Item], answers: list[str]) -> list[str]:
        if self.part == "generative":
            found: Any = figures.generative([self.grade([a], item) for a, item in zip(answers, items)])
            return ["AMBER's own rounding: " + ", ".join(f"{k} {v}" for k, v in found.items())]
        kinds, truths = [item.group for item in items], [item.expected[0] for item in items]
        found = figures.discriminative(kinds, truths, [figures.normalised(a) for a in answers])
        said = (f"{group} {v['accuracy']} / {v['f1']}" for group, v in found.items())
        return ["AMBER's own rounding, accuracy / F1 of no: " + ", ".join(said)]
