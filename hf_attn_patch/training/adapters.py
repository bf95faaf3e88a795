"""LoRA (or any PEFT adapter) and patch adapters in one folder.

folder/adapters.json                    what is here, in order
folder/patch-0-moh/                     as `handle.save` writes it
folder/peft/                            as PEFT's `save_pretrained` writes it
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from torch import nn

from ..api import active, unpatch
from ..api import load as load_patch
from ..errors import AdapterError, PatchError
from ..install.adapter_data import FILE_BYTES, parse
from ..install.adapter_folder import blobs_of, read, target_of
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
        PatchError: there is neither. AdapterError: a folder cannot be written (see `install.adapters.save`).
    """
    handles = active(model)
    if not handles and not is_peft(model):
        raise PatchError(f"nothing to save: {type(model).__name__} has no patch and no PEFT adapter")
    folder = Path(directory)
    target_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # written last: half a save is no adapter
    patches = [f"patch-{number}-{handle.name}" for number, handle in enumerate(handles)]
    for name, handle in zip(patches, handles):
        handle.save(folder / name)
    if is_peft(model):
        model.save_pretrained(str(folder / PEFT))  # type: ignore[operator]
    index = {"format": 1, "patches": patches, "peft": PEFT if is_peft(model) else None}
    partial = folder / f".{INDEX}.{uuid.uuid4().hex[:8]}"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(partial, folder / INDEX)
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
        index = parse(read(folder, INDEX, FILE_BYTES), folder / INDEX)
        patches, peft_folder = [str(name) for name in index["patches"]], index["peft"]
    except (PatchError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no readable {INDEX} ({error}); expected a folder from training.save"
        ) from None
    if peft_folder not in (None, PEFT) or not all(re.fullmatch(r"patch-\d+-\w+", name) for name in patches):
        raise AdapterError(f"{folder / INDEX} names folders that training.save does not write")
    for name in [*patches, *([PEFT] if peft_folder else [])]:
        if not (folder / name).is_dir():
            raise AdapterError(f"{folder / name} is missing; {INDEX} names it")
        if (folder / name).is_symlink():
            raise AdapterError(f"{folder / name} is a link; an adapter may not lead out of its folder")
    if is_peft(model) or active(model):
        raise PatchError(
            f"load wants the plain model, this one has a patch or a PEFT adapter: {active(model)}"
        )
    if peft_folder is not None:
        peft = need("peft")
        _check_peft(folder)
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


def _check_peft(folder: Path) -> None:
    """PEFT itself would follow links, and unpickle ``adapter_model.bin`` where there are no safetensors.

    Raises:
        AdapterError: it would do one of the two.
    """
    inside = folder / PEFT
    if not (inside / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"{inside} holds no adapter_model.safetensors; weights in other formats are pickles and not read"
        )
    root = inside.resolve()
    for file in inside.rglob("*"):
        real = file.resolve()
        if root not in real.parents and real.parent != blobs_of(root):
            raise AdapterError(f"{file} is a link that leads out of the folder of the adapter")
