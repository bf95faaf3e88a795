"""Whether the caller passes ``head_mask=``, which transformers v5 accepts and ignores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Given, Need

if TYPE_CHECKING:
    from ..running import Running


@dataclass(frozen=True)
class HeadMask(Need):
    says = "whether the caller passes head_mask=, which transformers v5 swallows"
    in_pieces = True
    carried = False

    def begins(self, running: Running, given: Given) -> None:
        if given.get("head_mask") is not None and "head_mask" not in given.names:
            warnings.warn(
                f"{type(given.module).__name__} got head_mask=, which transformers v5 accepts and ignores; set the "
                "gates of the head_gate patch instead",
                stacklevel=2,
            )
