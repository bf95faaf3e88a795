"""Which keys are image tokens, from the input ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CacheError
from ..conversation import keep_rows, of_rows
from .base import Given, Need

if TYPE_CHECKING:
    from ..running import Running


def image_token_ids(config: Any) -> list[int]:
    """Placeholder ids of image and video tokens in a model config."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = []
    for source in (config, getattr(config, "get_text_config", lambda: None)()):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value not in found:
                found.append(value)
    return found


@dataclass(frozen=True)
class ImageKeys(Need):
    says = "which keys are image tokens (from input_ids)"
    per_prompt = True

    def begins(self, running: Running, given: Given) -> None:
        if not given.has_cache or not isinstance(given.ids, Tensor) or "images done" in running.scratch:
            return
        ids, seen = given.ids, running.seen or 0
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in image_token_ids(running.config):
            found |= ids == token
        memory = running.memory
        before = of_rows(memory, "image_keys", ids.shape[0])
        if seen == 0:
            before = found.new_zeros(ids.shape[0], 0)
        if before is None:
            if running.override.get("image_keys") is None:
                raise CacheError(
                    f"the cache holds {seen} tokens that were read without this patch (or as inputs_embeds), so which "
                    "of them are image tokens is unknown. Start with a fresh cache, or say it with "
                    "hap.prompt(model, image_keys=...)"
                )
            return
        before = before[:, :seen].expand(ids.shape[0], -1).to(found.device)
        keep_rows(memory, "image_keys", torch.cat([before, found], 1))
        running.scratch["images done"] = True
