"""Words for synthetic questions: names of lines, keys, and vocabularies, all drawn from a seed."""

from __future__ import annotations

import functools
import random
import re

ADJECTIVES = (
    "amber ample azure bold brave brief bright brisk broad calm clean clear clever cool crisp curly damp dark "
    "dear deep dense dim dry dull eager early easy faint fair fancy fast fine firm flat fond free fresh full "
    "gentle glad grand grave great green grey happy hard hasty heavy high hollow humble icy jolly keen kind large "
    "late lazy lean light little live lone long loud loyal lucky mellow merry mild misty narrow neat new noble "
    "noisy odd old open pale plain polite proud pure quick quiet rapid rare ready red rich ripe rough round royal "
    "sharp short shy silent silver simple sleek slim slow small smart smooth soft solid sour spare stark steady "
    "still stout strong sunny sweet swift tall tame tan tidy tiny vast vivid warm weak wet white wide wild wise "
    "witty young"
).split()
NOUNS = (
    "acorn anchor apple arrow badge bank barn basin basket beach beam bear bell bench berry bird boat bottle bowl "
    "branch bread brick bridge brook brush bucket button cabin candle canyon cap card carpet cart castle cat cave "
    "chain chair chalk cherry clock cloud coat coin comet coral corner cotton cradle crane creek crow crown cup "
    "curtain desk dog door dove drum duck eagle engine falcon farm feather fence fern field finger flag flame "
    "flute forest fork fox frame frog garden gate glass glove goat goose grape hammer harbor hat hawk hill hinge "
    "horn horse house island jacket jar kettle key kite ladder lake lamp lantern leaf lemon lion lock log maple "
    "meadow melon mill mirror moon mouse needle nest oak ocean onion orange otter oven owl paddle paper parcel "
    "path pear pebble pencil piano pine pipe planet plate plum pond pony pump rabbit rail raven ribbon ring river "
    "road robin roof rope rose sail salt seal shed shell ship shoe spoon spring squirrel star stone stove sugar "
    "table tiger torch tower trail train tree trumpet tulip tunnel valley vase violin wagon wall walnut wheel "
    "whistle window wolf wood yard"
).split()
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def pairs(count: int, draw: random.Random) -> list[str]:
    """`count` distinct names like ``pale-otter``.

    Raises:
        ValueError: there are not so many.
    """
    most = len(ADJECTIVES) * len(NOUNS)
    if count > most:
        raise ValueError(f"{count} names are needed, there are {most}; ask for a shorter length")
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in draw.sample(range(most), count)]


def coined(count: int, draw: random.Random) -> list[str]:
    """`count` distinct made-up words of six letters like ``bakedo``."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(3))] = None
    return list(words)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Distinct English words of 4 to 9 letters: the lists of this file and the words of the testbed's prose, sorted."""
    from ..testbed import prose

    found = set(re.findall(r"\b[a-z]{4,9}\b", prose._text()))
    return tuple(sorted(found | {w for w in [*ADJECTIVES, *NOUNS] if len(w) >= 4}))
