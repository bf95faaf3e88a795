"""What has to hold before and during training: something learns, and no number is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..api import active
from ..errors import PatchError
from ..forward.checkpointing import in_backward
from ..install.names import CHILD
from ..install.stack import stacks_of
from ..install.state import aux_losses
from ..model.sites import base_model, find_sites


def patch_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of patches by name; where PEFT made trainable copies (`modules_to_save`), the copies."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if CHILD in parts and "original_module" not in parts:
            found[name] = parameter
    return found


def check_trainable(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: ``{"all": .., "trained": .., "patch": trained ones of patches}``.

    Raises:
        PatchError: nothing would learn, or a patch has parameters that would not.
    """
    own = patch_parameters(model)
    frozen = [name for name, p in own.items() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = ", ".join(handle.name for handle in active(model))
    if frozen:
        raise PatchError(
            f"{len(frozen)} parameters of {names} are frozen, first {frozen[0]}. get_peft_model freezes what it does "
            f"not know: give LoraConfig(modules_to_save=[{CHILD!r}]), or patch after get_peft_model; without PEFT call "
            "requires_grad_(True) on them"
        )
    if not trained:
        has = (
            "declares no gradient"
            if not any(h.config.trainable for h in active(model))
            else "has no parameters here"
        )
        raise PatchError(
            (
                f"nothing to train: {names} {has}"
                if names
                else "nothing to train: no patch, and every weight is frozen"
            )
            + ". Add LoRA (--lora r=8,targets=q_proj+v_proj, or peft.get_peft_model), choose options with parameters "
            "(moh: router=learned; head_gate: trainable_gate=true), or unfreeze weights with requires_grad_(True)"
        )
    learnt = sum(p.numel() for p in own.values() if p.requires_grad)
    return {"all": sum(p.numel() for p in model.parameters()), "trained": trained, "patch": learnt}


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def broken_gradient(model: nn.Module) -> str | None:
    """Name of the first trained parameter whose gradient is not finite, or None."""
    grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not grads:
        return None
    norms = torch.stack([g.detach().norm().float().cpu() for _, g in grads])
    bad = (~torch.isfinite(norms)).nonzero()
    return grads[int(bad[0, 0])][0] if bad.numel() else None


@contextmanager
def nan_guard(model: nn.Module) -> Iterator[None]:
    """Inside, a training forward whose loss is not finite raises, and says where it began.

    The hooks note one flag per attention module (without a device synchronisation) and read them only if needed.

    Raises:
        PatchError: (from the forward) the loss is NaN or infinite.
    """
    base = base_model(model)
    flags: dict[str, tuple[Tensor, list[str]]] = {}
    handles: list[Any] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if module.training and isinstance(out, Tensor) and not in_backward():
                names = [key for stack in stacks_of(module)[:1] for key in stack.patches]
                flags.setdefault(path, (torch.isfinite(out.detach()).all(), names))

        return hook

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        try:
            if module.training and isinstance(loss, Tensor) and loss.ndim == 0 and not finite(loss):
                raise PatchError(f"the loss is {float(loss)}: {_cause(base, flags, kwargs.get('labels'))}")
        finally:
            flags.clear()

    for site in find_sites(base):
        handles.append(site.module.register_forward_hook(note(site.path)))
    handles.append(base.register_forward_hook(check, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cause(base: nn.Module, flags: dict[str, tuple[Tensor, list[str]]], labels: Any) -> str:
    for name, parameter in base.named_parameters():
        if not finite(parameter):
            return (
                f"parameter {name} is not finite since the last step. Lower the learning rate, clip gradients, or "
                "train in a wider number format"
            )
    for path, (ok, names) in flags.items():
        if not bool(ok):
            patched = f", patched by {', '.join(names)}" if names else ", which is not patched"
            return f"the first attention output that is not finite is that of {path}{patched}"
    if active(base):
        for name, value in aux_losses(base).items():
            if not finite(value):
                return f"attention outputs are finite, the auxiliary loss {name} is not"
    if isinstance(labels, Tensor) and not bool((labels != -100).any()):
        return "no token of this batch has a label (all are -100), so its mean is 0 / 0"
    return (
        "attention outputs and parameters are finite; look at the layers behind attention, or at the labels"
    )
