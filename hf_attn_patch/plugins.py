"""Entry points of other packages, read so that none of them makes a call about something else fail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

NAME = r"[A-Za-z_]\w*"


@dataclass(frozen=True)
class Plugin:
    """One entry point: `target` is "module:Class". problem: why it cannot be used, for whoever asks for `name`."""

    name: str
    target: str
    origin: str
    problem: str = ""


def plugins(group: str, builtin: dict[str, str]) -> list[Plugin]:
    """The entry points of `group`, one per name, in order; whatever is wrong with one is in its `problem`.

    Args:
        builtin: name -> "module:Class" of our own. They win: an entry point of their name that leads elsewhere is a
            plugin with a problem, which `load` of the built-in never meets.
    """
    try:
        points = list(metadata.entry_points(group=group))
    except Exception as error:  # the metadata of some installed package is broken
        return [Plugin("", "", "", f"entry points cannot be read: {type(error).__name__}: {error}")]
    found: dict[str, Plugin] = {}
    shadowed = []
    for point in points:
        name = str(getattr(point, "name", ""))
        try:
            origin = point.dist.name if point.dist else "unknown package"
            target = str(point.value).split("[")[0].strip()  # it may name extras
        except Exception as error:
            found[name] = Plugin(name, "", "", f"entry point {name!r}: {type(error).__name__}: {error}")
            continue
        own = Plugin(name, target, f"{origin} (entry point {point.value})")
        if name in builtin:
            if target != builtin[name]:
                problem = f"{own.origin} claims the name of the built-in {name!r} and is not used"
                shadowed.append(Plugin(name, target, own.origin, problem))
        elif not re.fullmatch(NAME, name):
            problem = f"{own.origin}: the name {name!r} must be an identifier (letters, digits, underscores)"
            found[name] = Plugin(name, target, own.origin, problem)
        elif name in found and found[name].target != target and not found[name].problem:
            problem = (
                f"two plug-ins are called {name!r}: one from {found[name].origin}, one from {own.origin}. "
                "Rename one of them, or uninstall its package"
            )
            found[name] = Plugin(name, target, own.origin, problem)
        else:
            found.setdefault(name, own)
    return [*found.values(), *shadowed]
