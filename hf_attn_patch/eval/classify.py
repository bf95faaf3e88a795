"""`classify`: does a model with a classifier still name what is in the image? Top-1 and top-5.

The head is the model's own, as it was trained: unlike the probes, this asks whether features still mean to it what they
did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..api import active
from ..model.sites import base_model
from . import images as image_source
from .features import _needs_interpolation
from .labelled import DIGITS, labelled
from .task import Metric, Scores, Task, Tick, require_vision_model


@dataclass
class Classify(Task):
    """Top-1 and top-5 of a model with a classifier, or with a patch that has classes (`prompt_cam`, `tcpa`).

    Attributes:
        data: testbed:digits, testbed:scenes, a folder with one folder of images per class, or a hub id (see
        `eval.labelled`). Classes are matched with the model's `id2label` by name, with those of a patch by number.
        test: images. size: side in pixels, None = as the processor does. batch: images per forward.
    """

    data: str = DIGITS
    test: int = 360
    size: int | None = None
    batch: int = 32

    name: ClassVar[str] = "classify"
    summary: ClassVar[str] = "top-1 and top-5 of a model with a classifier (vision)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("top1", "share", True, digits=3),
        Metric("top5", "share", True, digits=3),
    )

    def __post_init__(self) -> None:
        if min(self.test, self.batch) < 1:
            raise ValueError(f"classify: test={self.test} and batch={self.batch} must be at least 1")

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        _, test = labelled(self.name, self.data, 0, self.test, seed)
        number = class_numbers(model, test.names, set(test.labels))
        values = image_source.pixel_values(model, processor, test.images, self.size)
        return [(pixels, number[label], test.names[label]) for pixels, label in zip(values, test.labels)]

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        scores: Scores = {"top1": [], "top5": []}
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            pixels = torch.stack([p for p, _, _ in part])
            with torch.inference_mode():
                logits = model(pixel_values=pixels, **_needs_interpolation(model, pixels)).logits.float()
            best = logits.topk(min(5, logits.shape[-1]), -1).indices.tolist()
            for (_, truth, _), guesses in zip(part, best):
                scores["top1"].append(float(guesses[0] == truth))
                scores["top5"].append(float(truth in guesses))
            tick(len(part))
        return scores

    def groups(self, items: list[Any]) -> list[str]:
        return [name for _, _, name in items]


def class_numbers(model: Any, names: list[str], used: set[int]) -> dict[int, int]:
    """Number of a class in the data -> number of the model's logit.

    By number where a patch answers; by name where the model's labels have them (WordNet-like lists "a, b" match on any
    of their parts); otherwise the same number, if the model's labels are only "LABEL_0", ... .

    Raises:
        ValueError: the model has no classifier, or does not know a class.
    """
    answering = [n for n in (getattr(h.config, "classes", 0) for h in active(model)) if n]
    if answering:  # the logits are those of a patch, which knows numbers only
        if max(used) >= answering[-1]:
            raise ValueError(
                f"classify: the data have {max(used) + 1} classes, the patch was trained for {answering[-1]}"
            )
        return {number: number for number in used}
    inner = base_model(model)  # PEFT wraps it
    id2label = dict(getattr(inner.config, "id2label", None) or {})
    label2id = {str(name): int(number) for number, name in id2label.items()}
    if not label2id or "ForImageClassification" not in type(inner).__name__:
        raise ValueError(
            f"classify: {type(inner).__name__} has no classifier. Give a model made with "
            "AutoModelForImageClassification, or use linear_probe or attentive_probe, which train a head."
        )
    plain = lambda text: str(text).strip().lower().replace("_", " ")
    whole = {plain(name): int(n) for name, n in label2id.items()}
    parts = {plain(one): int(n) for name, n in label2id.items() for one in str(name).split(",")}
    anonymous = all(plain(name).startswith("label ") for name in label2id)
    found, unknown = {}, []
    for number in sorted(used):
        name = plain(names[number])
        if name in whole or name in parts:
            found[number] = whole.get(name, parts.get(name, -1))
        elif anonymous and number < len(label2id):
            found[number] = number
        else:
            unknown.append(names[number])
    if unknown:
        known = ", ".join(list(map(str, label2id))[:5])
        raise ValueError(
            f"classify: the model has no class {', '.join(unknown[:5])}; it has {len(label2id)}: {known}, …. Name the "
            "folders after its id2label"
        )
    return found
