"""`knn`: is the class of an image still the class of its nearest neighbours in feature space?

The training-free probe of self-supervised ViTs (DINO, arXiv 2104.14294): k nearest training images by cosine of the
CLS features, votes weighted by exp(cosine / temperature). The mean of the training features is taken off first: what
all images share says nothing about any of them and flattens the cosines. Training and test features both come from
the model under test. Without `data` the images are scikit-learn's digits: real, labelled, on every machine that has
scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import images as image_source
from .feature_cache import encoded
from .labelled import labelled
from .task import Metric, Scores, Task, Tick, require_vision_model


@dataclass
class Knn(Task):
    """k-NN accuracy of CLS features.

    Attributes:
        train, test: images that vote, images that are asked about. k: neighbours. temperature: of the votes.
        size: side in pixels, None = as the processor does. batch: images per forward. data: testbed:scenes,
        testbed:digits, a folder of folders, or a hub id (see `eval.labelled`); None = a seeded split of all digits of
        scikit-learn. cache: folder for features, None = keep none.
    """

    train: int = 200
    test: int = 100
    k: int = 10
    temperature: float = 0.07
    size: int | None = None
    batch: int = 8
    data: str | None = None
    cache: str | None = None

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
        known, asked, names = self._images(seed)
        values = [image_source.pixel_values(model, processor, part[0], self.size) for part in (known, asked)]
        self._train, self._names = (values[0], known[1]), names
        return list(zip(values[1], asked[1]))

    def _images(self, seed: int) -> tuple[tuple[Any, list[int]], tuple[Any, list[int]], list[str]]:
        """(images, labels) that vote, those that are asked about, and the names of the classes."""
        if self.data is None:
            pixels, labels = image_source.digits(self.train + self.test, seed)
            known, asked = (
                (pixels[: self.train], labels[: self.train]),
                (pixels[self.train :], labels[self.train :]),
            )
            return known, asked, [str(n) for n in range(10)]
        train, test = labelled(self.name, self.data, self.train, self.test, seed)
        if len(train) < self.k:  # a hub split may be shorter than asked for
            raise ValueError(f"knn: k={self.k}, but {self.data} has {len(train)} training images. Lower k")
        return (train.images, train.labels), (test.images, test.labels), test.names

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        pixels, labels = self._train
        known, _ = encoded(model, pixels, self.batch, self.cache)
        asked, _ = encoded(model, torch.stack([p for p, _ in items]), self.batch, self.cache, tick)
        common = known.mean(0)
        guesses = nearest_class(known - common, labels, asked - common, self.k, self.temperature)
        return {"accuracy": [float(guess == label) for guess, (_, label) in zip(guesses, items)]}

    def groups(self, items: list[Any]) -> list[str]:
        return [self._names[label] for _, label in items]


def nearest_class(known: Any, labels: list[int], asked: Any, k: int, temperature: float) -> list[int]:
    """Weighted vote of the k nearest by cosine: known [n, D], labels n, asked [m, D] -> m classes."""
    import torch

    unit = torch.nn.functional.normalize
    cosine, index = (unit(asked.double(), dim=-1) @ unit(known.double(), dim=-1).T).topk(k, dim=-1)
    classes = torch.tensor(labels)[index]
    votes = torch.zeros(len(asked), int(max(labels)) + 1, dtype=torch.float64)
    votes.scatter_add_(1, classes, torch.exp(cosine / temperature))
    return votes.argmax(-1).tolist()
