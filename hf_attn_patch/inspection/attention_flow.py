"""`attention_flow`: how much of the picture reaches a token through all layers (VL-SAM), as a map over the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..call.program import Program
from ..decoding.stream import unnoticed
from ..errors import ConfigError, PatchError
from .calls import probabilities, watched
from .heat_map import draw
from .image_grid import ImageTokens, image_tokens

Start = Literal["zero", "first"]
Columns = Literal["each", "final", "none"]
BLOCK = 128  # query rows whose probabilities exist at a time


def combined_heads(
    blocks: Iterable[tuple[Tensor, Tensor]], again: Iterable[tuple[Tensor, Tensor]], length: int
) -> Tensor:
    """``mean_h w_h S_h``, [N, N], with ``w_h = mean_i max_j S_hij``, from two passes over blocks of rows.

    blocks, again: (row numbers int64 [n], probabilities [H, n, N]), each row once; the same in both. length: N.
    """
    peaks = torch.stack([probs.amax(-1).sum(-1) for _, probs in blocks]).sum(0)  # [H]
    made = torch.zeros(length, length, dtype=peaks.dtype, device=peaks.device)
    for rows, probs in again:
        made[rows] = (probs * (peaks / length)[:, None, None]).mean(0)
    return made


class Flow:
    """``F_l = (I + T_l)(I + F_{l-1})``, fed layer by layer with T [N, N] of `combined_heads`.

    A causal model's first columns are reached from every row and would drown the others, so column j counts
    (j + 1) / N. What the paper leaves open is an option: the start (F_0 = 0, or F = T of the first layer) and when the
    columns are weighed (after each layer, at the end, never).
    """

    def __init__(self, start: Start = "zero", columns: Columns = "each"):
        if start not in ("zero", "first"):
            raise ConfigError(f"attention_flow: start={start!r} is unknown; choose zero or first")
        if columns not in ("each", "final", "none"):
            raise ConfigError(f"attention_flow: columns={columns!r} is unknown; choose each, final or none")
        self.start, self.columns = start, columns
        self.flow: Tensor | None = None

    def add(self, attention: Tensor) -> None:
        """One more layer, T [N, N]."""
        if self.flow is None and self.start == "first":
            self.flow = attention.clone()
            return
        one = torch.eye(len(attention), dtype=attention.dtype, device=attention.device)
        before = one if self.flow is None else one + self.flow
        self.flow = before + attention @ before
        if self.columns == "each":
            self.flow = self._weighed(self.flow)

    def result(self) -> Tensor:
        """F [N, N]; row i, column j: what reaches token i from token j."""
        if self.flow is None:
            raise PatchError("attention_flow: no layer has been seen")
        return self._weighed(self.flow) if self.columns == "final" else self.flow

    @staticmethod
    def _weighed(flow: Tensor) -> Tensor:
        length = len(flow)
        return flow * (torch.arange(1, length + 1, dtype=flow.dtype, device=flow.device) / length)


@dataclass(frozen=True)
class HeatMap:
    """How much each patch of one picture reaches some tokens.

    row: of the batch. tokens: columns of the tokens. values: float32 [tokens, h, w]. sources: the picture's columns.
    """

    row: int
    tokens: tuple[int, ...]
    values: np.ndarray
    sources: ImageTokens

    @property
    def mean(self) -> np.ndarray:
        """[h, w], the mean over the tokens, scaled to 0 … 1."""
        total = self.values.mean(0)
        low, high = float(total.min()), float(total.max())
        return (total - low) / (high - low) if high > low else np.zeros_like(total)

    def picture(self, image: Any = None, path: str | Path | None = None, title: str = "") -> str | None:
        """The map as SVG, over `image` (PIL or [H, W, 3]) if one is given; None without matplotlib (extra ``eval``).

        path: also written there.
        """
        text = draw(self.mean, image, title or f"attention flow to token {', '.join(map(str, self.tokens))}")
        if path is not None and text is not None:
            Path(path).write_text(text)
        return text

    def __repr__(self) -> str:
        h, w = self.values.shape[1:]
        y, x = np.unravel_index(int(self.mean.argmax()), (h, w))
        return f"HeatMap(row {self.row}, {len(self.tokens)} tokens, {h} x {w} patches, most at line {y}, column {x})"


def attention_flow(
    model: Any,
    inputs: dict[str, Any],
    *,
    tokens: Sequence[int] | None = None,
    start: Start = "zero",
    columns: Columns = "each",
    grid: tuple[int, int] | None = None,
    block: int = BLOCK,
) -> list[HeatMap]:
    """Heat maps over the pictures of `inputs`, one per picture, from one forward without a cache.

    Source: Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts (VL-SAM), arXiv
    2410.05963. There is no code; the formula is from a reading note, UNVERIFIED. Its open points are `start` and
    `columns`. Without weighing the columns the paper's own recall falls from 8.5 to 0.1 (same note).

    Formula: ``w_lh = mean_i max_j S_lhij``; ``T_l = mean_h w_lh S_lh``; ``F_l = (I + T_l)(I + F_{l-1})``, column j
    times (j + 1) / N. S [H, N, N] of a layer never exists: `block` rows at a time are made twice, from q and k.

    Args:
        inputs: what the processor returned, answer tokens appended if the map is about them.
        tokens: columns of the tokens the maps are about (negative: from the end); None = the last.
        start, columns: see `Flow`. grid: see `image_tokens`.

    Raises:
        PatchError: no image token, a token that is not there or is padding. ConfigError: unknown `start` or `columns`.
    """
    places = image_tokens(model.config, inputs, grid)
    Flow(start, columns)
    length = inputs["input_ids"].shape[1]
    asked = [-1] if tokens is None else list(tokens)
    wrong = [t for t in asked if not -length <= t < length]
    if wrong or not asked:
        raise PatchError(
            f"attention_flow: tokens={asked}, the prompt has {length}, numbered 0 to {length - 1}"
        )
    at = tuple(t % length for t in asked)
    spans = real_spans(inputs)
    for place in places:
        first, end = spans[place.row]
        if not all(first <= t < end for t in at):
            raise PatchError(
                f"attention_flow: row {place.row} has tokens {first} to {end - 1}; {list(at)} is padding there"
            )
    flows = [Flow(start, columns) for _ in spans]

    def look(program: Program, call: Any) -> None:
        if program.q_len != length:
            raise PatchError(
                f"attention_flow: {call.path} attends with {program.q_len} rows, the prompt has {length}"
            )
        for row, (first, end) in enumerate(spans):
            once, again = (_blocks(program, row, first, end, block) for _ in range(2))
            flows[row].add(combined_heads(once, again, end - first))

    with unnoticed(model), watched(model, look), torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    maps = []
    for place in places:
        first, _ = spans[place.row]
        flow = flows[place.row].result().float().cpu()
        reached = flow[[t - first for t in at]]
        values = torch.nn.functional.pad(reached, (first, length - first - reached.shape[1]))
        maps.append(HeatMap(place.row, at, place.on_grid(values).numpy(), place))
    return maps


def real_spans(inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """[first, end) of the real tokens of each row."""
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    if mask is None:
        return [(0, ids.shape[1])] * ids.shape[0]
    found = [row.nonzero()[:, 0] for row in mask]
    return [(int(r[0]), int(r[-1]) + 1) for r in found]


def _blocks(program: Program, row: int, first: int, end: int, block: int) -> Iterable[tuple[Tensor, Tensor]]:
    """(rows from `first` on, probabilities [H, n, end - first]) of one row of the batch."""
    for part in torch.arange(first, end, device=program.query.device).split(block):
        yield part - first, probabilities(program, part)[row, :, :, first:end]
