"""The vision half of the demo."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .. import measurements, pictures
from ..agreement import Agreement
from ..harness import DENSE, evaluating, run
from ..images import digits, pixel_values
from ..knn import Knn
from .common import Choice, Size, Step, column, follow, part, rounds, row, state

LARGE = 518


def choices() -> dict[str, Choice]:
    """The patches the model is shown with, by label."""
    return {
        "neighborhood 7 × 7": ("neighborhood", {"window": 7}),
        "neighborhood 11 × 11": ("neighborhood", {"window": 11}),
    }


def pixels_of(model: Any, preprocess: Any, count: int, seed: int, side: int | None = None) -> Any:
    """`count` digits as the model wants them, [count, 3, side, side]."""
    return pixel_values(model, preprocess, digits(count, seed)[0], side)


def measure(
    model: Any, preprocess: Any, patches: Mapping[str, Choice], size: Size, seed: int, step: Step
) -> list[dict[str, Any]]:
    """Agreement, k-NN accuracy and speed of `model`, dense and with each patch: one part per image size."""
    several = len(patches) + 1
    common: dict[str, Any] = {"patches": patches, "seed": seed}
    agreement = run(
        Agreement(count=size.agreement_images, layers=False),
        model,
        preprocess,
        progress=follow(step, "agreement", several),
        **common,
    )
    knn = run(
        Knn(train=size.knn_train, test=size.knn_test),
        model,
        preprocess,
        progress=follow(step, "k-NN", several),
        **common,
    )
    small = pixels_of(model, preprocess, size.speed_images, seed)
    seconds, seen = speed(model, small, 8, patches, size.rounds + 1, "images, 224 px", step)
    first = _part(model, patches, [agreement, knn], seconds, seen, small)
    parts = [{**first, "drawn": ["cls_cosine", "knn", "images"]}]
    if size.large_images:
        agreement = run(
            Agreement(count=size.large_images, size=LARGE, batch=2, layers=False),
            model,
            preprocess,
            progress=follow(step, f"agreement, {LARGE} px", several),
            **common,
        )
        large = pixels_of(model, preprocess, size.large_images, seed, LARGE)
        seconds, seen = speed(model, large, 2, patches, size.rounds, f"images, {LARGE} px", step)
        last = list(patches)[-1]  # the same pictures for every patch would say nothing new
        parts.append(_part(model, patches, [agreement], seconds, seen, large))
        parts[-1]["pictures"] = {last: seen[last]}
    return parts


def speed(
    model: Any,
    pixels: Any,
    batch: int,
    patches: Mapping[str, Choice],
    repeats: int,
    what: str,
    step: Step,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """(seconds per round over all `pixels`, what was read) by label."""
    seen: dict[str, dict[str, Any]] = {}

    def once(label: str, choice: Choice | None) -> float:
        with state(model, choice) as handle:
            if handle is not None and label not in seen:
                measurements.time_images(
                    model, pixels[:batch], batch
                )  # layouts are built at the first forward
                seen[label] = pictures.vision(handle, pixels)
            return measurements.time_images(model, pixels, batch)

    with evaluating(model):
        measurements.time_images(model, pixels[:batch], batch)
        return rounds(patches, once, repeats, what, step), seen


def _part(
    model: Any,
    patches: Mapping[str, Choice],
    results: list[Any],
    seconds: Mapping[str, list[float]],
    seen: Mapping[str, dict[str, Any]],
    pixels: Any,
) -> dict[str, Any]:
    side, agreement = pixels.shape[-1], results[0]
    knn = results[1] if len(results) > 1 else None
    rows = []
    for label in [DENSE, *patches]:
        values = dict(agreement[label].aggregates)
        if knn is not None:
            values["knn"] = knn[label].aggregates["accuracy"]
        values["images"] = len(pixels) / statistics.median(seconds[label])
        rows.append(row(label, patches.get(label), values, seen.get(label)))
    turns = f"{side} × {side} pixels, median of {len(seconds[DENSE])}, in turns"
    accuracy = f"scikit-learn's digits by their nearest CLS features{f', {knn.items} images' if knn else ''}"
    columns = [
        column(
            "cls_cosine", "CLS cosine", "cosine", "higher", 4, "to the dense CLS features, mean over images"
        ),
        column(
            "patch_cosine",
            "patch cosine",
            "cosine",
            "higher",
            4,
            "to the dense patch features, mean over patches",
        ),
        *([column("knn", "k-NN accuracy", "%", "higher", 1, accuracy)] if knn else []),
        column("images", "images/s", "", "higher", 2, turns),
        column("density", "pairs read", "%", "none", 1, "of the (query, key) pairs"),
    ]
    grid = side // model.config.patch_size
    title = f"{side} × {side} pixels, {1 + grid**2} tokens"
    return part(model, title, columns, rows, results, {"image_seconds": dict(seconds)}, seen)
