"""Tensor parallelism: an attention function sees the heads of its rank, a user writes about all of them.

A site patch is made for the local heads, here and nowhere else: its site, the heads of its variants, and what its
config says head by head.
"""

from __future__ import annotations

import copy
from typing import Any

from .. import registry
from ..errors import ModelMismatchError
from ..model.head_sets import Head, HeadSet
from ..model.heads import HeadSlice
from ..model.sites import Site

Variants = list[tuple[tuple[int, ...] | None, registry.Patch]]


def check(config: registry.Patch, site: Site) -> None:
    """Refuse a method that cannot be cut to the heads of one rank.

    A method says that every head goes by itself with ``head_state``: names of the attributes that hold something head
    by head (a row per layer, a `HeadSet`, or one list for all layers), () if nothing does.

    Raises:
        ModelMismatchError: the method does not say so, or trains parameters.
    """
    if site.slice is None:
        return
    here = f"heads {site.slice.start}-{site.slice.stop - 1} of {site.num_heads} are on this rank"
    if getattr(type(config), "head_state", None) is None:
        raise ModelMismatchError(
            f"{config.name}: {site.path} is tensor parallel ({here}), and this method looks at all heads of a layer "
            "together (or does not say that it does not: Patch.head_state). Load the model without tp_plan"
        )
    if any(getattr(t, "requires_grad", False) for t in config.tensors(site).values()):
        raise ModelMismatchError(
            f"{config.name}: {site.path} is tensor parallel ({here}), and its parameters would be trained apart on "
            "every rank. Train without tp_plan; a tensor-parallel model can use the result"
        )


def localized(site: Site, variants: Variants) -> tuple[Site, Variants]:
    """(site, variants) with the heads of this rank only, counted from its first."""
    cut = site.slice
    if cut is None:
        return site, variants
    local = [(cut.local(heads), _cut_config(config, site, cut)) for heads, config in variants]
    return site.local(), [(heads, config) for heads, config in local if heads is None or heads]


def _cut_config(config: registry.Patch, site: Site, cut: HeadSlice) -> registry.Patch:
    names = getattr(type(config), "head_state", ())
    if not names:
        return config
    twin = copy.copy(config)
    for name in names:
        setattr(twin, name, _cut(getattr(config, name), site, cut))
    return twin


def _cut(value: Any, site: Site, cut: HeadSlice) -> Any:
    """A `HeadSet`, a table with a row per layer, or one row for every layer, for the heads of one rank."""
    if isinstance(value, HeadSet):
        bounds = {"q": (cut.start, cut.stop), "kv": (cut.kv_start, cut.kv_stop)}
        kept = [
            Head(h.layer, h.head - bounds[h.kind][0], h.kind, h.score)
            for h in value.heads
            if bounds[h.kind][0] <= h.head < bounds[h.kind][1]
        ]
        return HeadSet(tuple(kept), value.models, value.objectives)
    if not isinstance(value, (list, tuple)) or not value:
        return value
    if isinstance(value[0], (list, tuple, dict)) and not _is_row(value, site):
        rows = list(value)
        if site.layer < len(rows):
            rows[site.layer] = _cut_row(rows[site.layer], site, cut)
        return rows
    return _cut_row(value, site, cut)


def _is_row(value: Any, site: Site) -> bool:
    """True if the entries of `value` are of heads: tuples of numbers, where a table holds lists or mappings."""
    return all(isinstance(v, tuple) for v in value) and len(value) in (site.num_heads, site.num_kv_heads)


def _cut_row(row: Any, site: Site, cut: HeadSlice) -> Any:
    if isinstance(row, dict):  # query head -> value
        return {h - cut.start: v for h, v in row.items() if cut.start <= h < cut.stop}
    if len(row) == site.num_heads:
        return row[cut.start : cut.stop]
    if len(row) == site.num_kv_heads:
        return row[cut.kv_start : cut.kv_stop]
    raise ModelMismatchError(
        f"{site.path} has {site.num_heads} query / {site.num_kv_heads} KV heads, a row of {len(row)} fits neither"
    )
