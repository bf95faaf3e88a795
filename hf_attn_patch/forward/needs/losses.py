"""Auxiliary losses of patches (load balance, gate size): collected on the running forward, added to its loss.

A patch calls ``call.add_loss(name, value, weight)``; nothing is kept in a module-level list. When the outermost
transformers model returns a loss while training, ``weight * mean over sites`` of every name is added to it, so a
Trainer, DDP or a plain loop train on it without knowing. `aux_losses` gives the numbers of the last forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PatchError


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


def aux_losses(model: nn.Module, weighted: bool = False) -> dict[str, Tensor]:
    """Auxiliary losses of the last forward of `model` in training mode, ``{"moh.balance": 0-d tensor}``.

    Each is a mean over sites and still has its graph: a loop that computes its own loss (and gives the model no labels)
    adds ``sum(hap.aux_losses(model, weighted=True).values())``. A forward with labels has added them already.

    Args:
        weighted: multiply by the weights of the patches, as the added sum does.

    Raises:
        PatchError: nothing is patched.
    """
    from ...install.state import get_state

    state = get_state(model)
    if state is None:
        raise PatchError("aux_losses needs a patched model; call hap.patch first")
    return state.context.losses.means(weighted)
