"""The neutral check: a patch at its neutral value must give the answers of the model as it is.

A table of a method next to a baseline proves nothing if the method's code path alone changes the answers. So each
patch runs once more with `Patch.neutral(model)` in place of its options, in the same places (part, layers, heads,
impl), on the same batches, and its answers are compared with the dense ones, letter by letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .specs import SCOPE


@dataclass
class NeutralCheck:
    """What the check of one patch found.

    label: of the patch. options: its neutral value, None = the method has none. same of total: items with the answer of
    the dense model. answers: item -> answer.
    """

    label: str
    options: dict[str, Any] | None
    same: int = 0
    total: int = 0
    answers: dict[int, str | None] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool | None:
        """None: nothing was compared."""
        return self.same == self.total if self.total else None

    def __str__(self) -> str:
        if self.options is None:
            return f"{self.label}: has no neutral value, so nothing says that its code path alone changes no answer"
        if not self.total:
            return f"{self.label}: the check at its neutral value was switched off"
        said = ", ".join(f"{k}={v}" for k, v in self.options.items())
        text = f"neutral == dense: {self.same} of {self.total} ({self.label} at {said})"
        return text if self.ok else f"{text}. The numbers of this patch are not to be trusted"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, `ok` and the sentence included."""
        return {**asdict(self), "ok": self.ok, "text": str(self)}


def options_of(model: Any, what: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name of the patch, and its neutral options in the places that were asked for; None = it has none.

    Args:
        what: name, class or config object, as for `hap.patch`.
    """
    from .. import registry

    if isinstance(what, str):
        cls: Any = registry.get(what)
    else:
        cls = what if isinstance(what, type) else type(what)
    neutral = (
        cls.neutral(model) if callable(cls.neutral) else cls.neutral or None
    )  # decodings have a plain mapping
    if neutral is None:
        return cls.name, None
    return cls.name, {**{k: v for k, v in options.items() if k in SCOPE}, **neutral}


def compare(
    label: str, options: dict[str, Any] | None, dense: Mapping[int, Any], neutral: Mapping[int, Any]
) -> NeutralCheck:
    """The check from finished items (index -> {"answer", "scores"}); without answers, scores are compared."""

    def said(entry: Any) -> Any:
        return entry["scores"] if entry["answer"] is None else entry["answer"]

    same = sum(said(dense[i]) == said(entry) for i, entry in neutral.items())
    answers = {i: entry["answer"] for i, entry in sorted(neutral.items())}
    return NeutralCheck(label, options, same, len(neutral), answers)


def known_answers(variant: Any) -> dict[int, dict[str, Any]]:
    """Item -> {"answer", "scores"} of a `Variant`, as `compare` takes it."""
    count = len(next(iter(variant.scores.values())))
    return {
        i: {
            "answer": None if variant.answers is None else variant.answers[i],
            "scores": {name: column[i] for name, column in variant.scores.items()},
        }
        for i in range(count)
    }
