"""POPE's questions for any images whose objects are known: random, popular and adversarial sampling.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv 2305.10355; code
RUCAIBox/POPE utils.py and main.py (MIT), READ. Per image, questions alternate yes, no: about its first objects, and
about objects that it does not have: ``random`` = any; ``popular`` = the one that most images have, not asked yet;
``adversarial`` = the one seen most often together with the object just asked about, not asked yet (any if none is).

Differs: ties are broken by name and each image has a random stream of its own, so the questions do not depend on the
order of the data; images with fewer objects than asked get fewer pairs (the published sets leave such images out), so
yes and no stay balanced; "an" before a vowel is written where the template has "a {}" (the original turned every a of
the template into an).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SPLITS = ("random", "popular", "adversarial")


def question(name: str) -> str:
    """``Is there a dog in the image?``"""
    return f"Is there {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} in the image?"


def sample_questions(
    objects_per_image: Mapping[Any, Sequence[str]],
    split: str,
    per_image: int = 6,
    seed: int = 0,
    ask: Callable[[str], str] = question,
    vocabulary: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Questions in POPE's format: ``{"question_id": 1…, "image": key, "text": …, "label": "yes" | "no", "object": …}``.

    Args:
        objects_per_image: image -> names of its objects, in the order of the annotation; repeats count once.
        split: random, popular or adversarial. per_image: questions per image, half of them yes. ask: name -> question.
        vocabulary: objects to ask about that need not occur; None = those that occur.

    Raises:
        ValueError: unknown split, an odd or too small `per_image`, no objects, or an image that has all objects.
    """
    if split not in SPLITS:
        raise ValueError(f"pope: split={split!r} is none of {', '.join(SPLITS)}")
    if per_image < 2 or per_image % 2:
        raise ValueError(
            f"pope: per_image={per_image} must be even, half of the questions have the answer no"
        )
    seen = {key: list(dict.fromkeys(names)) for key, names in objects_per_image.items()}
    often = Counter(name for names in seen.values() for name in names)
    for name in vocabulary or ():
        often.setdefault(name, 0)
    if not often:
        raise ValueError("pope: no image has an object")
    together: dict[str, Counter[str]] = {name: Counter() for name in often}
    for names in seen.values():
        for name in names:
            together[name].update(n for n in names if n != name)
    popular = sorted(often, key=lambda n: (-often[n], n))
    made: list[dict[str, Any]] = []
    for key, names in seen.items():
        rng = random.Random(f"{seed}/{split}/{key}")
        absent = [n for n in popular if n not in names]
        pairs = min(per_image // 2, len(names))
        if len(absent) < pairs:
            raise ValueError(
                f"pope: image {key!r} lacks only {len(absent)} of {len(often)} objects, {pairs} are to be asked about. "
                "Give more images, a vocabulary, or a smaller per_image."
            )
        for name in names[:pairs]:
            if split == "random":
                other = rng.choice(sorted(absent))
            elif split == "popular":
                other = absent[0]
            else:
                near = [n for n in absent if together[name][n]]
                best = max((together[name][n] for n in near), default=0)
                ties = sorted(n for n in near if together[name][n] == best)
                other = ties[0] if ties else rng.choice(sorted(absent))
            absent.remove(other)
            made += [
                {"question_id": len(made) + 1 + i, "image": key, "text": ask(n), "label": label, "object": n}
                for i, (n, label) in enumerate(((name, "yes"), (other, "no")))
            ]
    return made
