"""`agreement`: does a patched vision model still see what the dense one saw? Features, logits, and attention left.

Per image, the same model with and without the patch: cosine of the CLS token and mean cosine of the patch tokens, of
the last layer and of every other; the share of dense attention on keys that the patch lets be read
(`eval.kept_mass`); and, where there are logits, whether the top class is the same, and KL(dense || patched). Cosines
need no labels and no head; the last two say what a head that was trained on the dense features would notice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..api import active
from ..model.sites import base_model, find_sites
from . import images as image_source
from .feature_cache import encoded
from .kept_mass import kept_mass
from .labelled import labelled
from .states import States, states
from .task import Detail, Metric, Scores, Task, Tick, require_vision_model

COSINES = (Metric("cls_cosine", "cosine", True, digits=4), Metric("patch_cosine", "cosine", True, digits=4))
KEPT = Metric("kept_mass", "share", True, digits=4)
OF_LOGITS = (Metric("top1_agreement", "share", True, digits=3), Metric("kl", "nats", False, digits=4))
OWN_KEYS = (
    "kept mass –: the patch reads keys of its own (agents, pooled cells, prompts), not those of the model"
)
BY_LAYER = ("cls_cosine", "patch_cosine", "kept_mass")


@dataclass(frozen=True)
class Image:
    """One item. number: its row in the reference. pixels: [C, H, W] as the model wants them."""

    number: int
    pixels: Any


@dataclass
class Agreement(Task):
    """Features, logits and attention of the patched model against those of the dense one.

    Attributes:
        count: images. images: a folder of image files, no labels needed. data: labelled images instead (see
        `eval.labelled`: testbed:scenes, testbed:digits, a folder with one folder per class, a hub id). Neither of the
        two: scikit-learn's digits. size: side in pixels, None = as the processor does. batch: images per forward.
        probe: training images for a linear classifier on the dense CLS features, whose logits are then compared; 0 =
        the classifier of the model, if it has one. cache: folder for the features of those images, None = keep none.
        layers: cosines of every layer and the kept mass, for one more dense forward per variant.
    """

    count: int = 64
    images: str | None = None
    data: str | None = None
    size: int | None = None
    batch: int = 8
    probe: int = 0
    cache: str | None = None
    layers: bool = True

    name: ClassVar[str] = "agreement"
    summary: ClassVar[str] = "features, logits, attention: patched against dense (vision)"
    metrics: ClassVar[tuple[Metric, ...]] = (*COSINES, KEPT)

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1 or self.probe < 0:
            raise ValueError(
                f"agreement: count={self.count} and batch={self.batch} must be at least 1, probe={self.probe} at "
                "least 0"
            )
        if self.images is not None and (self.data is not None or self.probe):
            asked = f"data={self.data}" if self.data is not None else f"probe={self.probe}"
            raise ValueError(
                f"agreement: images={self.images} has no labels, so it cannot go with {asked}. Leave images out and "
                "name labelled images with data="
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        self._seed, self._carried = seed, [handle._entry for handle in active(model)]
        source = self._source(model, processor, seed)
        pixels = image_source.pixel_values(model, processor, source, self.size)
        first = states(model, pixels[:1], self.layers)  # what this model has to compare
        sites = {site.layer for site in find_sites(base_model(model))}
        self._layers = sorted(sites | set(range(len(first.layers)))) if self.layers else []
        self._by_number = (
            len(first.layers) > 1 or len(sites) == 1
        )  # else the model gives its last layer alone
        has_logits = self.probe > 0 or first.logits is not None
        kept = (KEPT,) if self.layers else ()
        self.metrics = (*COSINES, *kept, *(OF_LOGITS if has_logits else ()))  # type: ignore[misc]
        return [Image(number, one) for number, one in enumerate(pixels)]

    def _source(self, model: Any, processor: Any, seed: int) -> Any:
        """The images; those for the probe are set aside, with their labels."""
        if self.images is not None:
            return image_source.folder(self.images, self.count)
        if self.data is None:
            pixels, labels = image_source.digits(self.count + self.probe, seed)
            training, classes = (pixels[self.count :], labels[self.count :]), 10
            source = pixels[: self.count]
        else:
            train, test = labelled(self.name, self.data, self.probe, self.count, seed)
            training, classes, source = (train.images, train.labels), len(test.names), test.images
        if self.probe:
            values = image_source.pixel_values(model, processor, training[0], self.size)
            self._train = values, training[1], classes
        return source

    def reference(self, model: Any, items: list[Any]) -> Any:
        """(cls [n, D], patches [n, T, D], logits [n, K] or None, the probe or None) of the model as it was given."""
        import torch

        head = self._probe(model) if self.probe else None
        found = [
            [x.cpu() for x in (one.cls(), one.patches(), *_logits(one, head))]
            for one in (states(model, part) for part in _pixels(items).split(self.batch))
        ]
        cls, patches, *logits = (torch.cat(parts) for parts in zip(*found))
        return cls, patches, logits[0] if logits else None, head

    def _probe(self, model: Any) -> Any:
        import torch

        from .. import probing

        pixels, labels, classes = self._train
        cls, _ = encoded(model, pixels, self.batch, self.cache)
        with torch.inference_mode(False), torch.enable_grad():
            return probing.fit(cls.clone(), torch.tensor(labels), "linear", classes=classes, seed=self._seed)

    def batches(self, items: list[Any]) -> list[list[int]]:
        return [list(range(i, min(i + self.batch, len(items)))) for i in range(0, len(items), self.batch)]

    def columns(self) -> list[str]:
        return [*super().columns(), *(f"{name} layer {n}" for n in self._layers for name in BY_LAYER)]

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        scores: Scores = {name: [] for name in self.columns()}
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            for name, values in self._compared(model, part, reference).items():
                scores[name] += values.tolist()
            tick(len(part))
        return scores

    def _compared(self, model: Any, part: list[Any], reference: Any) -> dict[str, Any]:
        """Column -> number per image, for one batch."""
        pixels, numbers = _pixels(part), [image.number for image in part]
        cls, patches, logits, head = reference
        found = self._by_layer(model, pixels) if self.layers else {}
        now = found.pop("now", None) or states(model, pixels)
        found["cls_cosine"] = _cosine(now.cls(), cls[numbers])
        found["patch_cosine"] = _cosine(now.patches(), patches[numbers]).mean(-1)
        if logits is not None:
            found.update(_against(logits[numbers], _logits(now, head)[0].cpu()))
        return found

    def _by_layer(self, model: Any, pixels: Any) -> dict[str, Any]:
        """The patched states as "now", and what is told of every layer, against a dense forward of the same images."""
        import torch

        new = [handle for handle in active(model) if all(handle._entry is not e for e in self._carried)]
        with kept_mass(model, new, len(pixels)) as kept:
            dense = states(model, pixels, every_layer=True)
        now = states(model, pixels, every_layer=True)
        found: dict[str, Any] = {"now": now}
        whole, unknown = (torch.full((len(pixels),), x, dtype=torch.float64) for x in (1.0, math.nan))
        for n in self._layers:
            # a layer without the patch reads all it did
            found[f"kept_mass layer {n}"] = torch.stack(kept[n]).mean(0) if n in kept else whole
            known = self._by_number and all(
                n < len(x.layers) and x.layers[n] is not None for x in (now, dense)
            )
            found[f"cls_cosine layer {n}"] = _cosine(now.cls(n), dense.cls(n)) if known else unknown
            found[f"patch_cosine layer {n}"] = (
                _cosine(now.patches(n), dense.patches(n)).mean(-1) if known else unknown
            )
        found["kept_mass"] = torch.stack([found[f"kept_mass layer {n}"] for n in self._layers]).mean(0)
        return found

    def details(self, scores: Mapping[str, Scores]) -> list[Detail]:
        """One row per layer; a column per variant with its three means."""
        patched = list(scores)[1:]
        if not self._layers or not patched:
            return []
        cell = lambda of, n: " / ".join(_mean(of[f"{name} layer {n}"]) for name in BY_LAYER)
        rows = [(str(n), *(cell(scores[label], n) for label in patched)) for n in self._layers]
        unknown = any(math.isnan(x) for label in patched for x in scores[label]["kept_mass"])
        title = "by layer: CLS cosine / patch cosine / kept mass"
        return [Detail(title, ("layer", *patched), tuple(rows), OWN_KEYS if unknown else "")]


def _pixels(items: list[Image]) -> Any:
    import torch

    return torch.stack([image.pixels for image in items])


def _logits(one: States, head: Any) -> list[Any]:
    """[logits [B, K]] by the probe, else by the model; [] where neither is there."""
    if head is not None:
        return [head.logits(one.cls().cpu().clone())]
    return [] if one.logits is None else [one.logits]


def _cosine(a: Any, b: Any) -> Any:
    """float64 over the last axis."""
    import torch

    return torch.nn.functional.cosine_similarity(a.cpu().double(), b.cpu().double(), dim=-1)


def _against(dense: Any, patched: Any) -> dict[str, Any]:
    """Per image: 1.0 if the top class is the same, and KL(dense || patched) in nats; logits [B, K]."""
    p, q = (x.double().log_softmax(-1) for x in (dense, patched))
    same = dense.argmax(-1) == patched.argmax(-1)
    return {"top1_agreement": same.double(), "kl": (p.exp() * (p - q)).sum(-1)}


def _mean(values: list[float]) -> str:
    mean = float(np.mean(values))
    return "–" if math.isnan(mean) else f"{mean:.3f}"
