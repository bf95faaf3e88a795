"""Base of methods that put tokens of their own in front of those of a layer (`forward.needs.added_tokens`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ModelMismatchError
from ..forward.needs import Need
from ..forward.needs.added_tokens import AddedTokens, is_last, takes_pixels, width
from ..model.sites import Site
from ..registry import Patch


@dataclass
class AddsTokens(Patch):
    """Base of methods that add tokens to a layer of a vision model."""

    parts = ("vision",)
    needs: ClassVar[tuple[Need, ...]] = (AddedTokens(),)
    exclusive = frozenset({"added tokens"})
    head_selectable = False
    trainable = True

    def added_tokens(self, tensors: nn.Module, training: bool) -> Tensor:
        """Tokens [P, C] that go in front of those of the layer."""
        raise NotImplementedError

    def class_tokens(self, hidden: Tensor, added: int) -> Tensor | None:
        """Rows [B, K, C] of what leaves the last layer (added ones first) that the logits are made of; None: none."""
        return None

    def class_logits(self, tokens: Tensor, tensors: nn.Module) -> Tensor:
        """Logits [B, classes] of the class tokens [B, K, C] behind the model's last norm."""
        raise NotImplementedError

    def check(self, site: Site) -> None:
        if width(site) is None or is_last(site) is None:
            raise ModelMismatchError(
                f"{self.name}: the config of {site.path} has no hidden_size and num_hidden_layers, so neither the "
                "width of a token nor the last layer is known"
            )
        if site.causal:
            raise ModelMismatchError(
                f"{self.name}: {site.path} is causal; tokens are added to bidirectional models only"
            )

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        if not takes_pixels(model):
            raise ModelMismatchError(
                f"{self.name}: {type(model).__name__} takes {getattr(model, 'main_input_name', None)!r}, not "
                "pixel_values; patch the vision tower by itself"
            )
        return []
