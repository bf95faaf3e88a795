"""Everyday objects of the rendered scenes: names, groups they are seen in, what goes with what, words for them.

The pictures are Noto Color Emoji (SIL Open Font License 1.1, `sprites/OFL.txt`), one 56-pixel tile each, in the order
of `NAMES`, twelve to a row; `scripts/sprites.py` cuts them out of the font.
"""

from __future__ import annotations

EMOJI: dict[str, dict[str, str]] = {
    "farm": {
        "cow": "🐄",
        "pig": "🐖",
        "horse": "🐎",
        "sheep": "🐑",
        "rooster": "🐓",
        "tractor": "🚜",
        "goat": "🐐",
        "duck": "🦆",
    },
    "street": {
        "car": "🚗",
        "bus": "🚌",
        "bicycle": "🚲",
        "motorcycle": "🏍️",
        "traffic light": "🚦",
        "stop sign": "🛑",
        "truck": "🚚",
        "ambulance": "🚑",
    },
    "kitchen": {
        "frying pan": "🍳",
        "knife": "🔪",
        "cup": "☕",
        "teapot": "🫖",
        "spoon": "🥄",
        "bread": "🍞",
        "cheese": "🧀",
        "plate": "🍽️",
    },
    "market": {
        "apple": "🍎",
        "banana": "🍌",
        "orange": "🍊",
        "grapes": "🍇",
        "watermelon": "🍉",
        "strawberry": "🍓",
        "pineapple": "🍍",
        "carrot": "🥕",
    },
    "desk": {
        "laptop": "💻",
        "phone": "📱",
        "books": "📚",
        "pencil": "✏️",
        "keyboard": "⌨️",
        "printer": "🖨️",
        "lamp": "💡",
        "scissors": "✂️",
        "camera": "📷",
    },
    "living room": {
        "couch": "🛋️",
        "bed": "🛏️",
        "chair": "🪑",
        "television": "📺",
        "clock": "🕰️",
        "door": "🚪",
        "teddy bear": "🧸",
        "cat": "🐈",
        "dog": "🐕",
    },
    "beach": {
        "umbrella": "⛱️",
        "crab": "🦀",
        "shell": "🐚",
        "speedboat": "🚤",
        "dolphin": "🐬",
        "sailboat": "⛵",
        "palm tree": "🌴",
        "sunglasses": "🕶️",
    },
    "forest": {
        "pine tree": "🌲",
        "mushroom": "🍄",
        "fox": "🦊",
        "bear": "🐻",
        "deer": "🦌",
        "owl": "🦉",
        "squirrel": "🐿️",
        "rabbit": "🐇",
    },
    "stage": {
        "guitar": "🎸",
        "piano": "🎹",
        "violin": "🎻",
        "drum": "🥁",
        "trumpet": "🎺",
        "microphone": "🎤",
    },
    "garden": {
        "sunflower": "🌻",
        "tulip": "🌷",
        "butterfly": "🦋",
        "bee": "🐝",
        "ladybug": "🐞",
        "snail": "🐌",
        "rose": "🌹",
        "bird": "🐦",
    },
    "gym": {
        "football": "⚽",
        "basketball": "🏀",
        "tennis racket": "🎾",
        "boxing glove": "🥊",
        "skateboard": "🛹",
        "trophy": "🏆",
    },
}
GROUPS = {group: list(members) for group, members in EMOJI.items()}
NAMES = [name for members in GROUPS.values() for name in members]

# often seen together: where one is, the other follows in 6 of 10 scenes. This is what a language prior feeds on.
PARTNERS = (
    ("cow", "tractor"),
    ("horse", "pig"),
    ("sheep", "goat"),
    ("car", "traffic light"),
    ("bus", "stop sign"),
    ("bicycle", "truck"),
    ("cup", "teapot"),
    ("bread", "cheese"),
    ("knife", "plate"),
    ("apple", "banana"),
    ("orange", "carrot"),
    ("grapes", "watermelon"),
    ("laptop", "keyboard"),
    ("books", "pencil"),
    ("lamp", "phone"),
    ("couch", "television"),
    ("cat", "dog"),
    ("bed", "teddy bear"),
    ("umbrella", "sunglasses"),
    ("crab", "shell"),
    ("sailboat", "dolphin"),
    ("pine tree", "mushroom"),
    ("fox", "rabbit"),
    ("bear", "deer"),
    ("guitar", "microphone"),
    ("piano", "violin"),
    ("sunflower", "bee"),
    ("tulip", "butterfly"),
    ("football", "trophy"),
)
PARTNER = {a: b for pair in PARTNERS for a, b in (pair, pair[::-1])}

PAINTED = (
    "car bus teapot cup couch chair door umbrella tulip guitar".split()
)  # drawn in one of the colours, and named with it
COLORS = {
    "red": (220, 40, 40),
    "blue": (50, 90, 225),
    "green": (40, 165, 70),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 200),
}

NO_ARTICLE = frozenset({"grapes", "books", "scissors", "sunglasses", "bread", "cheese"})
_PLURALS = {
    "sheep": "sheep",
    "deer": "deer",
    "bus": "buses",
    "knife": "knives",
    "fox": "foxes",
    "couch": "couches",
    "strawberry": "strawberries",
    "butterfly": "butterflies",
    "trophy": "trophies",
    "bread": "loaves of bread",
    "cheese": "cheeses",
}

# other words that count as the object when an answer is searched for objects (`chair`)
_OTHER_WORDS = {
    "rooster": ["chicken", "hen"],
    "car": ["automobile"],
    "bicycle": ["bike"],
    "motorcycle": ["motorbike"],
    "frying pan": ["pan", "skillet"],
    "cup": ["mug"],
    "teapot": ["kettle"],
    "plate": ["dish"],
    "grapes": ["grape"],
    "laptop": ["computer", "notebook"],
    "phone": ["smartphone", "telephone", "cellphone"],
    "books": ["book"],
    "lamp": ["light bulb"],
    "scissors": ["scissor"],
    "couch": ["sofa"],
    "television": ["tv"],
    "teddy bear": ["teddy"],
    "shell": ["seashell"],
    "umbrella": ["parasol"],
    "speedboat": ["motorboat"],
    "palm tree": ["palm"],
    "sunglasses": ["sunglass"],
    "pine tree": ["pine"],
    "rabbit": ["bunny", "bunnies"],
    "ladybug": ["ladybird"],
    "football": ["soccer ball"],
    "tennis racket": ["racket"],
}


def plural(name: str) -> str:
    """ "cow" -> "cows"; names that are plural stay as they are."""
    if name in NO_ARTICLE and name not in _PLURALS:
        return name
    return _PLURALS.get(name, name + "s")


def with_article(name: str) -> str:
    """ "apple" -> "an apple", "grapes" -> "grapes"."""
    if name.split()[-1] in NO_ARTICLE:
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def _spellings(name: str) -> list[str]:
    others = _OTHER_WORDS.get(name, [])
    return sorted({name, plural(name), *others, *(w + "s" for w in others if not w.endswith("s"))})


SYNONYMS = {name: _spellings(name) for name in NAMES}
