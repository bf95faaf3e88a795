"""LoRA (or any PEFT adapter) and patch adapters in one folder.

folder/adapters.json                    what is here, in order
folder/patch-0-moh/                     as `handle.save` writes it
folder/peft/                            as PEFT's `save_pretrained` writes it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..api import active, unpatch
from ..api import load as load_patch
from ..errors import AdapterError, PatchError
from . import need
from .checks import patch_parameters

INDEX = "adapters.json"
PEFT = "peft"


def is_peft(model: nn.Module) -> bool:
    """True for a model that PEFT wraps (peft need not be installed to ask)."""
    return (
        hasattr(model, "peft_config")
        and hasattr(model, "save_pretrained")
        and hasattr(model, "get_base_model")
    )


def save(model: nn.Module, directory: str | Path) -> Path:
    """Write every patch of `model`, and its PEFT adapter if it has one, below a folder; returns the folder.

    Raises:
        PatchError: there is neither.
    """
    handles = active(model)
    if not handles and not is_peft(model):
        raise PatchError(f"nothing to save: {type(model).__name__} has no patch and no PEFT adapter")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    patches = [f"patch-{number}-{handle.name}" for number, handle in enumerate(handles)]
    for name, handle in zip(patches, handles):
        handle.save(folder / name)
    if is_peft(model):
        model.save_pretrained(str(folder / PEFT))  # type: ignore[operator]
    index = {"format": 1, "patches": patches, "peft": PEFT if is_peft(model) else None}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def load(model: nn.Module, directory: str | Path, *, trainable: bool = False, impl: str | None = None) -> Any:
    """Put what `save` wrote on a plain transformers model.

    Args:
        trainable: go on training (PEFT freezes everything else). impl: overrides the saved executor choice.

    Returns:
        The model, wrapped by PEFT if an adapter was saved with it.

    Raises:
        AdapterError: no such folder, or something is missing in it. ModelMismatchError: made for another model.
    """
    folder = Path(directory)
    try:
        index = json.loads((folder / INDEX).read_text())
        patches, peft_folder = [str(name) for name in index["patches"]], index["peft"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no readable {INDEX} ({error}); expected a folder from training.save"
        ) from None
    if is_peft(model) or active(model):
        raise PatchError(
            f"load wants the plain model, this one has a patch or a PEFT adapter: {active(model)}"
        )
    if peft_folder is not None:
        peft = need("peft")
        if not (folder / peft_folder).is_dir():
            raise AdapterError(f"{folder / peft_folder} is missing; {INDEX} names it")
    try:
        for name in patches:
            load_patch(model, folder / name, impl=impl)
        if peft_folder is None:
            return model
        wrapped = peft.PeftModel.from_pretrained(model, str(folder / peft_folder), is_trainable=trainable)
    except BaseException:
        unpatch(model)
        raise
    if trainable:  # what was patched after get_peft_model is unknown to it
        for parameter in patch_parameters(wrapped).values():
            parameter.requires_grad_(True)
    return wrapped
