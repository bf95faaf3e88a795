"""Where questions about images come from: JSON files beside a folder of images, a hub id, or the rendered scenes.

Missing images are listed and refused: a benchmark on the images that happen to be there is another benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .vlm_data import ImageRef

SCENES = "testbed:scenes"
SHOWN = 5  # names in an error


def images(task: str, folder: str | None, names: Iterable[str]) -> dict[str, ImageRef]:
    """Name -> image of each of `names` in `folder`.

    Raises:
        ValueError: no folder, or some of the images are not there; the message counts and names them.
    """
    wanted = list(dict.fromkeys(names))
    if folder is None:
        raise ValueError(f"{task}: images=FOLDER says where the {len(wanted)} images of the data are")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{task}: images={folder!r} is not a folder")
    missing = [name for name in wanted if not (root / name).is_file()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(
            f"{task}: {len(missing)} of {len(wanted)} images are not in {folder}: {', '.join(missing[:SHOWN])}{more}. "
            "Get them, or give data with the questions about the images you have; none is left out silently."
        )
    return {name: ImageRef(str(root / name)) for name in wanted}


def rows(task: str, path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, or of a JSON file that holds one list.

    Raises:
        ValueError: no such file, a line that is no JSON object, or a row without the `needed` fields.
    """
    if not path.is_file():
        raise ValueError(f"{task}: no file {path}")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        found = list(enumerate(json.loads(text), 1))
    else:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{task}: {path}, line {number} is no JSON: {line[:80]!r}") from error
    for number, row in found:
        lacks = [k for k in needed if not isinstance(row, dict) or k not in row]
        if lacks:
            raise ValueError(f"{task}: {path}, row {number} has no {', '.join(lacks)}")
    if not found:
        raise ValueError(f"{task}: {path} has no rows")
    return [row for _, row in found]


def scenes(count: int, seed: int) -> tuple[Any, Any]:
    """(module, dataset): `count` rendered scenes of the test split, see `hf_attn_patch.testbed.scenes`."""
    from ..testbed import scenes as module

    return module, module.build("test", count, seed=seed)


def scene_images(data: Any, count: int, seed: int) -> list[ImageRef]:
    """The images of the scenes of one call of `scenes`."""
    return [ImageRef(f"{SCENES}/test-{count}-{seed}/{i}", data, i) for i in range(len(data))]


def hub(task: str, name: str) -> dict[str, Any]:
    """Split -> dataset of a hub id, or of a local folder that `datasets` can load.

    Raises:
        ValueError: `datasets` is not installed, or cannot load it.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{task}: data={name!r} is no file here, so it is taken for a hub id, which needs the package datasets: "
            "pip install 'hf_attn_patch[eval]'."
        ) from error
    try:
        return dict(load_dataset(name))
    except Exception as error:  # the hub has a dozen ways to say no; all lead to the same advice
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{task}: data={name!r} is no file or folder of this benchmark here, and cannot be had from the hub: "
            f"{first} Give data=FILE and images=FOLDER, or data={SCENES}."
        ) from error


def column(task: str, row: dict[str, Any], *names: str) -> Any:
    """The first of the columns that a row has.

    Raises:
        ValueError: it has none of them.
    """
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{task}: the data have no column {' or '.join(names)}; they have {', '.join(row)}")
