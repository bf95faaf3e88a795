"""`localization`: does a heat map of a vision model lie on the objects that make the class of a scene?

Pointing game (arXiv 1608.00507): is the largest value of the map inside a box? Energy in boxes (arXiv 1910.01279): the
share of the map's mass that is inside. Both are read beside the share of the picture that the boxes cover, which is
what a uniform map gets in the mean. Rendered scenes know their boxes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

from ..registry import Patch
from ..testbed import scenes as scenes_module
from . import images as image_source
from . import localization_pictures
from .features import _last_hidden_state, prefix_tokens
from .labelled import SCENES, Labelled, labelled
from .localization_pictures import enlarged, peak
from .task import Metric, Scores, Task, Tick, require_vision_model

Box = tuple[int, int, int, int]
PICTURED = 12  # scenes that the page shows


class Object(NamedTuple):
    """One thing in a scene; box in pixels of the scene's own picture, wanted: it belongs to the scene's group."""

    name: str
    box: Box
    wanted: bool


class Item(NamedTuple):
    """A scene: pixels [3, height, width] for the model, number and name of its group, its picture, what is in it."""

    pixels: Any
    label: int
    group: str
    image: Any
    objects: list[Object]

    @property
    def boxes(self) -> list[Box]:
        """Of the objects that belong to the group."""
        return [thing.box for thing in self.objects if thing.wanted]

    def under(self, x: int, y: int) -> str:
        """What is at a place: an object of the group if there is one, "background" if there is nothing."""
        inside = [o for o in self.objects if o.box[0] <= x < o.box[2] and o.box[1] <= y < o.box[3]]
        return min(inside, key=lambda o: not o.wanted).name if inside else "background"


@dataclass
class Localization(Task):
    """Heat maps against the boxes of the objects that belong to a scene's group.

    Attributes:
        map: cls = what CLS reads in the last layer, mean over heads; prompt_cam = what the prompt of the true class
        reads there (the model must carry `prompt_cam` trained on the groups of testbed:scenes, e.g. ``--adapter``).
        test: scenes. size: side in pixels, None = as the processor does. batch: images per forward.

    An answer is what lies under the largest value of the map. Pictures on the page are of the model as it is given,
    beside the CLS map of the same model without its prompts.
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
        found = [
            Item(pixels, label, scenes.names[label], image, objects)
            for pixels, label, image, objects in zip(values, scenes.labels, scenes.images, objects_of(scenes))
        ]
        # objects can fall off a full scene, all of a group's too
        return [item for item in found if item.boxes]

    def _check_classes(self, model: Any, scenes: Labelled) -> None:
        from ..patches.vision.prompt_cam import answering

        classes = answering(model)[1].classes
        if classes != len(scenes.names):
            raise ValueError(
                f"localization: the model's prompt_cam has {classes} classes, the scenes have {len(scenes.names)} "
                "groups; train it with hf-attn-patch finetune --data testbed:scenes"
            )

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        scores: Scores = {metric.name: [] for metric in self.metrics}
        self.answers: list[str] = []
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            for one, item in zip(self.maps(model, part), part):
                found = on_boxes(one, item.boxes, scenes_module.SIZE)
                for name, value in found.items():
                    scores[name].append(value)
                self.answers.append(
                    f"{'hit' if found['pointing'] else 'miss'}: {item.under(*peak(one, scenes_module.SIZE))}"
                )
            tick(len(part))
        return scores

    def maps(self, model: Any, items: list[Item]) -> Any:
        """Maps [n, rows, columns] of scenes, float32 on the CPU."""
        import torch

        pixels = torch.stack([item.pixels for item in items])
        if self.map == "cls":
            return cls_maps(model, pixels).float().cpu()
        from ..patches.vision.prompt_cam import class_maps

        labels = torch.tensor([item.label for item in items])
        return class_maps(model, pixels).of(labels).float().cpu()

    def groups(self, items: list[Any]) -> list[str]:
        return [item.group for item in items]

    def facts(self, items: list[Item]) -> list[dict[str, Any]]:
        return [
            {"expected": sorted({o.name for o in item.objects if o.wanted}), "group": item.group}
            for item in items
        ]

    def marks(self, item: Item, answer: str) -> list[tuple[int, int, str]]:
        verdict = answer.partition(":")[0]
        return [(0, len(verdict), "good" if verdict == "hit" else "bad")]

    def attachments(self, items: list[Item], most: int) -> list[dict[str, str]]:
        return [
            {"boxes: objects of the group": localization_pictures.drawn(item.image, item.boxes)}
            for item in items[: min(most, PICTURED)]
        ]

    def pictures(
        self, model: Any, processor: Any, items: list[Item], answers: list[str]
    ) -> list[dict[str, str]]:
        if find_spec("matplotlib") is None:
            return []
        shown = items[:PICTURED]
        title = "cls" if self.map == "cls" else "prompt_cam of the true group"
        found = {f"{title}, ring: its peak": self.maps(model, shown)}
        if self.map == "prompt_cam":
            with without_prompts(model):
                found["cls, without prompts"] = replace(self, map="cls").maps(model, shown)
        return [
            {k: localization_pictures.drawn(item.image, item.boxes, maps[n]) for k, maps in found.items()}
            for n, item in enumerate(shown)
        ]


def objects_of(scenes: Labelled) -> list[list[Object]]:
    """What is in each scene, in the order it was drawn."""
    members = [
        {scenes_module.NAMES.index(name) for name in scenes_module.GROUPS[group]} for group in scenes.names
    ]
    return [
        [Object(scenes_module.NAMES[box[4]], box[:4], box[4] in members[label]) for box in boxes]
        for label, boxes in zip(scenes.labels, scenes.boxes or [])
    ]


def class_boxes(scenes: Labelled) -> list[list[Box]]:
    """Per scene the boxes (left, top, right, bottom) of the objects that belong to its group."""
    return [[thing.box for thing in objects if thing.wanted] for objects in objects_of(scenes)]


@contextmanager
def without_prompts(model: Any) -> Iterator[None]:
    """Inside, `prompt_cam` of `model` is off."""
    from ..api import active
    from ..patches.vision.prompt_cam import PromptCam

    with ExitStack() as off:
        for handle in active(model):
            if isinstance(handle.config, PromptCam):
                off.enter_context(handle.disabled())
        yield


def on_boxes(heat: Any, boxes: list[Box], side: int) -> dict[str, float]:
    """pointing, energy and box_area of one map [rows, columns], brought to `side` x `side` pixels bilinearly.

    Raises:
        ValueError: the map has no positive mass, so neither figure is defined.
    """
    import torch

    large = enlarged(heat, side)
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
    from ..forward.needs.grid import grid_of
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
