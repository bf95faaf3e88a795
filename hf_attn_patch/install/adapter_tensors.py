"""Tensors of an adapter: what a site should have, what a file declares, and what a sharded or offloaded model holds."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AdapterError, ModelMismatchError
from ..model.sites import Site
from ..options import short
from .adapter_data import FILE_BYTES, NUMBER, parse, printable
from .adapter_folder import CONFIG_NAME, TENSORS_NAME, read

LEAST = 1 << 30  # bytes that the tensors of an adapter may always have; more only up to the size of the model
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What a method makes for a site: shape, dtype, and whether it is learned or follows from the config."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool


class _Shapes(TorchFunctionMode):
    """Random numbers from no generator: on meta there are no numbers to draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "generator"})


def _named(site: Site, variants: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, (_, config) in enumerate(variants):
        prefix = f"{site.path}.{number}." if number else f"{site.path}."
        found |= {prefix + name: tensor for name, tensor in config.tensors(site).items()}
    return found


def made_for(sites: Iterable[tuple[Site, Any]]) -> dict[str, Made]:
    """Name -> what the methods make for these (site, variants), without memory for it."""
    found: dict[str, Made] = {}
    for site, variants in sites:
        try:
            with torch.device("meta"), _Shapes():
                tensors = _named(site, variants)
        except Exception:  # a method that computes with weights of the model
            tensors = _named(site, variants)
        for name, t in tensors.items():
            found[name] = Made(tuple(t.shape), t.dtype, isinstance(t, nn.Parameter))
    return found


def derived(sites: Iterable[tuple[Site, Any]]) -> dict[str, Tensor]:
    """Name -> value of every tensor that follows from the config alone."""
    return {
        name: t.detach()
        for site, variants in sites
        for name, t in _named(site, variants).items()
        if not isinstance(t, nn.Parameter)
    }


def differs(saved: Tensor, config_says: Tensor) -> bool:
    """True unless `saved` is what the config says, as far as its dtype can hold it."""
    return not torch.equal(saved.cpu(), config_says.cpu().to(saved.dtype))


def unusable(tensor: Tensor) -> str:
    """Why a value cannot be part of an adapter, or ""."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    if not bool(torch.isfinite(tensor).all()):
        return "NaN or infinity"
    top = float(tensor.abs().max())
    return f"{top:.3g} (at most {NUMBER:.3g} is read)" if top > NUMBER else ""


# -- reading --------------------------------------------------------------------------------------------------------


def read_header(folder: Path, declared: Mapping[str, list[int]] | None) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape, data_offsets of the tensors of a folder; only the header is read.

    Raises:
        AdapterError: missing, damaged, too long, or other tensors than the JSON of the adapter declares.
    """
    if not declared:
        return {}
    file = folder / TENSORS_NAME
    try:
        size = file.stat().st_size
    except OSError:
        raise AdapterError(f"{file} is missing; {CONFIG_NAME} declares {len(declared)} tensors") from None
    damaged = lambda why: AdapterError(f"{file} ({size} bytes) is corrupted or truncated: {why}")
    start = read(folder, TENSORS_NAME, 8)[:8]
    if len(start) < 8:
        raise damaged("it has no header")
    (length,) = struct.unpack("<Q", start)
    if length > min(FILE_BYTES, size - 8):
        raise damaged(f"its header would be {length:,} bytes long")
    header = parse(
        read(folder, TENSORS_NAME, 8 + length)[8 : 8 + length], f"the header of {file}", largest=2**53
    )
    if not isinstance(header, dict):
        raise damaged("its header is no object")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        shape, offsets = (
            entry.get(k) if isinstance(entry, dict) else None for k in ("shape", "data_offsets")
        )
        if (
            not isinstance(shape, list)
            or not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(n) is int and n >= 0 for n in [*shape, *offsets])
            or not isinstance(entry.get("dtype"), str)
        ):
            raise damaged(f"the header says {short(entry)} of {printable(name)}")
        end = max(end, offsets[1])
    found = {name: entry["shape"] for name, entry in header.items()}
    if found != declared:
        wrong = sorted(k for k in set(found) | set(declared) if found.get(k) != declared.get(k))
        k = wrong[0]
        raise AdapterError(
            f"{file} does not match {CONFIG_NAME}: {printable(k)} is {found.get(k)} in the file and {declared.get(k)} "
            f"in the config ({len(wrong)} tensors differ)"
        )
    if end != size - 8 - length:
        raise damaged(f"its header describes {end:,} bytes of data, there are {size - 8 - length:,}")
    return header


def check_header(
    header: Mapping[str, Any], expected: Mapping[str, Made], folder: Path, model: nn.Module
) -> None:
    """Refuse tensors that the method would not make on this model, before any of their data is read.

    Raises:
        AdapterError: some are missing, too many, or no floating-point numbers. ModelMismatchError: another shape.
    """
    file = folder / TENSORS_NAME
    for name, made in expected.items():
        if name not in header:
            raise AdapterError(f"{file} lacks {name}")
        if tuple(header[name]["shape"]) != made.shape:
            raise ModelMismatchError(
                f"{name} is {header[name]['shape']} in {folder}, this model needs {list(made.shape)}"
            )
        dtype = DTYPES.get(header[name]["dtype"])
        fits = dtype is not None and (
            dtype == made.dtype or (dtype.is_floating_point and made.dtype.is_floating_point)
        )
        if not fits:
            raise AdapterError(
                f"{name} has dtype {printable(header[name]['dtype'], 12)} in {folder}, the method makes "
                f"{str(made.dtype).removeprefix('torch.')}"
            )
    if extra := sorted(set(header) - set(expected)):
        raise AdapterError(f"{file} holds tensors for sites that were not patched: {printable(extra[0])}")
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    room = max(LEAST, sum(p.numel() * p.element_size() for p in model.parameters()))
    if size > room:
        raise AdapterError(f"{file} holds {size:,} bytes of tensors, more than the model and than {LEAST:,}")


def read_tensors(folder: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder whose `header` was checked.

    Raises:
        AdapterError: damaged, or values that are not finite.
    """
    if not header:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = folder / TENSORS_NAME
    size = max(entry["data_offsets"][1] for entry in header.values()) + FILE_BYTES + 8
    raw = read(folder, TENSORS_NAME, size)
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AdapterError(
            f"{file} ({len(raw)} bytes) is corrupted or truncated: {printable(error)}"
        ) from error
    changed = {
        k
        for k in {*tensors, *header}
        if k not in tensors or k not in header or list(tensors[k].shape) != header[k]["shape"]
    }
    if changed:
        raise AdapterError(f"{file} changed while it was read; try again")
    for name, tensor in tensors.items():
        if why := unusable(tensor):
            raise AdapterError(f"{file}: {name} holds {why}")
    return tensors


def check_derived(
    tensors: Mapping[str, Tensor], says: Mapping[str, Tensor], changed: set[str], folder: Path
) -> None:
    """Refuse a tensor that contradicts the config it follows from, unless the adapter says that it was changed.

    Raises:
        AdapterError: names the tensor.
    """
    for name, value in says.items():
        if name not in changed and differs(tensors[name], value):
            raise AdapterError(
                f"{folder / TENSORS_NAME}: {name} is not what {CONFIG_NAME} says, and nothing was learned there: the "
                "two files do not belong together, or one was edited. Save the adapter anew"
            )


# -- writing --------------------------------------------------------------------------------------------------------


def stored(module: nn.Module, name: str, tensor: Tensor, path: str) -> Tensor:
    """The value of a tensor of `module`: gathered from all ranks if it is sharded, fetched if it is offloaded.

    Raises:
        AdapterError: the value is not here.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            weights = getattr(part, "weights_map", None)
            if weights is not None and name in weights:
                return weights[name].detach().cpu().contiguous()
        raise AdapterError(
            f"{path}.{name} is offloaded (on the meta device) and no hook of accelerate knows where its value is; save "
            "the adapter before the model is offloaded, or bring the model back to a device first"
        )
    return tensor.detach().cpu().contiguous()


class Team:
    """Ranks that hold shards of one adapter: all of them gather, the first writes, all hear how it went."""

    def __init__(self, tensors: Iterable[Tensor]):
        meshes = (getattr(t, "device_mesh", None) for t in tensors)
        self.mesh: Any = next((m for m in meshes if m is not None), None)

    @property
    def writes(self) -> bool:
        """True on the rank that writes (the only one, if nothing is sharded)."""
        return self.mesh is None or not any(self.mesh.get_coordinate() or ())

    def told(self, error: str | None) -> str | None:
        """What went wrong on the writing rank, told to all ranks; they wait for it here."""
        if self.mesh is None:
            return error
        import torch.distributed as dist

        said = [error]
        for axis in range(self.mesh.ndim):  # along the first axis, then from each of those along the next
            group = self.mesh.get_group(axis)
            dist.broadcast_object_list(said, src=dist.get_global_rank(group, 0), group=group)
        return said[0]
