"""How long the prompt is.

Known from what was said (`hap.prompt`) or from ``generate``, which is asked for the whole prompt whatever parts it
reads it in. A loop of one's own tells by what it does: a forward of several tokens is a part of the prompt of its
turn, a forward of one token on a filled cache is not. So the end of a prompt that comes in parts is known with its
last part, and the token that ended the part before was taken for the prompt's last one too early: where a method
edits that row, its keys and values are computed once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CacheError, PatchError
from ..generating import told_by_generate
from .base import Given, Need

if TYPE_CHECKING:
    from ..running import Running

SAY_IT = (
    "Say how long the prompt is with hap.prompt(model, length=...), read it in one forward, or use generate, which "
    "knows it"
)


@dataclass(frozen=True)
class PromptLength(Need):
    """edits_end: the method edits the row that ends the prompt. elastic: its options grow with the length of the
    prompt, so every part must be read with the length of the whole."""

    says = "length of the prompt"
    in_pieces = True
    per_prompt = True
    order = 1

    edits_end: bool = False
    elastic: bool = False

    def begins(self, running: Running, given: Given) -> None:
        if not given.outermost or running.image_free_pass is not None:
            return
        memory, parts = running.memory, running.memory.parts
        if memory.told or parts == 0:
            return
        if parts == 1:
            if self.edits_end and running.cache is not None and isinstance(given.ids, Tensor):
                memory.last_ids = given.ids[:, -1:].detach()
            return
        if self.elastic and memory.first_prompt is None:
            raise PatchError(
                f"the prompt came in {parts} parts so far ({running.seen} tokens before this one), and how long it is "
                f"was not said, but the spans of this patch grow with its length. {SAY_IT}"
            )
        if self.edits_end and memory.last_ids is not None:
            _compute_again(running, given)
            memory.last_ids = given.ids[:, -1:].detach() if isinstance(given.ids, Tensor) else None


def track(running: Running, given: Given, seen: int, new: int) -> None:
    """What a forward of `new` tokens on a cache of `seen` says about the prompt (asked for every conversation)."""
    memory = running.memory
    if not given.outermost:  # inner models only add to what the outermost one said
        if memory.prompt_length is None and seen == 0:
            memory.prompt_length = running.override.get("length", new)
        return
    running.seen = seen
    said = running.override.get("length")
    if said is None and running.image_free_pass is None:
        said = told_by_generate(running.context)
    if seen == 0:
        memory.forget()
    if said is not None:
        memory.told, memory.prompt_length, memory.last_ids = True, said, None
        memory.first_prompt = said if memory.first_prompt is None else memory.first_prompt
        return
    if memory.told and memory.prompt_length is not None and seen < memory.prompt_length:
        return  # the rest of a prompt whose length was said with an earlier part
    if seen == 0 or new > 1:
        memory.parts += 1
        memory.told, memory.prompt_length = False, seen + new
    elif memory.first_prompt is None and memory.prompt_length is not None:
        memory.first_prompt = memory.prompt_length
    if new == 1 and seen:
        memory.parts, memory.last_ids = 0, None


def _compute_again(running: Running, given: Given) -> None:
    """Keys and values of the last token before this forward, without what is done to the row that ends a prompt."""
    from .images import image_token_ids

    memory, cache, seen = running.memory, running.cache, running.seen
    ids = memory.last_ids
    memory.last_ids = None
    assert seen is not None and ids is not None
    placeholders = image_token_ids(running.config)
    if placeholders and bool(torch.isin(ids, torch.tensor(placeholders, device=ids.device)).any()):
        raise PatchError(
            "the prompt comes in parts, and the token that ended the part before must be computed again, but it "
            "belongs to an image, whose features are not here any more. End no part inside or right behind an image, "
            f"or: {SAY_IT}"
        )
    inputs: dict[str, Any] = {"input_ids": ids, given.cache_name: cache, "use_cache": True}
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise PatchError(
                f"the prompt comes in parts, and the token that ended the part before must be computed again, which "
                f"needs an attention_mask [B, S] and got {type(mask).__name__}. {SAY_IT}"
            )
        inputs["attention_mask"] = mask[:, :seen]
    positions = given.get("position_ids")
    if isinstance(positions, Tensor):
        inputs["position_ids"] = positions[..., :1] - 1
    if "logits_to_keep" in given.names:
        inputs["logits_to_keep"] = 1
    try:
        cache.crop(-1)
        if int(cache.get_seq_length()) != seen - 1:
            raise CacheError(f"it still holds {int(cache.get_seq_length())} tokens")
    except Exception as error:
        raise CacheError(
            f"the prompt comes in parts, and the token that ended the part before must be computed again, which this "
            f"cache does not allow ({error}). {SAY_IT}"
        ) from error
    kept = {name: getattr(memory, name) for name in ("prompt_length", "first_prompt", "parts", "told")}
    before = dict(memory)
    with running.context.aside(None, {"length": seen + 1}), torch.set_grad_enabled(torch.is_grad_enabled()):
        given.module(**inputs)
    memory.update(before)
    for name, value in kept.items():
        setattr(memory, name, value)
