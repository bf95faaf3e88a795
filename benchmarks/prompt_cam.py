"""`prompt_cam` on DINOv2-S: trained on rendered scenes, then accuracy, pointing game and pictures on other scenes.

    python -m benchmarks.prompt_cam --out benchmarks/results/prompt-cam-scenes.md --picture docs/images/prompt_cam.png

Label = the scene's group (kitchen, street, …). Layers before the first prompted one never change, so their output is
computed once (`tail`) and the prompts are trained on it with the recipe of the probing heads: the same numbers as
training on pixels (`tests/test_prompt_cam.py`), at half the cost. ``--adapter FOLDER`` loads prompts that are already
trained, also those of ``hf-attn-patch finetune``. ``--held-out N`` scores N further training scenes instead of the test
scenes; recipe and layers were chosen there.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hf_attn_patch as hap
from hf_attn_patch import __version__, probing, testbed, training
from hf_attn_patch.eval.feature_cache import encoded
from hf_attn_patch.eval.images import pixel_values
from hf_attn_patch.eval.labelled import SCENES, Labelled, labelled
from hf_attn_patch.eval.localization import class_boxes, cls_maps, on_boxes
from hf_attn_patch.eval.localization_pictures import overlay, peak
from hf_attn_patch.patches.vision.prompt_cam import class_maps, rank_heads
from hf_attn_patch.probing.recipe import descend
from hf_attn_patch.training.checks import patch_parameters

COMMAND, HOW = "python -m benchmarks.prompt_cam", "how.txt"
PLACED = "pointing", "energy"


class Skipped(nn.Module):
    """In place of a layer whose output is given: hands on its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


@contextmanager
def tail(model: Any, first: int) -> Iterator[None]:
    """Inside, a `Dinov2Model` takes the tokens [B, N, C] that enter layer `first` for its pixels."""
    layers, embeddings = model.encoder.layer, model.embeddings
    kept = list(layers[:first])
    model.embeddings = Skipped()
    for number in range(first):
        layers[number] = Skipped()
    try:
        yield
    finally:
        model.embeddings = embeddings
        for number, layer in enumerate(kept):
            layers[number] = layer


@torch.no_grad()
def entering(model: Any, first: int, pixels: Tensor, batch: int = 32) -> Tensor:
    """Tokens [n, N, C] that enter layer `first`, for images [n, 3, height, width]."""
    found: list[Tensor] = []
    hook = model.encoder.layer[first].register_forward_pre_hook(
        lambda _, args: found.append(args[0]), prepend=True
    )
    try:
        for part in pixels.split(batch):
            model(pixel_values=part)
    finally:
        hook.remove()
    return torch.cat(found)


class Prompts(nn.Module):
    """A patched model as a head on tokens, for `descend`; says every `every` steps how it goes."""

    def __init__(self, model: Any, every: int = 50):
        super().__init__()
        self.model, self.every = model, every
        self.seen: list[float] = []
        self.started = time.monotonic()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = self.model(pixel_values=x, labels=labels).loss
        self.seen.append(float(loss.detach()))
        if len(self.seen) % self.every == 0:
            mean = np.mean(self.seen[-self.every :])
            print(
                f"step {len(self.seen)}: loss {mean:.3f}, {time.monotonic() - self.started:.0f} s", flush=True
            )
        return loss


def train(model: Any, handle: Any, pixels: Tensor, labels: Tensor, given: argparse.Namespace) -> Prompts:
    """Train the prompts of `handle` in place."""
    model.requires_grad_(False)
    for parameter in patch_parameters(model).values():
        parameter.requires_grad_(True)
    first = min(site.layer for site in handle.sites)
    tokens, head = entering(model, first, pixels), Prompts(model)
    torch.manual_seed(given.seed)
    with tail(model, first):
        descend(head, tokens, labels, given.steps, given.lr, given.batch, given.decay, given.warmup)
    model.eval()
    return head


def scored(model: Any, scenes: Labelled, pixels: Tensor, batch: int = 50) -> dict[str, np.ndarray]:
    """Numbers per scene of a model with prompts, [n]; scenes whose objects have all fallen off have no boxes: nan."""
    labels, rows = torch.tensor(scenes.labels), []
    for start in range(0, len(pixels), batch):
        part, truth = pixels[start : start + batch], labels[start : start + batch]
        found = class_maps(model, part)
        best = found.logits.topk(5, -1).indices
        maps = {
            "true": found.of(truth),
            "predicted": found.of(best[:, 0]),
            "cls with prompts": cls_maps(model, part),
        }
        boxes = class_boxes(scenes)[start : start + batch]
        for n, one in enumerate(boxes):
            row = {"top1": float(best[n, 0] == truth[n]), "top5": float(truth[n] in best[n])}
            for name, heat in maps.items():
                row |= {f"{name} {k}": v for k, v in placed(heat[n], one, scenes.size).items()}
            rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def placed(heat: Tensor, boxes: list[Any], side: int) -> dict[str, float]:
    """`on_boxes`, nan without boxes."""
    return (
        on_boxes(heat.float(), boxes, side)
        if boxes
        else dict.fromkeys(("pointing", "energy", "box_area"), np.nan)
    )


def dense_scored(
    model: Any, train: Labelled, test: Labelled, known: Tensor, asked: Tensor, cache: str | None
) -> dict[str, np.ndarray]:
    """The model without prompts: its CLS maps, and a linear probe on CLS from the same training scenes."""
    fitted = probing.fit(
        encoded(model, known, 50, cache)[0], train.targets(), "linear", classes=len(train.names)
    )
    best = fitted.logits(encoded(model, asked, 50, cache)[0]).topk(5, -1).indices
    truth = torch.tensor(test.labels)
    found = {"top1": best[:, 0] == truth, "top5": (best == truth[:, None]).any(-1)}
    maps = torch.cat([cls_maps(model, part) for part in asked.split(50)])
    rows = [placed(heat, boxes, test.size) for heat, boxes in zip(maps, class_boxes(test))]
    numbers = {f"cls {name}": np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: value.float().numpy() for name, value in found.items()} | numbers


def interval(values: np.ndarray, digits: int) -> str:
    """Mean and 95 % interval of a bootstrap over scenes."""
    values = values[~np.isnan(values)]
    draws = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return f"{values.mean():.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def tables(ours: dict[str, np.ndarray], dense: dict[str, np.ndarray]) -> list[str]:
    lines = ["| | top-1 | top-5 |", "|---|---|---|"]
    for label, one in (("`prompt_cam`", ours), ("linear probe on CLS, same training scenes", dense)):
        lines.append(f"| {label} | {interval(one['top1'], 3)} | {interval(one['top5'], 3)} |")
    gap = ours["top1"] - dense["top1"]
    lines += [f"| difference | {interval(gap, 3)} | {interval(ours['top5'] - dense['top5'], 3)} |", ""]
    right = ours["top1"] == 1
    maps = {"CLS, model without prompts": [dense[f"cls {name}"] for name in PLACED]}
    for label, kind, chosen in (
        ("CLS, model with prompts", "cls with prompts", True),
        ("`prompt_cam`, true group", "true", True),
        ("`prompt_cam`, predicted group", "predicted", True),
        ("`prompt_cam`, true group, where the answer is right", "true", right),
        ("`prompt_cam`, true group, where it is wrong", "true", ~right),
    ):
        maps[label] = [np.where(chosen, ours[f"{kind} {name}"], np.nan) for name in PLACED]
    lines += [
        "| map | pointing | energy in boxes | pointing, minus CLS | energy, minus CLS |",
        "|---|---|---|---|---|",
    ]
    base = maps["CLS, model without prompts"]
    for label, found in maps.items():
        gaps = ["", ""] if found is base else [interval(one - plain, 3) for one, plain in zip(found, base)]
        lines.append(f"| {label} | " + " | ".join([*(interval(one, 3) for one in found), *gaps]) + " |")
    area = np.nanmean(dense["cls box_area"])
    return [*lines, "", f"The boxes cover {area:.3f} of a picture, which a map without a preference gets."]


def picture(model: Any, dense: Any, scenes: Labelled, pixels: Tensor, path: Path, heads: int = 3) -> None:
    """A row per scene: its boxes, the CLS map, the maps of the true group and of its strongest rival, and those of the
    most important heads for the true group."""
    from matplotlib.figure import Figure

    found, cls = class_maps(model, pixels), cls_maps(dense, pixels)
    figure = Figure(figsize=(1.5 * (4 + heads), 1.75 * len(pixels)), layout="constrained")
    axes = figure.subplots(len(pixels), 4 + heads)
    chance = found.logits.softmax(-1)
    columns = ["scene", "CLS, no prompts", "true group", "strongest rival"]
    columns += [f"true group, head {n + 1}" for n in range(heads)]
    for n, (row, label, boxes) in enumerate(zip(axes, scenes.labels, class_boxes(scenes))):
        rival = int(found.logits[n].index_fill(0, torch.tensor(label), -torch.inf).argmax())
        ranking = rank_heads(model, pixels[n : n + 1], label)
        panels = [(None, scenes.names[label]), (cls[n], verdict(cls[n], boxes, scenes.size))]
        for c in (label, rival):
            title = f"{scenes.names[c]} {chance[n, c]:.0%}"
            heat = found.of(c)[n]
            panels.append((heat, f"{title}, {verdict(heat, boxes, scenes.size)}" if c == label else title))
        for k, head in enumerate(ranking.heads[:heads]):
            # what is left of the probability if only the heads up to this one can choose what they read
            left = f"{'only ' if k == 0 else '+ '}head {head}: {ranking.probabilities[-2 - k]:.0%}"
            panels.append((found.of(label, [head])[n], left))
        for ax, (heat, title), column in zip(row, panels, columns):
            above = f"$\\bf{{{column.replace(' ', chr(92) + ' ')}}}$\n" if n == 0 else ""
            show(ax, np.asarray(scenes.images[n]), heat, boxes, above + title)
    write(figure, path)


def verdict(heat: Tensor, boxes: list[Any], side: int) -> str:
    """Of the pointing game."""
    return "hit" if placed(heat, boxes, side)["pointing"] else "miss"


def show(ax: Any, image: np.ndarray, heat: Tensor | None, boxes: list[Any], title: str) -> None:
    """A panel: the scene, or a map over it with a ring around its largest value; boxes on both."""
    from matplotlib.patches import Rectangle

    ax.imshow(image if heat is None else overlay(image, heat))
    ax.set_title(title, fontsize=8)
    ax.set_axis_off()
    for left, top, right, bottom in boxes:
        edge = {"fill": False, "edgecolor": "black" if heat is None else "white", "linewidth": 0.9}
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, **edge))
    if heat is not None:
        ax.plot(*peak(heat, len(image)), "o", markersize=7, markerfacecolor="none", markeredgecolor="cyan")


def write(figure: Any, path: Path) -> None:
    """A PNG of 256 colours, a third as large as one of all colours."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("images", 1200),
        ("test", 400),
        ("size", 112),
        ("steps", 1000),
        ("batch", 16),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 1e-2), ("decay", 0.0), ("warmup", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--layers", default="-2:", help="layers with prompts")
    parser.add_argument("--adapter", help="folder of trained prompts; nothing is trained")
    parser.add_argument(
        "--cache", help="folder for features of the model without prompts; none are kept without it"
    )
    parser.add_argument("--save", help="folder for the trained prompts")
    parser.add_argument(
        "--held-out", type=int, default=0, help="score so many further training scenes instead of test"
    )
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    parser.add_argument(
        "--picture", type=Path, help="write the picture of the first five scenes to this file"
    )
    return parser.parse_args()


def split(given: argparse.Namespace) -> tuple[Labelled, Labelled]:
    """Training scenes, and those to score: test scenes, or training scenes behind them."""
    held = given.held_out
    train, test = labelled("prompt_cam", SCENES, given.images + held, 0 if held else given.test, seed=0)
    if not held:
        return train, test
    parts = (slice(0, given.images), slice(given.images, None))
    known, asked = (
        Labelled(train.images[p], train.labels[p], train.names, (train.boxes or [])[p], train.size)
        for p in parts
    )
    return known, asked


def recipe(given: argparse.Namespace, loss: float, seconds: float) -> str:
    """A training in words."""
    epochs = given.steps * given.batch / given.images
    return (
        f"{given.images} training scenes, prompts in layers {given.layers}, {given.steps} steps of {given.batch} "
        f"({epochs:.0f} epochs), AdamW, lr {given.lr:g}, decay {given.decay:g}, warm-up {given.warmup:g}, cosine; "
        f"{seconds:.0f} s of a core, loss of the last 50 steps {loss:.3f}"
    )


def described(folder: Path) -> str:
    """How the prompts in a folder of `--save` were trained, and the command."""
    if not (folder / HOW).is_file():
        return f"Prompts from {folder}"
    command, how = (folder / HOW).read_text().strip().split("\n")
    return f"Prompts of `{command}`: {how}"


def main() -> None:
    given = arguments()
    dense, processor = testbed.load("dinov2s")
    train_scenes, test = split(given)
    known, asked = (pixel_values(dense, processor, part.images, given.size) for part in (train_scenes, test))
    model, _ = testbed.load("dinov2s")
    if given.adapter:
        training.load(model, given.adapter)
        how = described(Path(given.adapter))
    else:
        handle = hap.patch(
            model, "prompt_cam", classes=len(train_scenes.names), layers=given.layers, seed=given.seed
        )
        started = time.process_time()
        head = train(model, handle, known, torch.tensor(train_scenes.labels), given)
        how = recipe(given, np.mean(head.seen[-50:]), time.process_time() - started)
        if given.save:
            (training.save(model, given.save) / HOW).write_text(
                f"{COMMAND} {' '.join(sys.argv[1:])}\n{how}\n"
            )
    ours = scored(model, test, asked)
    lines = tables(ours, dense_scored(dense, train_scenes, test, known, asked, given.cache))
    kind = "held-out training" if given.held_out else "test"
    facts = (
        f"{how}. Scored on {len(test)} {kind} scenes at {given.size} px, label = one of {len(test.names)} groups; "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, hf_attn_patch {__version__}. Intervals of "
        "95 %: bootstrap over scenes, paired where two are compared."
    )
    command = f"    {COMMAND} {' '.join(sys.argv[1:])}"
    text = "\n".join(["# `prompt_cam` on scenes, DINOv2-S", "", command, "", facts, "", *lines, ""])
    print(text)
    if given.out is not None:
        given.out.write_text(text)
    if given.picture is not None:
        first = Labelled(test.images[:5], test.labels[:5], test.names, (test.boxes or [])[:5], test.size)
        picture(model, dense, first, asked[:5], given.picture)


if __name__ == "__main__":
    main()
