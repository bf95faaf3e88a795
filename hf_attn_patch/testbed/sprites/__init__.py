"""Pictures of the objects: tiles of one atlas, cut out of Noto Color Emoji (SIL Open Font License 1.1, OFL.txt)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

ATLAS = Path(__file__).with_name("atlas.webp")
TILE, COLUMNS = 56, 12


@functools.lru_cache(maxsize=1)
def sprites() -> dict[str, Any]:
    """Name of an object -> its picture, a PIL image in RGBA cropped to what is not transparent."""
    from PIL import Image

    from hf_attn_patch.testbed.objects import NAMES

    atlas = Image.open(ATLAS).convert("RGBA")
    found = {}
    for i, name in enumerate(NAMES):
        x, y = i % COLUMNS * TILE, i // COLUMNS * TILE
        tile = atlas.crop((x, y, x + TILE, y + TILE))
        found[name] = tile.crop(tile.getchannel("A").getbbox())
    return found
