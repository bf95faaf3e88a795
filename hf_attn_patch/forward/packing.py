"""Several sequences in one row, told by whatever tells: position ids that begin again, lengths for a varlen kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..call.mask import Mask

if TYPE_CHECKING:
    from .needs.base import Given
    from .running import Running


def look(running: Running, given: Given) -> None:
    """Note which sequence of its row every token belongs to, if the arguments of the outermost model say so."""
    positions = given.get("position_ids")
    running.positions_given = positions is not None
    if (
        torch.compiler.is_compiling()
    ):  # nobody can look: a method that counts tokens asserts that nothing restarts
        if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] > 1:
            running.restarts = _begins(positions, given.get("attention_mask"), running.seen or 0).any()
        return
    told = from_lengths(given.arguments)
    if told is not None:
        running.sequences, running.separate = told, True
        return
    if not isinstance(positions, Tensor):
        return
    if positions.ndim == 3 and positions.shape[0] == 4:  # text positions in front of those on three axes
        positions = positions[0]
    if positions.ndim != 2 or positions.shape[1] < 2:
        return
    running.sequences = from_positions(positions, given.get("attention_mask"), running.seen or 0)


def from_lengths(arguments: dict[str, Any]) -> Tensor | None:
    """Sequence number of every token [1, L] or [B, L] from ``cu_seq_lens_q`` (cumulative lengths of a flattened batch)
    or ``seq_idx``; None if neither is given."""
    numbers, ends = arguments.get("seq_idx"), arguments.get("cu_seq_lens_q")
    if isinstance(numbers, Tensor) and numbers.ndim == 2:
        return numbers.long()
    if not isinstance(ends, Tensor) or ends.ndim != 1 or ends.numel() < 3:
        return None
    length = int(ends[-1])
    begins = torch.zeros(length, dtype=torch.long, device=ends.device)
    inner = ends[1:-1].long()
    begins[inner[inner < length]] = 1
    return begins.cumsum(0)[None]


def from_positions(positions: Tensor, attention_mask: Any, seen: int) -> Tensor | None:
    """Sequence number of every token [B, L] where the position ids of real tokens begin again; None: nowhere.

    Without a mask and a cache any other step than 1 begins a sequence, as it does for transformers. One wait for the
    device per forward that is given position ids.
    """
    begins = _begins(positions, attention_mask, seen)
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))


def _begins(positions: Tensor, attention_mask: Any, seen: int) -> Tensor:
    """bool [B, L - 1]: a sequence begins with the token behind."""
    step = positions.diff(dim=1)
    if attention_mask is None and not seen:
        return step != 1
    real = _real(attention_mask, seen, positions.shape[1])
    if real is None:
        first = positions[:, :1]
    else:
        rows = max(positions.shape[0], real.shape[0])  # either may stand for every row
        real, positions = real.to(step.device).expand(rows, -1), positions.expand(rows, -1)
        first = positions.gather(1, real.to(torch.int8).argmax(1, keepdim=True))
    # behind a cache, where the row began is not seen; a sequence begins at 0 then
    begins = (step <= 0) & (positions[:, 1:] <= (torch.zeros_like(first) if seen else first))
    return begins if real is None else begins & real[:, 1:] & real[:, :-1]


def _real(attention_mask: Any, seen: int, length: int) -> Tensor | None:
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if isinstance(attention_mask, Mask):
        attention_mask = attention_mask.padding
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    begin = seen if attention_mask.shape[1] >= seen + length else attention_mask.shape[1] - length
    return attention_mask[
        :, begin : begin + length
    ].bool()  # masks of static caches are longer than what was seen
