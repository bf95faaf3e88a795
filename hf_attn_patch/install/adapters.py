"""Patch adapters on disk: ``attn_patch_config.json`` + ``attn_patch.safetensors`` (only if there are tensors).

Plain JSON and safetensors, never pickle. Keys this version does not know are refused by name: a newer version
may have meant something by them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import __version__, registry
from ..errors import AdapterError, ModelMismatchError
from ..model.sites import base_model
from .stack import SitePatch, stacks_of

if TYPE_CHECKING:
    from .handle import PatchHandle

CONFIG_NAME = "attn_patch_config.json"
TENSORS_NAME = "attn_patch.safetensors"
FORMAT = 1
_KEYS = {
    "format", "package_version", "method", "config", "part", "layers", "heads", "impl", "cache", "base_model", "sites",
    "tensors",
}  # fmt: skip
_KINDS: dict[str, Any] = {
    "method": str, "config": dict, "part": (str, type(None)), "impl": str, "cache": str, "base_model": dict,
    "sites": list, "tensors": (dict, type(None)),
}  # fmt: skip


def _site_patches(model: nn.Module, key: str) -> dict[str, SitePatch]:
    """path -> site patch of one entry; the trained copy where PEFT made one."""
    found: dict[str, SitePatch] = {}
    for path, module in base_model(model).named_modules():
        for stack in stacks_of(module):
            if key in stack.patches:
                found[path] = stack.patches[key]  # type: ignore[assignment]
    return found


def save(handle: PatchHandle, directory: str | Path) -> Path:
    """Write the adapter of `handle`; returns the folder."""
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    entry = handle._entry
    base = base_model(handle.model)
    tensors = {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path, patch in _site_patches(base, entry.key).items()
        for name, tensor in patch.state_dict().items()
    }
    config = base.config
    data = {
        "format": FORMAT,
        "package_version": __version__,
        "method": entry.config.name,
        "config": entry.config.to_dict(),
        "part": entry.part,
        "layers": entry.layers,
        "heads": entry.heads,
        "impl": entry.impl,
        "cache": entry.cache,
        "base_model": {
            "id": getattr(config, "_name_or_path", "") or None,
            "model_type": config.model_type,
            "architecture": type(base).__name__,
        },
        "sites": [{"path": s.path, "heads": s.num_heads, "kv_heads": s.num_kv_heads} for s in handle.sites],
        "tensors": {name: list(t.shape) for name, t in tensors.items()} or None,
    }
    text = json.dumps(data, indent=2) + "\n"
    target = folder / TENSORS_NAME
    if tensors:
        save_file(tensors, str(target), metadata={"format": "pt", "attn_patch_format": str(FORMAT)})
    elif target.exists():
        target.unlink()  # left over from another adapter saved to this folder
    (folder / CONFIG_NAME).write_text(text)
    return folder


def find(directory: str | Path) -> Path:
    """Local folder of an adapter; a hub id is downloaded.

    Raises:
        AdapterError: there is no adapter.
    """
    folder = Path(directory)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise AdapterError(
                f"{folder} holds no {CONFIG_NAME} (it holds {inside}); expected a folder from handle.save()"
            )
        return folder
    text = str(directory)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise AdapterError(f"adapter folder {text!r} does not exist, and it is not a hub id either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG_NAME, TENSORS_NAME]))
    except Exception as error:
        raise AdapterError(f"no local folder {text!r}, and the hub download failed: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked JSON of an adapter.

    Raises:
        AdapterError: unreadable, incomplete, unknown keys, or a newer format.
    """
    file = folder / CONFIG_NAME
    try:
        data = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{file} is not valid JSON ({error}); the file is truncated or was edited"
        ) from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file} holds a {type(data).__name__}, expected an object")
    unknown = sorted(set(data) - _KEYS)
    if unknown or data.get("format", FORMAT) != FORMAT:
        raise AdapterError(
            f"{file} was written by version {data.get('package_version', '?')} in format {data.get('format', '?')}"
            + (f" with keys this version does not know: {', '.join(unknown)}" if unknown else "")
            + f"; this is version {__version__}, format {FORMAT}. Upgrade hf_attn_patch"
        )
    missing = sorted(_KEYS - set(data))
    if missing:
        raise AdapterError(
            f"{file} lacks {', '.join(missing)}; it is truncated or was not written by handle.save()"
        )
    for key, kinds in _KINDS.items():
        if not isinstance(data[key], kinds):
            raise AdapterError(f"{file}: {key!r} is {data[key]!r}; the file was edited or is damaged")
    if not {"id", "model_type"} <= set(data["base_model"]) or not all(
        isinstance(s, dict) and {"path", "heads", "kv_heads"} <= set(s) for s in data["sites"]
    ):
        raise AdapterError(
            f"{file}: 'base_model' or 'sites' is incomplete; the file was edited or is damaged"
        )
    return data


def read_tensors(folder: Path, declared: dict[str, list[int]] | None) -> dict[str, Any]:
    """Tensors of an adapter, checked against the shapes its JSON declares."""
    if not declared:
        return {}
    file = folder / TENSORS_NAME
    if not file.is_file():
        raise AdapterError(f"{file} is missing; {CONFIG_NAME} declares {len(declared)} tensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{file} ({file.stat().st_size} bytes) is corrupted or truncated: {error}"
        ) from error
    found = {name: list(t.shape) for name, t in tensors.items()}
    if found != declared:
        wrong = sorted(k for k in set(found) | set(declared) if found.get(k) != declared.get(k))
        k = wrong[0]
        raise AdapterError(
            f"{file} does not match {CONFIG_NAME}: {k} is {found.get(k)} in the file and {declared.get(k)} in the "
            f"config ({len(wrong)} tensors differ)"
        )
    return tensors


def load(model: nn.Module, directory: str | Path, impl: str | None = None) -> PatchHandle:
    """Put a saved adapter on `model` (see `hf_attn_patch.load`)."""
    from ..api import patch
    from .plan import plan

    folder = find(directory)
    data = read_config(folder)
    tensors = read_tensors(folder, data["tensors"])
    config = registry.get(data["method"]).from_dict(data["config"])
    base = base_model(model)
    expected = data["base_model"]["model_type"]
    if base.config.model_type != expected:
        raise ModelMismatchError(
            f"the adapter in {folder} was made for a {expected} model ({data['base_model']['id'] or 'no id'}), "
            f"this is {base.config.model_type}"
        )
    available = {path for path, _ in base.named_modules()}
    missing = [s["path"] for s in data["sites"] if s["path"] not in available]
    if missing:
        raise ModelMismatchError(
            f"the adapter in {folder} patches {len(data['sites'])} sites, {len(missing)} of which this model lacks, "
            f"first {missing[0]}"
        )
    settings = {key: data[key] for key in ("part", "layers", "heads", "cache")} | {
        "impl": impl or data["impl"]
    }
    saved = {s["path"]: (s["heads"], s["kv_heads"]) for s in data["sites"]}
    here = {s.path: (s.num_heads, s.num_kv_heads) for s in plan(model, config, **settings).sites}
    if here != saved:
        path = min(p for p in saved.keys() | here.keys() if saved.get(p) != here.get(p))
        describe = lambda heads: "no site" if heads is None else f"{heads[0]} heads / {heads[1]} KV heads"
        raise ModelMismatchError(
            f"the adapter in {folder} was made for {len(saved)} sites, on this model it would patch {len(here)}: "
            f"{path} was {describe(saved.get(path))} and is {describe(here.get(path))} here"
        )
    handle = patch(model, config, **settings)
    try:
        _load_tensors(handle, tensors, folder)
    except BaseException:
        handle.remove()
        raise
    return handle


def _load_tensors(handle: PatchHandle, tensors: dict[str, Any], folder: Path) -> None:
    pieces = _site_patches(handle.model, handle._entry.key)
    left = dict(tensors)
    for path, patch in pieces.items():
        own = {name: left.pop(f"{path}.{name}") for name in patch.state_dict() if f"{path}.{name}" in left}
        if set(own) != set(patch.state_dict()):
            lacking = sorted(set(patch.state_dict()) - set(own))
            raise AdapterError(f"{folder / TENSORS_NAME} lacks {path}.{lacking[0]}")
        for name, tensor in own.items():
            if tensor.shape != patch.state_dict()[name].shape:
                raise ModelMismatchError(
                    f"{path}.{name} is {list(tensor.shape)} in {folder}, this model needs "
                    f"{list(patch.state_dict()[name].shape)}"
                )
        patch.load_state_dict(own)
    if left:
        raise AdapterError(
            f"{folder / TENSORS_NAME} holds tensors for sites that were not patched: {sorted(left)[0]}"
        )
