"""Look at the attention calls of a model while it runs: a patch that edits nothing and shows each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..api import patched
from ..call.program import Program
from ..registry import Patch

Look = Callable[[int, Program, Tensor], None]  # (layer, call, output [B, H, L, Dv])


@dataclass
class Capture(Patch):
    """Show every attention call to `look`; changes nothing. Made by `captured`, in no registry."""

    name = "capture_calls"
    parts = ("text", "decoder")
    default_part = "text"
    causal_only = True

    look: Any = field(default=None)

    def edit(self, program: Program, call: Any) -> None:
        layer = call.layer
        program.observe(lambda program, output: self.look(layer, program, output))


@contextmanager
def captured(model: Any, look: Look) -> Iterator[None]:
    """`look` sees every attention call of the text part of `model` inside the block."""
    with patched(model, Capture(look=look)):
        yield
