"""`pope`: is there a dog in the image? Questions about objects that are there and that are not.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv 2305.10355, RUCAIBox/POPE
(MIT): data format and four parsers READ, figures RAN on released answers (tests/golden/pope__*.json). Precision, recall
and F1 are those of yes. The headline figures are means over the splits, as papers give them; each split is a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import vlm_sources as sources
from .pope_questions import SPLITS, sample_questions
from .task import Metric
from .vlm_data import NEUTRAL_ITEMS, ImageRef, Item, VlmTask
from .yes_no import PARSERS, counts, yes_no_metrics

SUFFIXES = {
    "none": "",
    "llava": "\nAnswer the question using a single word or phrase.",  # LLaVA, lmms-eval
    "vcd": " Please answer this question with one word.",  # VCD, AGLA, ICD
    "clearsight": " Please just answer yes or no.",
}
SCENES = 100  # images, unless samples says otherwise


@dataclass
class Pope(VlmTask):
    """POPE.

    Attributes:
        data: a file of POPE's format, a folder of them (the split is read from the file name), a hub id with the
        columns image, question, answer, category, or testbed:scenes. images: folder of the images that a file names.
        splits: which of random, popular, adversarial. samples: images, the first ones, None = all (scenes: 100).
        per_image: questions per image and split (testbed:scenes). parser: official, pai, vcd or lmms, see `yes_no`.
        suffix: what follows the question: none, llava, vcd, clearsight or text of your own; None = llava, and none for
        testbed:scenes, whose model was trained without one. template: prompt with {image} and {text}, None = the chat
        template. neutral: items of the neutral check, 0 = none.
    """

    data: str = sources.SCENES
    images: str | None = None
    splits: tuple[str, ...] = SPLITS
    samples: int | None = None
    per_image: int = 6
    parser: str = "official"
    suffix: str | None = None
    template: str | None = None
    max_new_tokens: int = 16
    batch_size: int = 8
    neutral: int = NEUTRAL_ITEMS

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "is there a … in the image? Random, popular and adversarial objects (POPE)"
    metrics: ClassVar[tuple[Metric, ...]] = yes_no_metrics("mean of groups")

    def __post_init__(self) -> None:
        self.check_fields(samples=1, per_image=2)
        unknown = [s for s in self.splits if s not in SPLITS]
        if unknown or not self.splits:
            raise ValueError(f"pope: splits={list(self.splits)} must be some of {', '.join(SPLITS)}")
        if self.parser not in PARSERS:
            raise ValueError(f"pope: parser={self.parser!r} is none of {', '.join(PARSERS)}")

    def read(self, seed: int) -> list[Item]:
        if self.data == sources.SCENES:
            return self._scenes(seed)
        path = Path(self.data).expanduser()
        files = _files(path)
        return self._files(files) if files else self._hub()

    def _item(self, image: ImageRef, text: str, label: str, split: str, number: Any) -> Item:
        label = str(label).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"pope: question {number} ({split}) has the label {label!r}, not yes or no")
        default = "none" if self.data == sources.SCENES else "llava"
        suffix = default if self.suffix is None else self.suffix
        return Item(image, (text + SUFFIXES.get(suffix, suffix),), (label,), split, {"question_id": number})

    def _scenes(self, seed: int) -> list[Item]:
        count = self.samples or SCENES
        module, data = sources.scenes(count, seed)
        refs = sources.scene_images(data, count, seed)
        objects = {i: [o["name"] for o in row] for i, row in enumerate(data["objects"])}
        return [
            self._item(refs[row["image"]], row["text"], row["label"], split, row["question_id"])
            for split in self.splits
            for row in sample_questions(objects, split, self.per_image, seed, module.question, module.NAMES)
        ]

    def _files(self, files: list[Path]) -> list[Item]:
        found: dict[str, list[dict[str, Any]]] = {}
        for path in files:
            split = next((s for s in SPLITS if s in path.stem.lower()), path.stem)
            if split in self.splits or split not in SPLITS:
                if split in found:
                    raise ValueError(
                        f"pope: {self.data} has two files for {split}. Give one of them as data=."
                    )
                rows = sources.rows("pope", path, ("image", "text", "label"))
                kept = set(list(dict.fromkeys(r["image"] for r in rows))[: self.samples])
                found[split] = [r for r in rows if r["image"] in kept]
        missing = [s for s in self.splits if s not in found]
        if missing and len(files) > 1 or not found:
            raise ValueError(
                f"pope: {self.data} has no file for {', '.join(missing)}; it has {', '.join(p.name for p in files)}. "
                "Leave the split out of splits=, or add the file."
            )
        refs = sources.images("pope", self.images, (r["image"] for rows in found.values() for r in rows))
        order = sorted(found, key=lambda s: (SPLITS.index(s) if s in SPLITS else len(SPLITS), s))
        return [
            self._item(refs[r["image"]], r["text"], r["label"], split, r.get("question_id", n))
            for split in order
            for n, r in enumerate(found[split], 1)
        ]

    def _hub(self) -> list[Item]:
        items, images = [], dict[str, int]()
        for part, data in sources.hub("pope", self.data).items():
            table = data.remove_columns("image")
            for n, row in enumerate(table):
                split = str(row.get("category", part)).lower()
                split = next((s for s in SPLITS if s in split), split)
                where = str(row.get("image_source", n))
                number = images.setdefault(where, len(images))
                if split in self.splits and (self.samples is None or number < self.samples):
                    text = sources.column("pope", row, "question", "text")
                    label = sources.column("pope", row, "answer", "label")
                    ref = ImageRef(f"{self.data}/{part}/{where}", data, n)
                    items.append(self._item(ref, text, label, split, row.get("question_id", n)))
        if not items:
            raise ValueError(f"pope: {self.data} has no questions of the splits {', '.join(self.splits)}")
        return sorted(items, key=lambda item: self.splits.index(item.group))

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        label = item.expected[0]
        return counts(PARSERS[self.parser](answers[0], label), label)


def _files(path: Path) -> list[Path]:
    """The files of questions at `path`: itself, or those of a folder; none if it is neither."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.glob("*pope*.json*") if p.is_file()) if path.is_dir() else []
