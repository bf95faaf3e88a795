"""Auxiliary losses of patches (load balance, gate size): collected on the running forward, added to its loss.

A patch calls ``call.add_loss(name, value, weight)``; nothing is kept in a module-level list. When the outermost
transformers model returns a loss while training, ``weight * mean over sites`` of every name is added to it, so a
Trainer, DDP or a plain loop train on it without knowing. `aux_losses` gives the numbers of the last forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PatchError
from .base import Given, Need

if TYPE_CHECKING:
    from ..running import Running


class Losses:
    """Auxiliary losses of one forward.

    share: what this forward is of the batch its loss is normalised by. Trainer divides a loss by the number of
    targets of *all* micro-batches of a step (``num_items_in_batch``) and then does not divide by their number; an
    auxiliary loss that was added plainly would count once per micro-batch.
    """

    def __init__(self, given: dict[str, Any] | None = None):
        self.values: dict[str, list[tuple[str, Tensor, float]]] = {}
        self.differentiable = torch.is_grad_enabled()
        self.share: Tensor | float = 1.0
        given = given or {}
        total = given.get("num_items_in_batch")
        labels = given.get("shift_labels")
        if labels is None and isinstance(given.get("labels"), Tensor):
            labels = given["labels"][..., 1:]
        if total is not None and isinstance(labels, Tensor):
            self.share = (labels != -100).sum() / total
        self.labelled = given.get("labels") is not None

    def add(self, name: str, path: str, value: Tensor, weight: float) -> None:
        """Keep the value (0-d, with its gradient) of the site at `path`.

        Raises:
            PatchError: the layer runs without gradients inside a forward that has them.
        """
        if self.differentiable and not torch.is_grad_enabled():
            raise PatchError(
                f"the auxiliary loss {name} of {path} has no gradient: its layer runs under reentrant gradient "
                "checkpointing, which computes layers without a graph. Switch to the other kind: "
                "model.gradient_checkpointing_enable({'use_reentrant': False}), or in TrainingArguments "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if value.ndim:
            raise ValueError(
                f"auxiliary loss {name} of {path} has shape {list(value.shape)}, expected a 0-d tensor"
            )
        self.values.setdefault(name, []).append((path, value, float(weight)))

    def means(self, weighted: bool = False) -> dict[str, Tensor]:
        """Mean over sites of every loss, times its weight if asked."""
        found = {}
        for name, entries in self.values.items():
            device = entries[0][1].device
            terms = [value.to(device) * (weight if weighted else 1.0) for _, value, weight in entries]
            found[name] = torch.stack(terms).mean()
        return found

    def added_to(self, output: Any) -> Any:
        """`output` of a transformers model with the weighted sum added to its loss; None: there is nothing to add."""
        if not self.values or not self.labelled or output is None:
            return None
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim:
            return None
        extra = torch.stack([value.to(loss.device) for value in self.means(weighted=True).values()]).sum()
        share = self.share.to(loss.device) if isinstance(self.share, Tensor) else self.share
        loss = loss + (extra * share).to(loss.dtype)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output


@dataclass(frozen=True)
class AuxiliaryLosses(Need):
    says = "auxiliary losses, added to the loss of a forward in training mode"
    in_pieces = True
    carried = False
    order = 9

    def begins(self, running: Running, given: Given) -> None:
        if given.outermost:
            running.losses = running.context.losses = Losses(given.arguments)

    def ends(self, running: Running, module: nn.Module, output: Any) -> Any:
        return running.losses.added_to(output)
