"""`kept_mass`: how much of the attention of a model falls on keys that a patch still lets be read.

The model runs without the patch. At every site that carries it, the patch edits a copy of the call, so that it chooses
by the queries and keys it would see if it were alone there; the model itself goes on with the call as it was. What is
then summed are the probabilities of the model's own call on the keys that the edited copy reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..api import patched
from ..call.program import Program
from ..install.handle import PatchHandle
from ..install.stack import Call, SitePatch, stacks_of
from ..kernels.reference import probabilities, visible
from ..model.sites import base_model
from ..patches.adds_tokens import AddsTokens
from ..registry import Patch

if TYPE_CHECKING:
    from torch import nn

BLOCK = 128  # query rows whose probabilities exist at a time


@dataclass
class Beside(Patch):
    """Lets the patches of `entries` edit a copy of every call and shows both to `look`; edits nothing. In no registry.

    entries: of disabled handles. look: called with (layer, call of the model, copy, or None where none can be made).
    """

    name = "beside"

    model: Any = None
    entries: Any = ()
    look: Any = field(default=None)

    def edit(self, program: Program, call: Call) -> None:
        stacks = stacks_of(self.model.get_submodule(call.path))
        asked = [p for p in stacks[0].site_patches() if any(p.entry is e for e in self.entries)]
        if asked:
            self.look(call.layer, program, edited(program, asked, call))


@contextmanager
def kept_mass(
    model: nn.Module, patches: Sequence[PatchHandle], images: int
) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, `model` computes what it does without `patches`, and each forward of `images` images is looked at.

    Gives layer -> float64 [images] per site and forward: the mean, over heads and query rows, of the share of a row's
    probability on keys that the patches leave; NaN where there is no such share (see `kept_share`). Layers without
    one of the patches are not in it.

    Memory: `BLOCK` rows of probabilities at a time, O(L) per head.
    """
    found: dict[int, list[Tensor]] = {}

    def look(layer: int, dense: Program, copy: Program | None) -> None:
        share = None if copy is None else kept_share(dense, copy)
        if share is None or len(share) % images:
            share = torch.full((images,), torch.nan, dtype=torch.float64)
        # windowed models have the windows of an image in a row
        found.setdefault(layer, []).append(share.reshape(images, -1).mean(1).cpu())

    entries = tuple(handle._entry for handle in patches)
    with ExitStack() as stack:
        for handle in patches:
            stack.enter_context(handle.disabled())
        if entries:
            stack.enter_context(patched(model, Beside(model=base_model(model), entries=entries, look=look)))
        yield found


def edited(program: Program, patches: Sequence[SitePatch], call: Call) -> Program | None:
    """A copy of `program` as `patches` edit it; None where one of them adds tokens, which this forward lacks."""
    values = {f.name: getattr(program, f.name) for f in fields(program)}
    lists: dict[str, Any] = {name: list(value) for name, value in values.items() if isinstance(value, list)}
    copy = replace(program, **lists)
    for patch in patches:
        for number, (_, config) in enumerate(patch.variants):
            if isinstance(config, AddsTokens):
                return None
            config.edit(copy, Call(patch, number, call.context, copy.mask.causal, call.training))
    return copy


def kept_share(dense: Program, copy: Program, block: int = BLOCK) -> Tensor | None:
    """Float64 [B]: mean over heads and rows of the share of a row of `dense` on keys that `copy` reads, in 0 … 1.

    Rows that read nothing are not counted. A term beside attention (`Program.add`) does not count as reading. None if
    `copy` has other keys than `dense` (appended ones stand for many tokens) or no softmax.
    """
    if copy.operator != "softmax" or dense.ragged or copy.ragged or copy.key.shape[2] != dense.key.shape[2]:
        return None
    columns = dense.mask.key_columns
    total = torch.zeros(dense.batch, dtype=torch.float64, device=dense.query.device)
    count = torch.zeros_like(total)
    for rows in torch.arange(dense.q_len, device=dense.query.device).split(block):
        probs = probabilities(dense, rows)
        seen = visible(copy, dense.mask.query_columns[rows], columns)
        whole = probs.sum(-1, dtype=torch.float64)
        kept = torch.where(seen, probs, 0).sum(-1, dtype=torch.float64)
        total = total + torch.where(whole > 0, kept / whole, 0).sum((1, 2))
        count = count + (whole > 0).sum((1, 2))
    return total / count
