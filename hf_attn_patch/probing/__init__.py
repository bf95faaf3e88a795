"""Heads on frozen patch tokens: linear, efficient probing, a dozen attentive poolings, ACMIL.

>>> from hf_attn_patch import probing
>>> trained = probing.fit(tokens, labels, head="ep", queries=8)      # tokens [n, N, C] of a frozen model
>>> logits, maps = trained.head.attend(tokens[:4])                   # maps [4, 8, N]: what each query reads

`names` lists the heads; `register` adds one. k-NN needs no head: the task ``knn`` of `hf_attn_patch.eval` is that.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Fitted, fit

__all__ = ["Fitted", "HeadEntry", "build", "check", "fit", "names", "register"]


@dataclass(frozen=True)
class HeadEntry:
    """One known head. target: a class or ``module:Class``. presets: options it is made with. whole: it has its own
    classifier and loss, and is no pooling."""

    name: str
    target: str | Callable[..., Any]
    summary: str
    presets: tuple[tuple[str, Any], ...] = ()
    whole: bool = False

    def load(self) -> Callable[..., Any]:
        """The class, imported on first use."""
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module, __name__), name)

    def __str__(self) -> str:
        return f"{self.name}: {self.summary}"


_ENTRIES: dict[str, HeadEntry] = {
    entry.name: entry
    for entry in (
        HeadEntry("linear", ".pool:Mean", "the mean token (or the one given) and a linear layer"),
        HeadEntry("ep", ".ep:EfficientProbing", "queries on raw tokens that read a slice of the values each"),
        HeadEntry("abmilp", ".light:AbMilp", "a tanh scorer per token, after one layer of self-attention"),
        HeadEntry("simpool", ".light:SimPool", "the mean token asks, with projections of query and keys"),
        HeadEntry(
            "esimpool",
            ".light:SimPool",
            "SimPool without projections",
            (("projections", False), ("heads", 12)),
        ),
        HeadEntry("aim", ".light:Aim", "a learned query on batch-normalised tokens"),
        HeadEntry("coca", ".light:CoCa", "a learned query whose heads share keys and values"),
        HeadEntry("clip", ".cross:ClipPool", "the mean token attends, with learned positions"),
        HeadEntry("siglip", ".cross:LatentPool", "a learned latent and an MLP"),
        HeadEntry("cait", ".cross:ClassAttention", "a class token among the tokens, with layer scale"),
        HeadEntry("vjepa", ".cross:CrossBlock", "a block of cross-attention and MLP"),
        HeadEntry("cae", ".cross:CaePool", "cross-attention with three norms and nothing else"),
        HeadEntry("dino_block", ".cross:BlockPool", "one more transformer block, then the mean"),
        HeadEntry("cbam", ".cbam:Cbam", "gates per channel and per place of the grid"),
        HeadEntry(
            "acmil", ".acmil:Acmil", "branches that are kept apart, favourites hidden in training", whole=True
        ),
        HeadEntry(
            "acmil_mha", ".acmil_mha:AcmilMha", "the same with multi-head attention in branches", whole=True
        ),
    )
}


def names() -> dict[str, HeadEntry]:
    """Name -> entry of every head; imports none of them."""
    return dict(_ENTRIES)


def register(name: str, target: Callable[..., Any], summary: str = "", whole: bool = False) -> None:
    """Make a head known. target: called with (width[, tokens], **options) -> `pool.Pool`; with `whole`: also with
    `classes`, -> a module with ``forward``, ``attend`` and ``loss``.

    Raises:
        ValueError: the name is taken by something else.
    """
    known = _ENTRIES.get(name)
    if known is not None and known.target is not target:
        raise ValueError(f"two heads are called {name!r}: {known.target} and {target}. Rename one of them.")
    _ENTRIES[name] = HeadEntry(name, target, summary, whole=whole)


def build(name: str, shape: Sequence[int], classes: int, **options: Any) -> Any:
    """A head for tokens of `shape` (N, C): an `nn.Module`, [B, N, C] -> logits [B, classes], with ``attend``, ``loss``.

    Raises:
        ValueError: unknown name or option, or a value that does not fit the width; nothing is drawn before that.
    """
    entry, cls, given = _arguments(name, shape, options)
    if entry.whole:
        return cls(classes=classes, **given)
    from .pool import Probe

    return Probe(cls(**given), classes)


def check(name: str, shape: Sequence[int], **options: Any) -> None:
    """Raises ValueError if `build` would refuse the name or an option's name."""
    _arguments(name, shape, options)


def _arguments(
    name: str, shape: Sequence[int], options: dict[str, Any]
) -> tuple[HeadEntry, Callable[..., Any], dict[str, Any]]:
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no head is called {name!r}.{hint} Known: {', '.join(_ENTRIES)}.")
    entry = _ENTRIES[name]
    cls = entry.load()
    tokens, width = shape
    first = "out_features" if name == "linear" else "width"
    facts = {first: width, "tokens": tokens}
    known = inspect.signature(cls).parameters
    free = [p for p in known if p not in (*facts, "classes")]
    unknown = [o for o in options if o not in free]
    if unknown:
        raise ValueError(
            f"head {name}: unknown option {', '.join(map(repr, unknown))}; options: {', '.join(free) or 'none'}"
        )
    given = {k: v for k, v in facts.items() if k in known}
    presets = dict(entry.presets)
    # twelve heads are the published default; features whose width they do not divide get the next smaller number
    if "heads" in free and "heads" not in options:
        wanted = presets.get("heads", known["heads"].default)
        presets["heads"] = (
            next(h for h in range(wanted, 0, -1) if width % h == 0) if name != "coca" else wanted
        )
    return entry, cls, {**presets, **given, **options}


def __getattr__(name: str) -> Any:
    if name in ("fit", "Fitted"):
        return getattr(importlib.import_module(".recipe", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
