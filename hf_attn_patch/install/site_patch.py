"""`SitePatch`: one patch on one site, and `Call`: what its method is told about one attention call there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..forward.checkpointing import in_backward
from ..forward.needs.base import needs_of
from ..model.sites import Site

if TYPE_CHECKING:
    from ..forward.running import Running
    from ..registry import Patch


class SitePatch(nn.Module):
    """One patch on one site: the method's config for this site, plus the tensors it declared.

    variants: (query heads or None, config), so that heads of a site can carry different options.
    """

    entry: Any
    last: dict[str, Any]
    facts: dict[str, Any]
    variants: list[tuple[tuple[int, ...] | None, Patch]]

    def __init__(self, site: Site, entry: Any, variants: list[tuple[tuple[int, ...] | None, Patch]]):
        super().__init__()
        self.entry = entry
        self.variants = variants
        self.path, self.layer, self.part = site.path, site.layer, site.part
        self.facts = {
            "layer": site.layer,
            "num_heads": site.num_heads,
            "num_kv_heads": site.num_kv_heads,
            "causal": site.causal,
            "merged": site.merged,
        }
        # the first variant's tensors live here, those of further ones (heads with other options) in children 1, 2, ...
        for number, (_, config) in enumerate(variants):
            holder = nn.Module() if number else self
            for name, tensor in config.tensors(site).items():
                if isinstance(tensor, nn.Parameter):
                    holder.register_parameter(name, tensor)
                else:
                    holder.register_buffer(name, tensor)
            if number:
                self.add_module(str(number), holder)
        self.last = {}

    @property
    def frees_cache(self) -> bool:
        """True if it may have had tokens evicted from the cache."""
        return self.entry.cache == "auto" and self.entry.config.frees_cache

    @property
    def counts(self) -> bool:
        """True if the method counts tokens of a sequence, or edits by what is known of its prompt, so that packed rows
        are cut into their sequences for it."""
        return any(
            config.counts or any(need.per_prompt for need in needs_of(config)) for _, config in self.variants
        )

    @property
    def counts_itself(self) -> bool:
        """True if its edit counts tokens before any rule does, so that padding inside rows must be cut out for it."""
        return any(config.counts == "edit" for _, config in self.variants)

    def holder(self, number: int) -> nn.Module:
        """The module that holds the tensors of variant `number`."""
        return self.get_submodule(str(number)) if number else self

    def extra_repr(self) -> str:
        state = "" if self.entry.enabled else ", disabled"
        return ", ".join(repr(config) for _, config in self.variants) + state


class Call:
    """Facts of one attention call for `Patch.edit`: where, on which heads, in which forward.

    layer, path, part: the site. heads: query heads to edit (None = all). tensors: the module that holds the
    method's parameters and buffers for these heads. context: facts of the running forward. training: the model trains.
    """

    def __init__(
        self, patch: SitePatch, variant: int, context: Running | None, causal: bool, training: bool = False
    ):
        self.layer, self.path, self.part = patch.layer, patch.path, patch.part
        self.heads, self.tensors = patch.variants[variant][0], patch.holder(variant)
        self.context, self.causal = context, causal
        self.key, self.training = patch.entry.key, training

    def add_loss(self, name: str, value: Tensor, weight: float) -> None:
        """Add ``weight * mean over sites of value`` (0-d) to the loss of this forward; ignored unless the model trains.

        A patch that calls it lists "losses" in its `needs`. A layer that runs again in backward (checkpointing)
        computes its value again, but it counts once.
        """
        if self.training and self.context is not None and not in_backward():
            self.context.losses.add(f"{self.key}.{name}", self.path, value, weight)
