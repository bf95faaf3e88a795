"""`localization`: does a heat map of a vision model lie on the objects that make the class of a scene?

Pointing game (arXiv 1608.00507): is the largest value of the map inside a box? Energy in boxes (arXiv 1910.01279): the
share of the map's mass that is inside. Both are read beside the share of the picture that the boxes cover, which is
what a uniform map gets in the mean. Rendered scenes know their boxes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from ..registry import Patch
from . import images as image_source
from .features import _last_hidden_state, prefix_tokens
from .labelled import SCENES, Labelled, labelled
from .task import Metric, Scores, Task, Tick, require_vision_model

Box = tuple[int, int, int, int]


@dataclass
class Localization(Task):
    """Heat maps against the boxes of the objects that belong to a scene's group.

    Attributes:
        map: cls = what CLS reads in the last layer, mean over heads; prompt_cam = what the prompt of the true class
        reads there (the model must carry `prompt_cam` trained on the groups of testbed:scenes, e.g. ``--adapter``).
        test: scenes. size: side in pixels, None = as the processor does. batch: images per forward.
    """

    map: Literal["cls", "prompt_cam"] = "cls"
    test: int = 100
    size: int | None = None
    batch: int = 8

    name: ClassVar[str] = "localization"
    summary: ClassVar[str] = "heat maps against boxes of objects (vision)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("pointing", "share", True, digits=3),
        Metric("energy", "share", True, digits=3),
        Metric("box_area", "share", None, digits=3),
    )

    def __post_init__(self) -> None:
        if min(self.test, self.batch) < 1 or self.map not in ("cls", "prompt_cam"):
            raise ValueError(
                f"localization: test={self.test} and batch={self.batch} must be at least 1, "
                f"map={self.map!r} cls or prompt_cam"
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Any]:
        require_vision_model(self.name, model, processor)
        _, scenes = labelled(self.name, SCENES, 0, self.test, seed)
        if self.map == "prompt_cam":
            self._check_classes(model, scenes)
        values = image_source.pixel_values(model, processor, scenes.images, self.size)
        side = scenes.size
        found = zip(values, scenes.labels, class_boxes(scenes))
        # objects can fall off a full scene, all of a group's too
        return [(x, label, boxes, side, scenes.names[label]) for x, label, boxes in found if boxes]

    def _check_classes(self, model: Any, scenes: Labelled) -> None:
        from ..patches.vision.prompt_cam import answering

        classes = answering(model)[1].classes
        if classes != len(scenes.names):
            raise ValueError(
                f"localization: the model's prompt_cam has {classes} classes, the scenes have {len(scenes.names)} "
                "groups; train it with hf-attn-patch finetune --data testbed:scenes"
            )

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        import torch

        scores: Scores = {metric.name: [] for metric in self.metrics}
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            pixels = torch.stack([item[0] for item in part])
            if self.map == "cls":
                maps = cls_maps(model, pixels)
            else:
                from ..patches.vision.prompt_cam import class_maps

                maps = class_maps(model, pixels).of(torch.tensor([item[1] for item in part]))
            for one, (_, _, boxes, side, _) in zip(maps.float().cpu(), part):
                for name, value in on_boxes(one, boxes, side).items():
                    scores[name].append(value)
            tick(len(part))
        return scores

    def groups(self, items: list[Any]) -> list[str]:
        return [item[-1] for item in items]


def class_boxes(scenes: Labelled) -> list[list[Box]]:
    """Per scene the boxes (left, top, right, bottom) of the objects that belong to its group."""
    from ..testbed import scenes as module

    members = [{module.NAMES.index(name) for name in module.GROUPS[group]} for group in scenes.names]
    return [
        [box[:4] for box in boxes if box[4] in members[label]]
        for label, boxes in zip(scenes.labels, scenes.boxes or [])
    ]


def on_boxes(heat: Any, boxes: list[Box], side: int) -> dict[str, float]:
    """pointing, energy and box_area of one map [rows, columns], brought to `side` x `side` pixels bilinearly.

    Raises:
        ValueError: the map has no positive mass, so neither figure is defined.
    """
    import torch

    large = torch.nn.functional.interpolate(
        heat[None, None], (side, side), mode="bilinear", align_corners=False
    )[0, 0]
    if not float(large.sum()) > 0:
        raise ValueError("localization: a heat map without mass")
    inside = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    return {
        "pointing": float(inside.flatten()[large.argmax()]),
        "energy": float(large[inside].sum() / large.sum()),
        "box_area": float(inside.float().mean()),
    }


@dataclass
class LastCall(Patch):
    """Keeps the last attention call of a forward, with the edits of all patches before it; in no registry."""

    name = "last_call"
    parts = ("vision",)

    kept: Any = field(default=None)

    def edit(self, program: Any, call: Any) -> None:
        program.observe(lambda program, output: self.kept.__setitem__(0, program))


def cls_maps(model: Any, pixels: Any) -> Any:
    """What CLS reads in the last layer, mean over heads: [B, rows, columns]; patches of the model have their say.

    Raises:
        ValueError: the model has no CLS token or no grid of patches.
    """
    import torch

    from ..api import patched
    from ..pixel_grid import grid_of
    from ..kernels import attention

    kept: dict[int, Any] = {}
    with torch.inference_mode(), patched(model, LastCall(kept=kept)):
        tokens = _last_hidden_state(model, pixels).shape[1]
        grid, prefix = grid_of(pixels, model.config), prefix_tokens(model, pixels, tokens)
        if grid is None or not prefix:
            raise ValueError(
                f"localization: {type(model).__name__} has no CLS token or no grid; give map=prompt_cam"
            )
        weights = attention(replace(kept[0], need_weights=True, observers=[]), "reference").weights
    assert weights is not None
    row = weights[:, :, -tokens]  # tokens that a patch has added come before CLS
    return row[..., -grid[0] * grid[1] :].mean(1).unflatten(-1, grid[:2])
