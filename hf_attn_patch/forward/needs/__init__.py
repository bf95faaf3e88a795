"""Facts of a forward that methods may ask for, one provider per file (see `base.Need`)."""

from .added_tokens import AddedTokens
from .attention_input import AttentionInput, QueryBeforeNorm
from .base import Given, Hooks, Need, needs_of, wants
from .grid import TokenGrid
from .head_mask import HeadMask
from .image_free import ImageFreePass
from .images import ImageKeys
from .layer_input import LayerInput
from .losses import AuxiliaryLosses
from .prompt import PromptLength

BY_NAME = {  # names of version 0.1
    "prompt": PromptLength(),
    "image_keys": ImageKeys(),
    "grid": TokenGrid(),
    "layer_input": LayerInput(),
    "attention_input": AttentionInput(),
    "query_before_norm": QueryBeforeNorm(),
    "image_free": ImageFreePass(),
    "added_tokens": AddedTokens(),
    "losses": AuxiliaryLosses(),
    "head_mask": HeadMask(),
}

__all__ = [
    "AddedTokens",
    "AttentionInput",
    "AuxiliaryLosses",
    "Given",
    "HeadMask",
    "Hooks",
    "ImageFreePass",
    "ImageKeys",
    "LayerInput",
    "Need",
    "PromptLength",
    "QueryBeforeNorm",
    "TokenGrid",
    "needs_of",
    "wants",
]
