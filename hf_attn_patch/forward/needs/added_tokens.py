"""Tokens that a patch puts in front of those of a layer, and class logits from what comes out of the last one.

A pre-hook of the layer adds the tokens, a hook takes their rows away again, so that the next layer and the model see as
many tokens as ever; both exist only while a patch needs them. The added tokens come first, which makes them prefix
tokens to whatever counts from the end of the sequence (grids, rotary positions of patches). A patch with classes also
gets to answer for the model: its logits go into the output, its cross-entropy into the loss, and labels never reach the
model's own head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelMismatchError
from ...model.devices import onloaded
from ...model.sites import Site, base_model, layer_module
from .base import Hooks, Need

if TYPE_CHECKING:
    from ..context import Context

CLASS_TOKENS, LABELS = "class_tokens", "class_labels"  # in the scratch space of a forward
CLASS_WEIGHT = "class_weight"  # parameter of a patch in the last layer that answers for the model


@dataclass(frozen=True)
class AddedTokens(Need):
    says = "tokens of the patch in front of those of the layer"
    order = 1  # the input of a layer (`LayerInput`) is what the model gave it, without them

    def install(self, hooks: Hooks) -> None:
        for path in hooks.paths:
            layer, patches = layer_module(hooks.model, path), hooks.patches_at(path)
            if any(adds(p.variants[0][1]) for p in patches):
                added = Added(hooks.context, path)
                hooks.before(layer, added.before)
                hooks.after(layer, added.after)
            if any(answers(p) for p in patches):
                base, head = base_model(hooks.model), Answers(hooks.context, hooks.model, path)
                hooks.before(base, head.before)
                # before the context's own hook, which ends the forward and adds auxiliary losses to the loss
                hooks.after(base, head.after, prepend=True)


def adds(config: Any) -> bool:
    """Whether a method adds tokens (`patches.adds_tokens.AddsTokens`)."""
    return callable(getattr(config, "added_tokens", None))


def takes_pixels(model: Any) -> bool:
    """Whether `model` is a vision model by itself."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def width(site: Site) -> int | None:
    """C, from the config of the attention module."""
    return getattr(getattr(site.module, "config", None), "hidden_size", None)


def is_last(site: Site) -> bool | None:
    """Whether a site is in the last layer of its model; None if its config does not say."""
    layers = getattr(getattr(site.module, "config", None), "num_hidden_layers", None)
    return None if layers is None else site.layer == layers - 1


def owner(context: Context, path: str) -> tuple[Any, Any] | None:
    """The enabled patch of the site at `path` that adds tokens, with its options there; None: there is none."""
    for patch in context.patches_at(path):
        config = patch.variants[0][1]
        if patch.entry.enabled and adds(config):
            return patch, config
    return None


def last_norm(model: nn.Module, path: str) -> nn.Module:
    """The norm that follows the layers of the site at `path`: the first one behind them in the order of definition.

    Raises:
        ModelMismatchError: there is none of the width of a token.
    """
    layer, behind = layer_module(model, path), False
    inside = {id(m) for m in layer.modules()}
    for module in model.modules():
        if id(module) in inside:
            behind = True
        elif behind and "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            return module
    raise ModelMismatchError(
        f"{type(model).__name__} has no norm behind its layers, so class tokens cannot be read"
    )


class Added:
    """Hooks of one layer (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, path: str):
        self.context, self.path = context, path

    def before(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        found = owner(self.context, self.path)
        if found is None:
            return None
        hidden = args[0] if args else kwargs.get("hidden_states")
        patch, config = found
        with onloaded(patch):
            tokens = config.added_tokens(patch, self.context.model.get_submodule(self.path).training)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[-1] != tokens.shape[-1]:
            shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelMismatchError(
                f"{config.name}: {type(layer).__name__} gets {shape}, expected tokens [B, N, {tokens.shape[-1]}]"
            )
        self.context.running().layers.setdefault(self.path, {})["added"] = tokens
        hidden = _joined(tokens, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def after(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        found, running = owner(self.context, self.path), self.context.running()
        tokens = running.layers.get(self.path, {}).pop("added", None)
        if tokens is None or found is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        chosen = found[1].class_tokens(hidden, len(tokens)) if answers(found[0]) else None
        if chosen is not None:
            running.scratch[CLASS_TOKENS] = chosen
        hidden = hidden[:, len(tokens) :]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Answers:
    """Hooks of the model whose classes a patch knows (a class, so that deepcopy carries its context along)."""

    def __init__(self, context: Context, model: nn.Module, path: str):
        self.context, self.path, self.norm = context, path, last_norm(model, path)

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if owner(self.context, self.path) is None or kwargs.get("labels") is None:
            return None
        self.context.running().scratch[LABELS] = kwargs["labels"]
        return args, {k: v for k, v in kwargs.items() if k != "labels"}

    def after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        scratch, found = self.context.running().scratch, owner(self.context, self.path)
        tokens, labels = scratch.get(CLASS_TOKENS), scratch.get(LABELS)
        if tokens is None or found is None or not hasattr(output, "keys"):
            return None
        with onloaded(found[0]):
            logits = found[1].class_logits(self.norm(tokens), found[0])
        output["logits"] = logits
        if labels is not None:
            output["loss"] = F.cross_entropy(logits.float(), labels.to(logits.device))
        return output


def _joined(tokens: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([tokens.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], 1)


def answers(patch: Any) -> bool:
    """Whether a site carries the weights of a class head (`CLASS_WEIGHT`): its layer is then the last."""
    return adds(patch.variants[0][1]) and CLASS_WEIGHT in patch._parameters


def drawn(seed: int, site: Site, number: int, *shape: int) -> Tensor:
    """Uniform numbers in -1 … 1 that depend on seed, layer and `number` only; torch's generator is left alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + site.layer * 101 + number)
    return 2 * torch.rand(shape, generator=generator) - 1
