"""`watched`: look at the attention calls of a running model, patched or not, without changing one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..api import patched
from ..install.handle import PatchHandle
from ..kernels.reference import probabilities as probabilities
from ..registry import Patch

if TYPE_CHECKING:
    from ..call.program import Program
    from ..install.stack import Call

Look = Callable[[Any, Any], None]  # (program, call)


@dataclass
class Watch(Patch):
    """Show every attention call to `look` when it is done; edits nothing. In no registry."""

    name = "watch"
    default_part = "text"

    look: Any = field(default=None)

    def edit(self, program: Program, call: Call) -> None:
        program.observe(lambda program, output: self.look(program, call))


@contextmanager
def watched(model: Any, look: Look) -> Iterator[PatchHandle]:
    """`look` sees every attention call of the text part inside, with the edits of all patches on the model."""
    with patched(model, Watch(look=look)) as handle:
        yield handle


def last_row(program: Program) -> Tensor:
    """Attention probabilities [B, H, S] of the last row."""
    return probabilities(program, torch.tensor([program.q_len - 1], device=program.query.device))[:, :, 0]
