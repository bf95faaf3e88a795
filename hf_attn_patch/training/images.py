"""Labelled images for training vision models: pixel values and class numbers, from the sources that tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def image_examples(
    model: Any, processor: Any, data: str, count: int, size: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Examples ``{"pixel_values": [C, height, width], "labels": number}`` of the training images of `data`.

    Args:
        processor: of the model. data: testbed:scenes, testbed:digits, a folder of class folders, or a hub id (see
        `eval.labelled`). count: images. size: side in pixels, None = as the processor does. seed: which images.

    Raises:
        ConfigError: no processor, no such data, too few images.
    """
    from ..eval.images import pixel_values
    from ..eval.labelled import labelled

    if not callable(processor):
        raise ConfigError("finetune needs the image processor of a vision model; tiny: models have none")
    try:
        train, _ = labelled("finetune", data, count, 0, seed)
        values = pixel_values(model, processor, train.images, size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [{"pixel_values": x.cpu(), "labels": label} for x, label in zip(values, train.labels)]


def check_classes(
    model: Any, rows: list[dict[str, Any]], patches: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Raises ConfigError unless a patch (``classes=``) or the model itself has as many classes as the labels show."""
    shown = max(row["labels"] for row in rows) + 1
    own = [(name, options["classes"]) for name, options in patches if options.get("classes")]
    classifies = "ForImageClassification" in type(model).__name__
    name, have = own[-1] if own else (type(model).__name__, model.config.num_labels if classifies else 0)
    if have < shown:
        raise ConfigError(
            f"finetune: the data have {shown} classes, {name} has {have or 'none'}. Give a patch with classes={shown} "
            "(prompt_cam, tcpa), or a model with a classifier for them"
        )


class CollateImages:
    """A batch of examples: pixel_values [B, C, height, width], labels int64 [B]."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
