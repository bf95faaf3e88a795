"""`linear_probe`, `attentive_probe`: what a trained head can still read from the features of a patched model.

The head is trained on training images, and scored on others; features of both come from the model under test, so each
variant gets a head of its own. Accuracy therefore says what the features hold, not whether an old head still fits them
(that is `classify`). Protocol of arXiv 2506.10178 in small: frozen tokens, no augmentation, AdamW (see
`hf_attn_patch.probing.recipe`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from . import images as image_source
from .feature_cache import encoded
from .labelled import SCENES, Labelled, labelled
from .task import Metric, Scores, Task, Tick, require_vision_model

ACCURACY = (Metric("accuracy", "share", True, digits=3),)
RANKING = (Metric("ranking_precision", "share", True, digits=3),)


class ProbeTask(Task):
    """What both probes share: data, features, a head, a number per test image."""

    data: str
    labels: str
    train: int
    test: int
    size: int | None
    batch: int
    cache: str | None
    metrics: ClassVar[tuple[Metric, ...]] = ACCURACY

    def check_fields(self) -> None:
        """Raises ValueError for numbers out of range; chooses the metric."""
        if self.train < 2 or self.test < 1 or self.batch < 1:
            raise ValueError(
                f"{self.name}: train={self.train} must be at least 2, test={self.test} and batch={self.batch} 1"
            )
        if self.labels == "objects":
            self.metrics = RANKING  # type: ignore[misc]

    def reads(self, cls: Any, patches: Any) -> Any:
        """The features that the head gets, [n, C] or [n, N, C]."""
        raise NotImplementedError

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        parts = labelled(self.name, self.data, self.train, self.test, seed, self.labels)
        values = [image_source.pixel_values(model, processor, part.images, self.size) for part in parts]
        self._train, self._seed, self._names = (values[0], parts[0]), seed, parts[1].names
        return list(zip(values[1], parts[1].labels))

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        pixels, known = self._train
        asked = torch.stack([p for p, _ in items])
        learned = self.reads(*encoded(model, pixels, self.batch, self.cache))
        tested = self.reads(*encoded(model, asked, self.batch, self.cache, tick))
        with torch.inference_mode(False), torch.enable_grad():
            head = self.fit(learned.clone(), known.targets(), len(known.names), self._seed)
        logits = head.logits(tested.clone())
        truth = Labelled(None, [label for _, label in items], self._names)
        return {self.metrics[0].name: item_scores(logits, truth)}

    def fit(self, features: Any, targets: Any, classes: int, seed: int) -> Any:
        """The trained head of `features`."""
        raise NotImplementedError

    def groups(self, items: list[Any]) -> list[str] | None:
        return None if self.labels == "objects" else [self._names[label] for _, label in items]


def item_scores(logits: Any, truth: Labelled) -> list[float]:
    """Per image: 1.0 if the highest logit is the label; with several labels the mean, over the labels, of the share of
    labels among the classes that rank at least as high (label ranking average precision, 1.0 = all labels on top)."""
    if not truth.several:
        return [float(guess == label) for guess, label in zip(logits.argmax(-1).tolist(), truth.labels)]
    from sklearn.metrics import label_ranking_average_precision_score as ranking

    hot = truth.targets().numpy()
    return [float(ranking(hot[i : i + 1], logits[i : i + 1].numpy())) for i in range(len(hot))]


@dataclass
class LinearProbe(ProbeTask):
    """Accuracy of a linear classifier on frozen features.

    Attributes:
        data: testbed:scenes, testbed:digits, a folder of folders, or a hub id (see `eval.labelled`).
        labels: class, or objects (testbed:scenes: several per image; the metric is then ranking precision).
        train, test: images. token: cls, mean (of the patches), or both (concatenated). c: inverse strength of the L2
        penalty. size: side in pixels, None = as the processor does. batch: images per forward. cache: folder for
        features, None = keep none.
    """

    data: str = SCENES
    labels: Literal["class", "objects"] = "class"
    train: int = 300
    test: int = 150
    token: Literal["cls", "mean", "both"] = "cls"
    c: float = 1.0
    size: int | None = None
    batch: int = 8
    cache: str | None = None

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = "a linear classifier trained on frozen features (vision)"

    def __post_init__(self) -> None:
        self.check_fields()
        if self.token not in ("cls", "mean", "both") or not self.c > 0:
            raise ValueError(
                f"linear_probe: token={self.token!r} is cls, mean or both; c={self.c} is above 0"
            )

    def reads(self, cls: Any, patches: Any) -> Any:
        import torch

        mean = patches.mean(1)
        return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], -1)}[self.token]

    def fit(self, features: Any, targets: Any, classes: int, seed: int) -> Any:
        from .. import probing

        return probing.fit(features, targets, "linear", classes=classes, seed=seed, c=self.c)


@dataclass
class AttentiveProbe(ProbeTask):
    """Accuracy of an attentive head on frozen patch tokens.

    Attributes:
        head: ep, acmil, abmilp, simpool, … (`hf_attn_patch.probing.names`). options: of the head, e.g.
        {"queries": 8}. prefix: give the head the CLS token too (`ep_all` of the paper). steps, lr: of AdamW.
        data, labels, train, test, size, batch, cache: as for `linear_probe`.
    """

    head: str = "ep"
    options: dict[str, Any] = field(default_factory=dict)
    prefix: bool = False
    steps: int = 400
    lr: float = 2e-3
    data: str = SCENES
    labels: Literal["class", "objects"] = "class"
    train: int = 300
    test: int = 150
    size: int | None = None
    batch: int = 8
    cache: str | None = None

    name: ClassVar[str] = "attentive_probe"
    summary: ClassVar[str] = "a head (ep, acmil, …) on frozen tokens (vision)"

    def __post_init__(self) -> None:
        from .. import probing

        self.check_fields()
        probing.check(self.head, (1, 1), **self.options)
        if self.steps < 1 or not self.lr > 0:
            raise ValueError(f"attentive_probe: steps={self.steps} must be at least 1, lr={self.lr} above 0")

    def reads(self, cls: Any, patches: Any) -> Any:
        import torch

        return torch.cat([cls[:, None], patches], 1) if self.prefix else patches

    def fit(self, features: Any, targets: Any, classes: int, seed: int) -> Any:
        from .. import probing

        return probing.fit(
            features, targets, self.head, self.steps, self.lr, classes=classes, seed=seed, **self.options
        )
