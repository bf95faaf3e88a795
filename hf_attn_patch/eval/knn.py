"""`knn`: is the class of an image still the class of its nearest neighbours in feature space?

The training-free probe of self-supervised ViTs (DINO, arXiv 2104.14294): k nearest training images by cosine of the
CLS features, votes weighted by exp(cosine / temperature). The mean of the training features is taken off first: what
all images share says nothing about any of them and flattens the cosines. Training and test features both come from
the model under test. Images are scikit-learn's digits: real, labelled, on every machine that has scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import images as image_source
from .features import encode
from .task import Metric, Scores, Task, Tick, require_vision_model


@dataclass
class Knn(Task):
    """k-NN accuracy of CLS features.

    Attributes:
        train, test: images in each half of the seeded split. k: neighbours. temperature: of the votes.
        size: side in pixels, None = as the processor does. batch: images per forward.
    """

    train: int = 200
    test: int = 100
    k: int = 10
    temperature: float = 0.07
    size: int | None = None
    batch: int = 8

    name: ClassVar[str] = "knn"
    summary: ClassVar[str] = "k-nearest-neighbour accuracy of features on labelled images (vision)"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "share", True, digits=3),)

    def __post_init__(self) -> None:
        if min(self.train, self.test, self.batch) < 1 or self.temperature <= 0:
            raise ValueError(
                f"knn: train={self.train}, test={self.test} and batch={self.batch} must be at least 1, "
                f"temperature={self.temperature} above 0"
            )
        if not 1 <= self.k <= self.train:
            raise ValueError(f"knn: k={self.k} must be between 1 and train={self.train}")

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        pixels, labels = image_source.digits(self.train + self.test, seed)
        values = image_source.pixel_values(model, processor, pixels, self.size)
        self._train = values[: self.train], labels[: self.train]
        return list(zip(values[self.train :], labels[self.train :]))

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        pixels, labels = self._train
        known, _ = encode(model, pixels, self.batch)
        asked, _ = encode(model, torch.stack([p for p, _ in items]), self.batch, tick)
        common = known.mean(0)
        guesses = nearest_class(known - common, labels, asked - common, self.k, self.temperature)
        return {"accuracy": [float(guess == label) for guess, (_, label) in zip(guesses, items)]}

    def groups(self, items: list[Any]) -> list[str]:
        return [str(label) for _, label in items]


def nearest_class(known: Any, labels: list[int], asked: Any, k: int, temperature: float) -> list[int]:
    """Weighted vote of the k nearest by cosine: known [n, D], labels n, asked [m, D] -> m classes."""
    import torch

    unit = torch.nn.functional.normalize
    cosine, index = (unit(asked.double(), dim=-1) @ unit(known.double(), dim=-1).T).topk(k, dim=-1)
    classes = torch.tensor(labels)[index]
    votes = torch.zeros(len(asked), int(max(labels)) + 1, dtype=torch.float64)
    votes.scatter_add_(1, classes, torch.exp(cosine / temperature))
    return votes.argmax(-1).tolist()
