"""What a vision model makes of a batch of images in one forward: tokens after every layer, and logits if it has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..api import active
from ..model.sites import base_model
from ..patches.adds_tokens import AddsTokens
from .features import _last_hidden_state, _needs_interpolation, prefix_tokens


@dataclass
class States:
    """One batch.

    layers: [B, tokens, D] after each layer, the last one after the model's final norm (only that one if no others were
    asked for, or the model gives none); None for a layer of another shape than the last. prefix: tokens before the
    patches. logits: [B, classes], or None.
    """

    layers: list[Any]
    prefix: int
    logits: Any | None

    def cls(self, layer: int = -1) -> Any:
        """float32 [B, D]: the CLS token, or the mean of the patches where there is none."""
        tokens = self.layers[layer].float()
        return tokens[:, 0] if self.prefix else tokens.mean(1)

    def patches(self, layer: int = -1) -> Any:
        """float32 [B, T, D]."""
        return self.layers[layer][:, self.prefix :].float()

    def __repr__(self) -> str:
        shape = list(self.layers[-1].shape)
        logits = "no logits" if self.logits is None else f"logits {list(self.logits.shape)}"
        return f"States({len(self.layers)} layers of {shape}, {self.prefix} prefix tokens, {logits})"


def added(model: Any, hidden: Any, last: Any) -> int:
    """Tokens that a patch put in front of those of the layer that `hidden` [B, tokens, D] came from: transformers notes
    the output of a layer before they are taken away again, if it was asked for states before the patch was there."""
    adds = any(isinstance(handle.config, AddsTokens) for handle in active(model))
    return max(hidden.shape[1] - last.shape[1], 0) if adds else 0


def states(model: Any, pixels: Any, every_layer: bool = False) -> States:
    """The states of one forward (two for a model whose head hides the features of its backbone).

    Args:
        pixels: [B, C, H, W] as the model wants them. every_layer: keep all layers, not the last one alone.

    Raises:
        ValueError: the model has no patch tokens (see `features`).
    """
    import torch

    backbone, outputs = base_model(model).base_model, []
    hook = backbone.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    more = {"output_hidden_states": True} if every_layer else {}
    try:
        with torch.inference_mode():
            out = model(pixel_values=pixels, **more, **_needs_interpolation(model, pixels))
            last = getattr(outputs[-1], "last_hidden_state", None) if outputs else None
            if last is None:
                last = _last_hidden_state(model, pixels)
    finally:
        hook.remove()
    hidden = getattr(out, "hidden_states", None) or getattr(
        outputs[-1] if outputs else None, "hidden_states", None
    )
    # the first entry is what enters the first layer
    before = [h[:, added(model, h, last) :] for h in (hidden or ())[1:-1]]
    before = [h if h.shape == last.shape else None for h in before]
    logits = getattr(out, "logits", None)
    logits = logits.float() if isinstance(logits, torch.Tensor) and logits.ndim == 2 else None
    return States([*before, last], prefix_tokens(model, pixels, last.shape[1]), logits)
