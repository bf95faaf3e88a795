"""`patch_model`: survey, plan, apply; what `hf_attn_patch.patch` and loading an adapter share."""

from __future__ import annotations

import warnings
from typing import Any

from .. import registry
from ..model import selection
from ..model.selection import Selector
from ..model.survey import Survey
from ..model.wrappers import transformers_models
from .apply import apply
from .handle import PatchHandle
from .plan import plan, plan_on
from .several import SeveralHandle


def patch_model(
    model: Any,
    name_or_config: str | registry.Patch,
    *,
    part: str | None = None,
    layers: Selector = None,
    heads: Selector = None,
    impl: str = "auto",
    cache: str = "auto",
    **options: Any,
) -> PatchHandle:
    """See `hf_attn_patch.patch`."""
    layers, heads = selection.settled(layers), selection.settled(heads)
    several = [one for _, one in transformers_models(model)]
    if len(several) > 1:
        settings = dict(part=part, layers=layers, heads=heads, impl=impl, cache=cache, **options)
        return _patch_several(model, several, name_or_config, settings)
    survey, handle = Survey.of(model), None
    try:
        with survey.at_work():
            made = plan_on(
                survey,
                name_or_config,
                part=part,
                layers=layers,
                heads=heads,
                impl=impl,
                cache=cache,
                **options,
            )
            for note in made.warnings:
                warnings.warn(f"{made.config.name}: {note}", stacklevel=2)
            handle = apply(survey, made, layers, heads)
        return handle
    except BaseException:  # an interrupt after the last step
        if handle is not None:
            handle.remove()
        raise


def _patch_several(
    model: Any, several: list[Any], name_or_config: str | registry.Patch, settings: dict[str, Any]
) -> PatchHandle:
    """`patch` on every model of a wrapper: all are checked before the first is changed."""
    for one in several:
        plan(one, name_or_config, **settings)
    handles: list[PatchHandle] = []
    try:
        for one in several:
            handles.append(patch_model(one, name_or_config, **settings))
    except BaseException:
        for handle in reversed(handles):
            handle.remove()
        raise
    return SeveralHandle(model, handles)
