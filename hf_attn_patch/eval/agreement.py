"""`agreement`: do the features of a patched vision model still point where the dense ones did?

Per image, the cosine between the features of the same model with and without the patch: of the CLS token, and the
mean over patch tokens. 1 = same direction. It needs no labels, and bounds what any head on top can notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import images as image_source
from .features import encode
from .task import Metric, Scores, Task, Tick, require_vision_model


@dataclass
class Agreement(Task):
    """Cosine of patched and dense features.

    Attributes:
        count: images. images: a folder of image files; None = scikit-learn's digits. size: side in pixels, None = as
        the processor does. batch: images per forward.
    """

    count: int = 64
    images: str | None = None
    size: int | None = None
    batch: int = 8

    name: ClassVar[str] = "agreement"
    summary: ClassVar[str] = "features against the features of the same model, dense (vision)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("cls_cosine", "cosine", True, digits=4),
        Metric("patch_cosine", "cosine", True, digits=4),
    )

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1:
            raise ValueError(f"agreement: count={self.count} and batch={self.batch} must be at least 1")

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        if self.images is None:
            source, _ = image_source.digits(self.count, seed)
        else:
            source = image_source.folder(self.images, self.count)
        return list(image_source.pixel_values(model, processor, source, self.size))

    def reference(self, model: Any, items: list[Any]) -> Any:
        import torch

        return encode(model, torch.stack(items), self.batch)

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        cls, patches = encode(model, torch.stack(items), self.batch, tick)
        cosine = torch.nn.functional.cosine_similarity
        of_cls = cosine(cls.double(), reference[0][: len(items)].double(), dim=-1)
        of_patches = cosine(patches.double(), reference[1][: len(items)].double(), dim=-1).mean(-1)
        return {"cls_cosine": of_cls.tolist(), "patch_cosine": of_patches.tolist()}
