"""Patch adapters on disk: ``attn_patch_config.json`` + ``attn_patch.safetensors`` (only if there are tensors).

Plain JSON and safetensors, never pickle. Keys this version does not know are refused by name: a newer version
may have meant something by them. A folder to load is data of a stranger: `adapter_data` bounds it, `adapter_folder`
stays inside it, `adapter_tensors` compares it with what the method makes on this model, and `options.from_a_stranger`
keeps its options from naming files; all of that before the model is touched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import __version__, registry
from ..errors import AdapterError, ModelMismatchError, PatchError
from ..model.sites import base_model
from ..options import from_a_stranger
from .adapter_data import FILE_BYTES, FORMAT, check_config, parse, printable
from .adapter_folder import CONFIG_NAME, TENSORS_NAME, find, read, write
from .adapter_tensors import (
    Team,
    check_derived,
    check_header,
    derived,
    differs,
    made_for,
    read_header,
    read_tensors,
    stored,
    unusable,
)
from .stack import SitePatch, stacks_of

if TYPE_CHECKING:
    from .handle import PatchHandle
    from .plan import Plan

__all__ = ["CONFIG_NAME", "FORMAT", "TENSORS_NAME", "find", "load", "read_config", "save"]


def _site_patches(model: nn.Module, key: str) -> dict[str, SitePatch]:
    """path -> site patch of one entry; the trained copy where PEFT made one."""
    found: dict[str, SitePatch] = {}
    for path, module in base_model(model).named_modules():
        for stack in stacks_of(module):
            if key in stack.patches:
                found[path] = stack.patches[key]  # type: ignore[assignment]
    return found


# -- save -----------------------------------------------------------------------------------------------------------


def save(handle: PatchHandle, directory: str | Path) -> Path:
    """Write the adapter of `handle`, as a whole or not at all; returns the folder.

    On a model sharded by FSDP2 every rank calls it: all gather, the first writes, the others wait for it.

    Raises:
        AdapterError: the folder cannot be written, is a snapshot of the hub cache, or the adapter could not be loaded
            again (a value is not finite, is not here, or is a shard that cannot be gathered). Nothing was written.
    """
    pieces = _site_patches(handle._entry.model, handle._entry.key)
    held = [
        (f"{path}.{place}." if place else f"{path}.", name, module, tensor)
        for path, patch in pieces.items()
        for place, module in patch.named_modules()
        for name, tensor in module.state_dict().items()
        if "." not in name
    ]
    team = Team(tensor for *_, tensor in held)
    tensors = {prefix + name: stored(module, name, t, prefix[:-1]) for prefix, name, module, t in held}
    if team.writes:
        try:
            write(directory, _files(handle, pieces, tensors))
        except BaseException as error:
            team.told(f"{type(error).__name__}: {error}")
            raise
    if (told := team.told(None)) is not None:
        raise AdapterError(f"the rank that writes could not save the adapter: {told}")
    return Path(directory)


def _files(handle: PatchHandle, pieces: dict[str, SitePatch], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Name -> content of the files of an adapter; what `load` would refuse is refused here."""
    from safetensors.torch import save as serialized

    entry, base, sites = handle._entry, handle._entry.model, handle.sites
    known = [(s, pieces[s.path].variants) for s in sites if s.path in pieces]
    for name, made in made_for(known).items():
        if name not in tensors or tuple(tensors[name].shape) != made.shape:
            found = list(tensors[name].shape) if name in tensors else "not there"
            raise AdapterError(
                f"{name} should be {list(made.shape)} and is {found}: a shard of it (FSDP1, DeepSpeed ZeRO-3). Save "
                "inside FSDP.summon_full_params or deepspeed.zero.GatheredParameters"
            )
        if why := unusable(tensors[name]):
            raise AdapterError(f"{name} holds {why}, so the adapter is not saved; its training went wrong")
    changed = [name for name, value in derived(known).items() if differs(tensors[name], value)]
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
        "sites": [{"path": s.path, "heads": s.num_heads, "kv_heads": s.num_kv_heads} for s in sites],
        "tensors": {name: list(t.shape) for name, t in tensors.items()} or None,
    }
    if changed:  # buffers that somebody wrote to: the config alone would not bring them back
        data["changed"] = changed
    text = (json.dumps(data, indent=2) + "\n").encode()
    check_config(parse(text, "what would be saved"), "what would be saved")
    files = {CONFIG_NAME: text}
    if tensors:
        files[TENSORS_NAME] = serialized(tensors, metadata={"format": "pt", "attn_patch_format": str(FORMAT)})
    return files


# -- load -----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The checked JSON of an adapter.

    Raises:
        AdapterError: unreadable, incomplete, out of bounds, unknown keys, or a newer format.
    """
    file = folder / CONFIG_NAME
    return check_config(parse(read(folder, CONFIG_NAME, FILE_BYTES), file), file)


def load(
    model: nn.Module, directory: str | Path, impl: str | None = None, revision: str | None = None
) -> PatchHandle:
    """Put a saved adapter on `model` (see `hf_attn_patch.load`).

    Args:
        revision: commit, tag or branch of an adapter on the hub.

    Raises:
        AdapterError: missing, damaged, newer, out of bounds, or an option names a file. ModelMismatchError: made for
            another model. PatchError: what `patch` refuses. The model is as it was.
    """
    folder = find(directory, revision)
    said = read(folder, CONFIG_NAME, FILE_BYTES)
    data = check_config(parse(said, folder / CONFIG_NAME), folder / CONFIG_NAME)
    header = read_header(folder, data["tensors"])
    try:
        with from_a_stranger():
            return _load(model, folder, data, header, said, impl)
    except (PatchError, Warning):
        raise
    except Exception as error:  # a method met data that no save() of it writes
        raise AdapterError(
            f"the adapter in {folder} holds values that {printable(data['method'])} cannot work with: "
            f"{type(error).__name__}: {printable(error, 200)}"
        ) from error


def _load(
    model: nn.Module,
    folder: Path,
    data: dict[str, Any],
    header: dict[str, Any],
    said: bytes,
    impl: str | None,
) -> PatchHandle:
    from .patching import patch_model
    from .plan import plan

    config = registry.get(data["method"]).from_dict(data["config"])
    settings = {key: data[key] for key in ("part", "layers", "heads", "cache")} | {
        "impl": impl or data["impl"]
    }
    _check_model(model, folder, data)
    made = plan(model, config, **settings)
    _check_sites(made, folder, data)
    planned = list(zip(made.sites, made.variants))
    expected = made_for(planned)
    check_header(header, expected, folder, base_model(model))
    _check_place(made, any(m.trainable for m in expected.values()), bool(expected))
    tensors = read_tensors(folder, header)
    if (
        tensors and read(folder, CONFIG_NAME, FILE_BYTES) != said
    ):  # a save takes the config away first, puts it back last
        raise AdapterError(f"{folder} was saved to while it was read; load it again")
    check_derived(tensors, derived(planned), set(data.get("changed", ())), folder)
    handle = patch_model(model, config, **settings)
    try:
        for path, piece in _site_patches(handle._entry.model, handle._entry.key).items():
            piece.load_state_dict({name: tensors[f"{path}.{name}"] for name in piece.state_dict()})
    except BaseException:
        handle.remove()
        raise
    return handle


def _check_model(model: nn.Module, folder: Path, data: dict[str, Any]) -> None:
    base = base_model(model)
    expected = data["base_model"]["model_type"]
    if base.config.model_type != expected:
        raise ModelMismatchError(
            f"the adapter in {folder} was made for a {printable(expected)} model "
            f"({printable(data['base_model'].get('id') or 'no id')}), this is {base.config.model_type}"
        )
    available = {path for path, _ in base.named_modules()}
    missing = [s["path"] for s in data["sites"] if s["path"] not in available]
    if missing:
        raise ModelMismatchError(
            f"the adapter in {folder} patches {len(data['sites'])} sites, {len(missing)} of which this model lacks, "
            f"first {printable(missing[0])}"
        )


def _check_sites(made: Plan, folder: Path, data: dict[str, Any]) -> None:
    saved = {s["path"]: (s["heads"], s["kv_heads"]) for s in data["sites"]}
    here = {s.path: (s.num_heads, s.num_kv_heads) for s in made.sites}
    if here != saved:
        path = min(p for p in saved.keys() | here.keys() if saved.get(p) != here.get(p))
        describe = lambda heads: "no site" if heads is None else f"{heads[0]} heads / {heads[1]} KV heads"
        raise ModelMismatchError(
            f"the adapter in {folder} was made for {len(saved)} sites, on this model it would patch {len(here)}: "
            f"{path} was {describe(saved.get(path))} and is {describe(here.get(path))} here"
        )


def _check_place(made: Plan, trainable: bool, tensors: bool) -> None:
    """Refuse where the values of an adapter could not be put.

    Raises:
        AdapterError: learned tensors for a sharded model, or tensors for an offloaded one.
    """
    for site in made.sites:
        for parameter in site.module.parameters():
            if trainable and hasattr(parameter, "full_tensor"):
                raise AdapterError(
                    f"{site.path} is sharded already (FSDP2 or tensor parallel), and {made.config.name} has parameters "
                    "of its own: every rank would train a private copy of them. Load the adapter first, then call "
                    "fully_shard"
                )
            if tensors and parameter.is_meta:
                raise AdapterError(
                    f"{site.path} is offloaded (its parameters are on the meta device), so the tensors of "
                    f"{made.config.name} would have no place. Load the adapter before the model is dispatched"
                )
