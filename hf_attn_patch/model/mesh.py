"""Models spread over processes: which heads a rank computes (tensor parallel), who owns sharded parameters (FSDP, DDP).

Read from the parameters, which are DTensors, and from what transformers notes on a model that it has distributed; the
name of a model family plays no part.
"""

from __future__ import annotations

import gc
import re
from typing import Any

from torch import nn

from .heads import KEY, OUT, QUERY, HeadSlice, projection, projection_layer


def _dtensor(value: Any) -> bool:
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def is_fully_sharded(module: nn.Module) -> bool:
    """True if FSDP2 (``fully_shard``) or FSDP1 manages the parameters of `module` itself."""
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__)


def tensor_parallel_size(model: Any) -> int:
    """Ranks that share every layer, 1 without tensor parallelism."""
    if isinstance(size := getattr(model, "_tp_size", None), int) and size > 1:
        return size
    if any(is_fully_sharded(m) for m in model.modules()):
        return 1
    sizes = [p.device_mesh.size() for p in model.parameters() if _dtensor(p) and _sharded(p)]
    return max(sizes, default=1)


def _sharded(parameter: Any) -> bool:
    return any(p.is_shard() for p in parameter.placements)


def why_not_parallel(model: Any) -> str | None:
    """Why no method can follow the way `model` is spread over processes, or None."""
    told = getattr(model.config, "distributed_config", None)
    for name, size in (("expert", "ep_size"), ("pipeline", "pp_size")):
        if (getattr(told, size, None) or 1) > 1:
            return f"it runs {name} parallel ({size}={getattr(told, size)}), which patches do not follow"
    if (getattr(model, "_tp_size", None) or 1) > 1 and getattr(told, "enable_expert_parallel", False):
        return "it runs expert parallel, which patches do not follow"
    if tensor_parallel_size(model) > 1 and "sequence_parallel" in _plan(model).values():
        return "it runs sequence parallel: a rank sees a slice of the tokens, and patches count all of them"
    return None


def _plan(model: Any) -> dict[str, str]:
    """How transformers has split which modules: the model's own plan, and what the user gave on top of it."""
    given = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
    return {**(getattr(model, "_tp_plan", None) or {}), **(given if isinstance(given, dict) else {})}


def _share(weight: Any, dim: int, sharded: bool) -> tuple[int, int] | None:
    """(rank, ranks) that hold slices of `weight` along `dim` for tensor parallelism, or None.

    Args:
        sharded: FSDP is at work too, so that a mesh without names is FSDP's.
    """
    names = weight.device_mesh.mesh_dim_names or ()
    for axis, placement in enumerate(weight.placements):
        tensor_parallel = "tp" in names[axis] if names else weight.device_mesh.ndim == 1 and not sharded
        if tensor_parallel and placement.is_shard(dim) and weight.device_mesh.size(axis) > 1:
            return weight.device_mesh.get_local_rank(axis), weight.device_mesh.size(axis)
    return None


def _style(model: Any, path: str) -> str | None:
    """How the plan of transformers splits the module at `path`."""
    for pattern, style in _plan(model).items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
            return style
    return None


def head_slice(
    model: Any,
    path: str,
    module: nn.Module,
    heads: int | None,
    kv_heads: int | None,
    dim: int | None,
    sharded: bool = False,
) -> tuple[HeadSlice | None, str | None]:
    """(slice of the heads that this rank computes or None = all of them, why that is not known) of one site.

    Args:
        heads, kv_heads, dim: those of the whole model. sharded: parameters of the model are managed by FSDP.
    """
    weights = {
        name: getattr(projection_layer(module, names), "weight", None)
        for name, names in (("query", QUERY), ("key", KEY), ("out", OUT))
    }
    if not any(_dtensor(p) and _sharded(p) for p in module.parameters()):
        return None, None
    query, out = weights["query"], weights["out"]
    if not _dtensor(query):
        return None, None if sharded else "its query projection is not split as the rest of it is"
    style = _style(model, f"{path}.{projection(module, QUERY)}")
    shares = [_share(w, 0, sharded) if _dtensor(w) else None for w in (query, weights["key"])]
    if sharded and shares[0] is None:
        return None, None
    if style is not None and style != "colwise":
        gathered = style in ("colwise_gather_output", "colwise_rep", "replicate")
        return None, None if gathered else f"its query projection is split as {style!r}"
    if style is None and not (shares[0] and _dtensor(out) and _share(out, 1, sharded)):
        return None, None if not shares[0] else "its heads are split over ranks in a way that cannot be read"
    if shares[0] is None or shares[0] != shares[1] or not heads or not kv_heads or not dim:
        return None, "its query and key projections are not split over the same ranks"
    rank, ranks = shares[0]
    if kv_heads % ranks or heads % ranks:
        return None, f"its {heads} query / {kv_heads} KV heads do not divide by {ranks} ranks"
    q, kv = heads // ranks, kv_heads // ranks
    return HeadSlice(rank * q, (rank + 1) * q, rank * kv, (rank + 1) * kv), None


def why_not_trainable(wrappers: tuple[nn.Module, ...], base: nn.Module) -> str | None:
    """Why parameters that are added now would be trained apart on every rank, or None.

    Args:
        wrappers: modules around the transformers model `base`.
    """
    from torch.nn.parallel import DistributedDataParallel

    for wrapper in wrappers:
        if isinstance(wrapper, DistributedDataParallel):
            return "the model is inside DistributedDataParallel, which reduces only gradients it knew when it was made"
    if _inside_ddp(base):
        return (
            "a DistributedDataParallel holds the model, which reduces only gradients it knew when it was made"
        )
    if any(is_fully_sharded(m) for m in (*wrappers, *base.modules())):
        return "the model is sharded by FSDP, whose groups hold only the parameters it has seen when it was applied"
    return None


def _inside_ddp(base: nn.Module) -> bool:
    """True if a DDP module somewhere holds `base`: the caller may have kept the inner model, which does not know."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if not (dist.is_available() and dist.is_initialized()):
        return False
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return any(module is base for one in wrappers for module in one.modules())
