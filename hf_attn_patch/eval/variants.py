"""What is measured next to the dense model, a patch or a two-stream decoding: checked, put on, made neutral."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import api, decoding
from .neutral import options_of
from .specs import PatchSpec, split_spec, typed_options

if TYPE_CHECKING:
    from .harness import Choice

DECODING = "decoding"


def decoding_choice(text: str) -> tuple[str, str, dict[str, Any]]:
    """(label, name, typed options) of ``vcd:alpha=1,beta=0.1``.

    Raises:
        SpecError: syntax, unknown option, wrong type. PatchError: unknown method.
    """
    name, raw = split_spec(text)
    options = typed_options(name, decoding.get(name), raw, {})
    return f"{DECODING} {PatchSpec(name, options).label}", name, options


def check(model: Any, choice: Choice) -> None:
    """Raises PatchError if `model` does not fit."""
    if choice.kind == DECODING:
        decoding.build(choice.what, choice.options).check_model(model)
    else:
        api.plan(model, choice.what, **choice.options)


@contextmanager
def applied(model: Any, choice: Choice | None) -> Iterator[Any]:
    """`model` as `choice` says (None: as it is); gives the handle of a patch, else None."""
    if choice is None:
        yield None
    elif choice.kind == DECODING:
        with decoding.decoded(model, choice.what, **choice.options):
            yield None
    else:
        with api.patched(model, choice.what, **choice.options) as handle:
            yield handle


def neutral(model: Any, choice: Choice) -> tuple[str, dict[str, Any] | None]:
    """Name and options at the neutral value, None = it has none (see `eval.neutral`)."""
    if choice.kind != DECODING:
        return options_of(model, choice.what, choice.options)
    return choice.what, {**choice.options, **decoding.get(choice.what).neutral}
