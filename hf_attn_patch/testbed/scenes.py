"""Rendered scenes with known objects: images, captions and questions for vision-language models, without a download.

    from hf_attn_patch.testbed import scenes
    data = scenes.build("test", 200, seed=0)          # datasets.Dataset: image, group, objects, caption, prompt
    print(scenes.pairs(data)[:2])                     # MME-style questions with answers

One to five kinds of objects out of 86 on a background, partly hidden by each other. What is seen together follows
groups (kitchen, street, ...) and partners (`objects.PARTNERS`), so that a model learns priors it can be fooled by.
Some objects are painted in a colour that their caption names. The same split, number and seed give the same images.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.testbed.objects import (
    COLORS,
    GROUPS,
    NAMES,
    PAINTED,
    PARTNER,
    SYNONYMS,
    plural,
    with_article,
)
from hf_attn_patch.testbed.sprites import sprites

__all__ = ["GROUPS", "NAMES", "SYNONYMS", "Thing", "build", "draw", "pairs", "question", "yes_no"]

SPLITS = ("train", "tune", "test")
SIZE = 112
PROMPT = "Please describe this image in detail."
KINDS = (1, 2, 3, 4, 5), (1, 2, 3, 3, 3)  # kinds of objects in a scene, and how often
SAME_GROUP, FOLLOW, TWINS = (
    0.85,
    0.6,
    0.15,
)  # chances: next object of the scene's group; partner joins; two or three
SMALLEST, LARGEST, HIDDEN = 20, 42, 0.45  # pixels of the longer side; most of an object that others may cover
COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Thing:
    """One drawn object: box is (left, top, right, bottom) in pixels, color "" where the object has its own colours."""

    name: str
    box: tuple[int, int, int, int]
    color: str
    size: int

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def place(self) -> str:
        """Where in the image: "at the top left", ..., "in the middle"."""
        x, y = (min(int(3 * c / self.size), 2) for c in self.center)
        return (
            ("at the top left", "at the top", "at the top right"),
            ("on the left", "in the middle", "on the right"),
            ("at the bottom left", "at the bottom", "at the bottom right"),
        )[y][x]


def build(split: str, n: int, seed: int = 0, size: int = SIZE) -> Any:
    """A `datasets.Dataset` of `n` scenes; `size` pixels square.

    Columns: image (PIL), image_id, group, objects (list of name, box [left, top, right, bottom], color, place),
    caption, prompt (the words the testbed's LLaVA was taught to answer with a caption).

    Raises:
        ValueError: unknown split.
    """
    import datasets

    rows = []
    for i in range(n):
        image, group, things = draw(f"{split}-{seed}-{i}", size)
        rows.append(
            {
                "image": image,
                "image_id": i,
                "group": group,
                "objects": [
                    {"name": t.name, "box": list(t.box), "color": t.color, "place": t.place} for t in things
                ],
                "caption": caption(group, things),
                "prompt": PROMPT,
            }
        )
        if split not in SPLITS:
            raise ValueError(f"scenes: split is one of {', '.join(SPLITS)}, not {split!r}")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "group": datasets.Value("string"),
            "objects": [
                {
                    "name": datasets.Value("string"),
                    "box": datasets.List(datasets.Value("int64"), length=4),
                    "color": datasets.Value("string"),
                    "place": datasets.Value("string"),
                }
            ],
            "caption": datasets.Value("string"),
            "prompt": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def draw(key: str, size: int = SIZE) -> tuple[Any, str, list[Thing]]:
    """One scene: (PIL image, group, its objects from left to right). `key` seeds everything."""
    rng = random.Random(key)
    group = rng.choice(list(GROUPS))
    image = background(rng, size)
    things: list[Thing] = []
    for name in sample_names(rng, group):
        twins = rng.choice((2, 2, 3)) if rng.random() < TWINS else 1
        color = rng.choice(list(COLORS)) if name in PAINTED else ""
        for _ in range(twins):
            placed = place(rng, image, name, color, [t.box for t in things], size)
            if placed is not None:
                things.append(placed)
    things.sort(key=lambda t: t.center)
    return image, group, things


def sample_names(rng: random.Random, group: str) -> list[str]:
    """Kinds of objects of a scene, most popular ones first in `GROUPS`: weight 1 / (rank + 2)."""
    count = rng.choices(*KINDS)[0]
    found: list[str] = []
    while len(found) < count:
        partner = PARTNER.get(found[-1]) if found else None
        if partner is not None and partner not in found and rng.random() < FOLLOW:
            found.append(partner)
            continue
        inside = not found or rng.random() < SAME_GROUP
        members = GROUPS[group] if inside else NAMES
        weights = [1 / (i + 2) for i in range(len(members))] if inside else None
        name = rng.choices(members, weights)[0]
        if name not in found:
            found.append(name)
    return found


def background(rng: random.Random, size: int) -> Any:
    """Two soft colours blended along a direction, with a horizon, stripes or nothing."""
    from PIL import Image, ImageDraw

    soft = lambda: tuple(rng.randint(150, 245) for _ in range(3))
    first, second = Image.new("RGB", (size, size), soft()), Image.new("RGB", (size, size), soft())
    slope = Image.linear_gradient("L").resize((size, size)).rotate(rng.choice((0, 90, 180, 270)))
    image = Image.composite(first, second, slope)
    pen = ImageDraw.Draw(image)
    kind = rng.choice(("plain", "horizon", "stripes"))
    if kind == "horizon":
        pen.rectangle((0, rng.randint(size // 3, 3 * size // 4), size, size), fill=soft())
    elif kind == "stripes":
        step, color = rng.randint(8, 24), soft()
        for y in range(0, size, 2 * step):
            pen.rectangle((0, y, size, y + step - 1), fill=color)
    return image


def place(
    rng: random.Random, image: Any, name: str, color: str, taken: Sequence[Any], size: int
) -> Thing | None:
    """Draws the object where it hides at most `HIDDEN` of each box in `taken`; None if there is no room."""
    from PIL import Image, ImageOps

    sprite = sprites()[name]
    longest = rng.randint(SMALLEST, LARGEST) * size / SIZE / max(sprite.size)
    sprite = sprite.resize(tuple(max(1, round(s * longest)) for s in sprite.size), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        sprite = ImageOps.mirror(sprite)
    if color:
        gray, alpha = sprite.convert("L"), sprite.getchannel("A")
        dark = tuple(c // 5 for c in COLORS[color])
        light = tuple((255 + c) // 2 for c in COLORS[color])
        sprite = ImageOps.colorize(gray, dark, light, mid=COLORS[color]).convert("RGBA")
        sprite.putalpha(alpha)
    w, h = sprite.size
    for _ in range(40):
        x, y = rng.randint(0, size - w), rng.randint(0, size - h)
        box = (x, y, x + w, y + h)
        if all(covered(box, other) <= HIDDEN for other in taken):
            image.paste(sprite, (x, y), sprite)
            return Thing(name, box, color, size)
    return None


def covered(box: Sequence[int], other: Sequence[int]) -> float:
    """Share of the smaller box that both share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    area = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return max(width, 0) * max(height, 0) / area


# -- words --------------------------------------------------------------------------------------------------------


def caption(group: str, things: Iterable[Thing]) -> str:
    """ "This is a farm scene. There is a cow on the left. There are two pigs." from left to right."""
    things = list(things)
    kinds = list(dict.fromkeys(t.name for t in things))
    lines = [f"This is a {group} scene."]
    for name in kinds:
        same = [t for t in things if t.name == name]
        color = f"{same[0].color} " if same[0].color else ""
        if len(same) > 1:
            lines.append(f"There are {COUNTS[len(same)]} {color}{plural(name)}.")
        elif plural(name) == name and name not in ("sheep", "deer"):
            lines.append(f"There are {color}{name} {same[0].place}.")
        else:
            described = with_article(color + name)
            lines.append(f"There is {described} {same[0].place}.")
    return " ".join(lines)


def question(name: str) -> str:
    """POPE's question about an object."""
    if plural(name) == name and name not in ("sheep", "deer"):
        return f"Are there {name} in the image?"
    return f"Is there {with_article(name)} in the image?"


def yes_no(group: str, things: Sequence[Thing], rng: random.Random) -> list[tuple[str, str, str]]:
    """One pair (question answered yes, then no) of each of MME's four hallucination subtasks that applies:
    (subtask, question, "Yes" or "No")."""
    names = list(dict.fromkeys(t.name for t in things))
    asked = []
    absent = rng.choice([n for n in (GROUPS[group] if rng.random() < 0.5 else NAMES) if n not in names])
    asked += [("existence", question(rng.choice(names)), "Yes"), ("existence", question(absent), "No")]
    count_of = rng.choice(names)
    count = sum(t.name == count_of for t in things)
    wrong = rng.choice([c for c in (1, 2, 3) if c != count])
    for number, answer in ((count, "Yes"), (wrong, "No")):
        how_many = "only one" if number == 1 else COUNTS[number]
        counted = count_of if number == 1 else plural(count_of)
        verb = "Is" if number == 1 and plural(count_of) != count_of else "Are"
        asked.append(("count", f"{verb} there {how_many} {counted} in the image?", answer))
    single = [t for t in things if sum(o.name == t.name for o in things) == 1]
    apart = [
        (a, b) for a in single for b in single if a.center[0] + 0.15 * a.size < b.center[0]
    ]  # clearly left of
    if apart:
        a, b = rng.choice(apart)
        verb = lambda t: "Are" if plural(t.name) == t.name and t.name not in ("sheep", "deer") else "Is"
        asked.append(("position", f"{verb(a)} the {a.name} on the left of the {b.name}?", "Yes"))
        asked.append(("position", f"{verb(b)} the {b.name} on the left of the {a.name}?", "No"))
    painted = [t for t in single if t.color]
    if painted:
        t = rng.choice(painted)
        other = rng.choice([c for c in COLORS if c != t.color])
        asked += [
            ("color", f"Is the {t.name} {t.color}?", "Yes"),
            ("color", f"Is the {t.name} {other}?", "No"),
        ]
    return asked


def things_of(row: dict[str, Any], size: int = SIZE) -> list[Thing]:
    """The objects of a row of `build`."""
    return [Thing(o["name"], tuple(o["box"]), o["color"], size) for o in row["objects"]]


def pairs(data: Any, seed: int = 0) -> list[dict[str, Any]]:
    """MME-style questions over a dataset of `build`: image_id, subtask (existence, count, position, color),
    question, answer; two of each subtask and image, one answered yes and one answered no."""
    rows = []
    for row in data.remove_columns("image"):
        rng = random.Random(f"pairs-{seed}-{row['image_id']}")
        for subtask, text, answer in yes_no(row["group"], things_of(row), rng):
            rows.append({"image_id": row["image_id"], "subtask": subtask, "question": text, "answer": answer})
    return rows
