"""Cuts the sprites of `testbed/objects.py` out of Noto Color Emoji: hf_attn_patch/testbed/sprites/atlas.webp.

apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb noto
python scripts/sprites.py noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from hf_attn_patch.testbed.objects import EMOJI, NAMES  # noqa: E402
from hf_attn_patch.testbed.sprites import ATLAS, COLUMNS, TILE  # noqa: E402


def main(font: str) -> None:
    drawn = {name: emoji for members in EMOJI.values() for name, emoji in members.items()}
    face = ImageFont.truetype(font, 109)  # the one size of its bitmaps
    atlas = Image.new("RGBA", (COLUMNS * TILE, -(-len(NAMES) // COLUMNS) * TILE))
    for i, name in enumerate(NAMES):
        tile = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(tile).text((10, 10), drawn[name], font=face, embedded_color=True)
        tile = tile.crop(tile.getbbox())
        tile.thumbnail((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
        x, y = i % COLUMNS * TILE, i // COLUMNS * TILE
        atlas.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
    atlas.save(ATLAS, "WEBP", quality=90, method=6)
    print(f"{ATLAS}: {len(NAMES)} objects, {ATLAS.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1])
