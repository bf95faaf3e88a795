"""`chair`: objects that a caption names and the image does not have, with what is lost and repeated beside them.

Source: Rohrbach et al., "Object Hallucination in Image Captioning", arXiv 1809.02156 (LisaAnne/Hallucination; the
copies of OPERA and PAI): formulas READ, figures RAN on released captions (tests/golden/chair__*.json).

    CHAIR_i = hallucinated mentions / mentions            CHAIR_s = captions with one / captions
    recall = sum |named and there| / sum |there|          precision = sum |named and there| / sum |named|   (unique)

Every mention counts in CHAIR, unique objects in recall, precision and F1. A method that says less, or the same sentence
again and again, has a low CHAIR: recall, length, the share of repeated sentences and distinct-2 stand in every table.

Differs: words by `object_words` (no nltk); length counts words, not punctuation; the images are the first of a sorted
list, or a seeded sample of it (the common scripts shuffle ``os.listdir``, which differs between machines).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import vlm_sources as sources
from .object_words import ObjectWords, duplicate_share, ngrams, words
from .task import Metric
from .vlm_data import NEUTRAL_ITEMS, Item, VlmTask

PROMPT = "Please describe this image in detail."
SCENES = 100
COCO = ("instances_val2014.json", "captions_val2014.json")


def _ratio(name: str, better: bool, top: str, bottom: str, scale: float = 1.0) -> Metric:
    unit = "%" if scale == 100 else "share"
    return Metric(name, unit, better, "ratio", 1 if scale == 100 else 3, top, bottom, scale=scale)


METRICS = (
    Metric("chair_s", "%", False, digits=1, scale=100),
    _ratio("chair_i", False, "bad_mentions", "mentions", 100),
    _ratio("recall", True, "right", "there", 100),
    _ratio("precision", True, "right", "named", 100),
    _ratio("f1", True, "right_twice", "named_and_there", 100),
    Metric("words", "per caption", None, digits=1),
    Metric("repeated", "% of sentences", False, digits=1, scale=100),
    _ratio("distinct_2", True, "distinct_pairs", "pairs"),
)


def grade(caption: str, there: Sequence[str], table: ObjectWords) -> dict[str, float]:
    """The numbers of one caption that `METRICS` add up.

    Args:
        there: canonical names of the objects of the image.
    """
    named = [m.name for m in table.mentions(caption)]
    pairs = ngrams(words(caption), 2)
    return {
        **counts(named, there),
        "words": float(len(words(caption))),
        "repeated": duplicate_share(caption),
        "distinct_pairs": float(len(set(pairs))),
        "pairs": float(len(pairs)),
    }


def counts(named: Sequence[str], there: Sequence[str]) -> dict[str, float]:
    """Columns of CHAIR from the objects that a caption names (every mention) and those of the image."""
    truth, unique = set(there), set(named)
    right = len(unique & truth)
    bad = sum(name not in truth for name in named)
    return {
        "chair_s": float(bad > 0),
        "bad_mentions": float(bad),
        "mentions": float(len(named)),
        "right": float(right),
        "there": float(len(truth)),
        "named": float(len(unique)),
        "right_twice": 2.0 * right,
        "named_and_there": float(len(unique) + len(truth)),
    }


@dataclass
class Chair(VlmTask):
    """CHAIR.

    Attributes:
        data: testbed:scenes; a JSON-lines file with image and objects (and captions, whose objects count too); or a
        folder with COCO's instances_val2014.json and captions_val2014.json. images: folder of the images.
        samples: images; scenes: 100; a file: the first ones, None = all; COCO: a seeded sample, None = 500.
        synonyms: coco, or a JSON file {object: [synonyms]}; None = coco, and the scenes' own table for testbed:scenes.
        prompt: what is asked; None = the prompt of the data, or the usual one. max_new_tokens: 512 and 64 are usual.
        template: prompt with {image} and {text}, None = the chat template. neutral: items of the neutral check.
        heat_maps: captions of the dense model whose attention is drawn on the page.
    """

    data: str = sources.SCENES
    images: str | None = None
    samples: int | None = None
    synonyms: str | None = None
    prompt: str | None = None
    template: str | None = None
    max_new_tokens: int = 128
    batch_size: int = 8
    neutral: int = NEUTRAL_ITEMS
    heat_maps: int = 4

    name: ClassVar[str] = "chair"
    summary: ClassVar[str] = "objects that captions name and images lack, with recall, repetition (CHAIR)"
    metrics: ClassVar[tuple[Metric, ...]] = METRICS

    def __post_init__(self) -> None:
        self.check_fields(samples=1)

    def read(self, seed: int) -> list[Item]:
        if self.data == sources.SCENES:
            return self._scenes(seed)
        self._table = ObjectWords.load(self.synonyms or "coco")
        path = Path(self.data).expanduser()
        found = self._coco(path, seed) if path.is_dir() else self._file(path)
        refs = sources.images("chair", self.images, found)
        asked = self.prompt or PROMPT
        return [self._item(refs[name], asked, there) for name, there in found.items()]

    def _item(self, image: Any, asked: str, there: Sequence[str]) -> Item:
        return Item(image, (asked,), tuple(sorted(set(there))), "")

    def groups(self, items: list[Item]) -> Any:
        return None

    def _scenes(self, seed: int) -> list[Item]:
        count = self.samples or SCENES
        module, data = sources.scenes(count, seed)
        self._table = ObjectWords.load(self.synonyms) if self.synonyms else ObjectWords.of(all_names(module))
        refs = sources.scene_images(data, count, seed)
        return [
            self._item(
                ref, self.prompt or asked, _named(self._table, [o["name"] for o in objects], ref.where)
            )
            for ref, asked, objects in zip(refs, data["prompt"], data["objects"])
        ]

    def _file(self, path: Path) -> dict[str, list[str]]:
        found = {}
        for row in sources.rows("chair", path, ("image", "objects"))[: self.samples]:
            there = _named(self._table, row["objects"], f"{path}, {row['image']}")
            for caption in row.get("captions", ()):
                there += [m.name for m in self._table.mentions(caption)]
            found[row["image"]] = there
        return found

    def _coco(self, folder: Path, seed: int) -> dict[str, list[str]]:
        there = coco_objects(folder, self._table)
        chosen = random.Random(seed).sample(sorted(there), min(self.samples or 500, len(there)))
        return {name: there[name] for name in sorted(chosen)}

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        return grade(answers[0], item.expected, self._table)

    def marks(self, item: Item, answer: str) -> list[tuple[int, int, str]]:
        return [
            (m.start, m.end, "good" if m.name in item.expected else "bad")
            for m in self._table.mentions(answer)
        ]


def coco_objects(folder: Path, table: ObjectWords) -> dict[str, list[str]]:
    """File name -> objects of COCO val2014: instance annotations and what the five captions name, as CHAIR takes it.

    Raises:
        ValueError: a file is missing.
    """
    import json

    missing = [name for name in COCO if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"chair: {folder} has no {', '.join(missing)}. Give a folder with {' and '.join(COCO)} "
            "(annotations_trainval2014.zip of COCO), or a JSON-lines file with image and objects."
        )
    instances, captions = (json.loads((folder / name).read_text(encoding="utf-8")) for name in COCO)
    names = {row["id"]: row["file_name"] for row in instances["images"]}
    kinds = {row["id"]: row["name"] for row in instances["categories"]}
    there: dict[str, list[str]] = {name: [] for name in names.values()}
    for row in instances["annotations"]:
        there[names[row["image_id"]]] += _named(table, [kinds[row["category_id"]]], COCO[0])
    for row in captions["annotations"]:
        there[names[row["image_id"]]] += [m.name for m in table.mentions(row["caption"])]
    return {name: list(dict.fromkeys(found)) for name, found in there.items()}


def _named(table: ObjectWords, names: Sequence[str], where: str) -> list[str]:
    found = [table.canonical(name) for name in names]
    unknown = [n for n, f in zip(names, found) if f is None]
    if unknown:
        raise ValueError(
            f"chair: {where}: {', '.join(unknown[:5])} is no object of the synonym table. "
            "Add it with synonyms=FILE.json."
        )
    return [f for f in found if f is not None]


def all_names(module: Any) -> Mapping[str, list[str]]:
    """The scenes' table, with objects that have no synonyms."""
    return {name: list(module.SYNONYMS.get(name, ())) for name in module.NAMES}
