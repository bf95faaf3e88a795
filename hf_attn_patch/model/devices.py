"""Where a module computes, which is not where its parameters are while they are offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HOOK = "_hf_hook"  # attribute of a module that accelerate moves around


def _told(module: nn.Module) -> torch.device | None:
    """The execution device in accelerate's hook of `module`, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):  # a SequentialHook holds several
        device: Any = getattr(one, "execution_device", None)
        if isinstance(device, dict):  # one device per submodule; they are told by their own hooks as well
            device = next(iter(device.values()), None)
        if device is not None:
            return torch.device(device)
    return None


def execution_device(model: nn.Module, path: str, module: nn.Module) -> torch.device | None:
    """Where the queries of the attention module at `path` will live; None if the module has no parameters at all.

    accelerate moves the parameters of an offloaded module to its execution device for the forward and back to "meta"
    afterwards, so a hook tells more than a parameter. It sits on the leaves, on the module, or on one around it.
    """
    around, names = [], path.split(".")
    for end in range(len(names) - 1, -1, -1):
        around.append(model.get_submodule(".".join(names[:end])))
    if hasattr(model, "_hf_hook") or any(hasattr(m, "_hf_hook") for m in (*module.modules(), *around)):
        for one in (*module.modules(), *around):
            if (device := _told(one)) is not None:
                return device
    parameters = list(module.parameters())
    real = [p.device for p in parameters if p.device.type != "meta"]
    return next(iter(real or [p.device for p in parameters]), None)


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Inside, parameters of `modules` that accelerate offloaded (patched first, offloaded later) are where they are
    used: its hooks move them around a module's forward, and the modules that hold tensors of patches have none."""
    held = [
        m for one in modules for m in (one, *one._modules.values()) if m is not None and HOOK in m.__dict__
    ]
    try:
        for module in held:
            module.__dict__[HOOK].pre_forward(module)
        yield
    finally:
        for module in held:
            module.__dict__[HOOK].post_forward(module, None)
