"""The transformers model inside whatever the caller holds: a wrapper module, a pipeline, a trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ModelMismatchError


def modules_in(thing: Any) -> list[nn.Module]:
    """`thing`, or the modules that an object which is no module holds (``pipeline().model``, a trainer's model)."""
    if isinstance(thing, nn.Module):
        return [thing]
    try:
        held = list(vars(thing).values())
    except TypeError:  # text, numbers, tensors
        return []
    return list({id(m): m for m in held if isinstance(m, nn.Module)}.values())


def transformers_models(thing: Any) -> list[tuple[str, Any]]:
    """(path, model) of every outermost transformers model in `thing`; models inside these are not listed."""
    from transformers import PreTrainedModel

    found: dict[int, tuple[str, Any]] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module), (path, module))
        elif id(module) not in seen:
            seen.add(id(module))
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

    for module in modules_in(thing):
        name = "" if module is thing else next(k for k, v in vars(thing).items() if v is module)
        visit(module, name)
    return list(found.values())


def base_model(model: Any) -> Any:
    """The transformers model inside `model` (PEFT, DDP, pipelines and other wrappers are looked through).

    Raises:
        ModelMismatchError: `model` is not, and does not contain, a transformers model, or it contains several that are
            independent of each other.
    """
    found = transformers_models(model)
    if not found:
        raise ModelMismatchError(
            f"expected a transformers model (or a wrapper around one), got {type(model).__name__}; "
            "load one with AutoModel.from_pretrained and pass the object"
        )
    if len(found) > 1:
        names = " and ".join(f"{path} ({type(one).__name__})" for path, one in found)
        first = found[0][0]
        raise ModelMismatchError(
            f"{type(model).__name__} holds {len(found)} independent transformers models: {names}. Pass the one that is "
            f"meant, for example wrapper.{first}; hap.unpatch and hap.active take the wrapper and see all of them"
        )
    return found[0][1]


def wrappers_of(thing: Any, base: nn.Module) -> tuple[nn.Module, ...]:
    """Modules around `base` in `thing`, outermost first (DDP, FSDP, PEFT, a compiled module, ...)."""
    around: list[nn.Module] = []
    for module in modules_in(thing):
        around += [m for m in module.modules() if m is not base and any(c is base for c in m.modules())]
    return tuple(around)
