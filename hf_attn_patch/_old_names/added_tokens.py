"""`hf_attn_patch.added_tokens` is `forward.needs.added_tokens` and `patches.adds_tokens`."""

from hf_attn_patch.forward.needs.added_tokens import (
    CLASS_WEIGHT,
    answers,
    drawn,
    is_last,
    takes_pixels,
    width,
)
from hf_attn_patch.patches.adds_tokens import AddsTokens

__all__ = ["CLASS_WEIGHT", "AddsTokens", "answers", "drawn", "is_last", "takes_pixels", "width"]
