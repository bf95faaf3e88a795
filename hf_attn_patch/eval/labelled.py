"""Images with labels for tasks that train a head or ask a classifier: rendered scenes, digits, folders, a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import images as image_source
from . import vlm_sources

SCENES, DIGITS = vlm_sources.SCENES, "testbed:digits"
TRAIN_SPLITS, TEST_SPLITS = ("train", "training"), ("test", "validation", "val", "valid")


@dataclass
class Labelled:
    """Images (PIL, or one tensor [n, 3, H, W] in 0 … 1) with labels: a class number each, or a list of several.

    names: of the classes, by number. boxes: per image (left, top, right, bottom, label) in pixels of the image, where
    the data know them. size: side of the image that boxes count in.
    """

    images: Any
    labels: list[Any]
    names: list[str]
    boxes: list[list[tuple[int, int, int, int, int]]] | None = None
    size: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def several(self) -> bool:
        """True if an image can have several labels."""
        return bool(self.labels) and isinstance(self.labels[0], list)

    def targets(self) -> Any:
        """int64 [n] of class numbers, or [n, classes] of zeros and ones."""
        import torch

        if not self.several:
            return torch.tensor(self.labels)
        hot = torch.zeros(len(self), len(self.names), dtype=torch.long)
        for row, labels in enumerate(self.labels):
            hot[row, labels] = 1
        return hot


def labelled(task: str, data: str, train: int, test: int, seed: int, labels: str = "class") -> list[Labelled]:
    """[train, test] images of `data`, no image in both.

    Args:
        data: ``testbed:scenes`` (labels=class: the scene's group; labels=objects: which objects are in it);
            ``testbed:digits`` (test: the 360 that testbed:digits was not trained on); a folder with one folder of
            image files per class, or with such folders in ``train`` and ``test`` (or ``val``); a hub id with columns
            image and label. train, test: images of each, 0 = none. seed: which ones.

    Raises:
        ValueError: no such data, too few images, a class of the test images that training lacks, labels=objects
            without objects.
    """
    if labels not in ("class", "objects"):
        raise ValueError(f"{task}: labels={labels!r} is none of class, objects")
    if labels == "objects" and data != SCENES:
        raise ValueError(f"{task}: labels=objects needs data={SCENES}; {data} has one label per image")
    if data == SCENES:
        return [_scenes(split, n, seed, labels) for split, n in (("train", train), ("test", test))]
    if data == DIGITS:
        return [_digits(task, split, n, seed) for split, n in (("train", train), ("test", test))]
    if Path(data).expanduser().is_dir():
        return _folder(task, Path(data).expanduser(), train, test, seed)
    return _hub(task, data, train, test, seed)


def _scenes(split: str, count: int, seed: int, labels: str) -> Labelled:
    from ..testbed import scenes

    names = list(scenes.GROUPS) if labels == "class" else list(scenes.NAMES)
    number = {name: n for n, name in enumerate(names)}
    rows = scenes.build(split, count, seed=seed) if count else []
    found: list[Any] = [
        number[row["group"]] if labels == "class" else sorted({number[o["name"]] for o in row["objects"]})
        for row in rows
    ]
    every = {name: n for n, name in enumerate(scenes.NAMES)}
    boxes = [[(*o["box"], every[o["name"]]) for o in row["objects"]] for row in rows]
    return Labelled([row["image"] for row in rows], found, names, boxes, scenes.SIZE)


def _digits(task: str, split: str, count: int, seed: int) -> Labelled:
    import torch

    from ..testbed import digits_vit

    try:
        values, labels = digits_vit.digits(split)
    except ImportError as error:
        raise ValueError(
            f"{task}: the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    if count > len(labels):
        raise ValueError(f"{task}: {count} {split} images asked for, {DIGITS} has {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    mean, std = digits_vit.preprocess.mean[0], digits_vit.preprocess.std[0]
    pixels = (values[order] * std + mean).expand(-1, 3, -1, -1).contiguous()
    return Labelled(pixels, labels[order].tolist(), [str(n) for n in range(10)])


def _folder(task: str, root: Path, train: int, test: int, seed: int) -> list[Labelled]:
    inside = {p.name: p for p in sorted(root.iterdir()) if p.is_dir()}
    parts = [next((inside[s] for s in splits if s in inside), None) for splits in (TRAIN_SPLITS, TEST_SPLITS)]
    wanted = [train, test]
    if any(parts):
        missing = [n for n, p, count in zip(("train", "test"), parts, wanted) if p is None and count]
        if missing:
            raise ValueError(f"{task}: {root} has a folder for one split, and none called {missing[0]}")
        files = [[] if p is None else _files(p) for p in parts]
        drawn = [_draw(task, one, n, seed, root) for one, n in zip(files, wanted)]
    else:
        both = _draw(task, _files(root), train + test, seed, root)
        drawn = [both[:train], both[train:]]
    names = sorted({name for part in drawn for _, name in part})
    known = {name for _, name in drawn[0]}
    unknown = sorted({name for _, name in drawn[1]} - known)
    if train and unknown:
        raise ValueError(
            f"{task}: no training image of {', '.join(unknown[:5])}, which the test asks for; raise train={train}"
        )
    number = {name: n for n, name in enumerate(names)}
    return [Labelled([_open(f) for f, _ in part], [number[n] for _, n in part], names) for part in drawn]


def _files(root: Path) -> list[tuple[Path, str]]:
    """(file, class) below `root`; the class is the folder directly below it."""
    return [
        (file, folder.name)
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in image_source.SUFFIXES
    ]


def _draw(task: str, files: list[Any], count: int, seed: int, where: Any) -> list[Any]:
    import numpy as np

    if count > len(files) or (count and not files):
        raise ValueError(
            f"{task}: {count} images asked for, {where} has {len(files)} in folders named by class; ask for fewer"
        )
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:count]]


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _hub(task: str, name: str, train: int, test: int, seed: int) -> list[Labelled]:
    splits = vlm_sources.hub(task, name)
    found = []
    for wanted, count in ((TRAIN_SPLITS, train), (TEST_SPLITS, test)):
        split = next((splits[s] for s in wanted if s in splits), None)
        if split is None and count:
            raise ValueError(f"{task}: {name} has no split {' or '.join(wanted)}; it has {', '.join(splits)}")
        rows = [] if split is None else split.shuffle(seed=seed).select(range(min(count, len(split))))
        images = [vlm_sources.column(task, row, "image", "img").convert("RGB") for row in rows]
        labels = [int(vlm_sources.column(task, row, "label", "labels", "fine_label")) for row in rows]
        feature = None if split is None else split.features.get("label")
        names = list(getattr(feature, "names", None) or map(str, range(max(labels, default=-1) + 1)))
        found.append(Labelled(images, labels, names))
    longest = max((part.names for part in found), key=len)
    for part in found:
        part.names = longest
    return found
