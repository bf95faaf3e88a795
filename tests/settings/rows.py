"""Rows that are no plain sequences: padded, padded inside, packed, given as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..conformance.families import PER_TOKEN, columns_of, row_of
from .base import Bench, NotApplicable, Pairs, setting


@setting("left-padded batch", "rows of different lengths; each equals itself alone")
def padded(bench: Bench) -> Pairs:
    if bench.family not in PER_TOKEN:
        raise NotApplicable("images are not padded")
    model, pads = bench.model, [0, 5, 2]
    inputs = bench.inputs(batch=3, left_pad=pads)
    with bench.patched(model):
        together = bench.forward(model, inputs)
        for row, pad in enumerate(pads):
            alone = row_of(inputs, row, 3, pad)
            yield f"row {row}", together[row : row + 1, pad:], bench.forward(model, alone)
            want = bench.generate(model, alone, 3).logits if bench.decoder else None
            if want is not None:
                yield f"answer {row}", bench.generate(model, inputs, 3).logits[row : row + 1], want


def alone(inputs: dict[str, Any], row: int, batch: int) -> dict[str, Any]:
    """A row without its padding, wherever that is."""
    real = inputs["attention_mask"][row].bool()
    one = row_of(inputs, row, batch)
    length = len(real)
    one = {
        k: v[:, real] if v.ndim == 2 and v.shape[1] == length and k != "pixel_values" else v
        for k, v in one.items()
    }
    one["position_ids"] = torch.arange(int(real.sum()))[None]
    return one


@setting(
    "batched chat, padding between the turns",
    "two turns of different lengths per row; each row equals itself alone",
    decoder=True,
)
def chat(bench: Bench) -> Pairs:
    model = bench.model
    inputs = bench.inputs(length=22, left_pad=[3, 0])
    last, first = inputs["input_ids"].shape[1], bench.prompt_end(inputs) + 1
    mask = inputs["attention_mask"]
    mask[1, first + 2 : first + 4] = 0  # row 1 asks less in its second turn
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    turn = first + 8
    cuts = [first, first + 1, first + 2, turn, *range(turn + 1, last + 1)]

    def talk(x: dict[str, Any], ends: list[int]) -> Tensor:
        cache, found, begin = DynamicCache(config=model.config), [], 0
        for end in ends:
            part = columns_of(x, begin, end)
            found.append(bench.forward(model, part, past_key_values=cache, use_cache=True))
            begin = end
        return torch.cat(found, 1)

    with bench.patched(model):
        together = talk(inputs, cuts)
        for row in range(2):
            want = talk(alone(inputs, row, 2), [int(mask[row, :c].sum()) for c in cuts])
            yield f"row {row}", together[row : row + 1, mask[row].bool()], want


def pack(bench: Bench) -> tuple[list[dict[str, Any]], dict[str, Any], list[int]]:
    """Two inputs of one row each, both in one row, and their lengths."""
    single = [bench.inputs(batch=1, length=n, seed=n) for n in (9, 14)]
    for one in single:
        one["position_ids"] = torch.arange(one["input_ids"].shape[1])[None]
        one.pop("attention_mask")
    row = {
        k: torch.cat([one[k] for one in single], 0 if "pixel" in k or "grid" in k else 1) for k in single[0]
    }
    return single, row, [one["input_ids"].shape[1] for one in single]


def packed(bench: Bench, **told: Any) -> Pairs:
    if bench.family not in PER_TOKEN:
        raise NotApplicable("images are not packed")
    model = bench.model
    single, row, _ = pack(bench)
    with bench.patched(model):
        want = torch.cat([bench.forward(model, one, use_cache=False) for one in single], 1)
        yield "packed row", bench.forward(model, {**row, **told}, use_cache=False), want


@setting(
    "packed rows: position ids",
    "two texts in a row, positions begin again, no mask; each equals itself alone",
)
def packed_positions(bench: Bench) -> Pairs:
    yield from packed(bench)


@setting("packed rows: position ids and a block mask", "the same with a 4-d mask that keeps them apart")
def packed_mask(bench: Bench) -> Pairs:
    _, _, lengths = pack(bench) if bench.family in PER_TOKEN else (None, None, [1])
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (number[:, None] == number[None]).tril()
    mask = torch.zeros(1, 1, len(number), len(number), dtype=torch.float64)
    yield from packed(bench, attention_mask=mask.masked_fill(~allowed, torch.finfo(torch.float64).min))


@setting(
    "packed rows: a mask of ones",
    "position ids begin again under attention_mask=1: as the model reads it, or refused",
)
def packed_ones(bench: Bench) -> Pairs:
    _, row, _ = pack(bench) if bench.family in PER_TOKEN else (None, {"input_ids": torch.ones(1, 1)}, None)
    yield from packed(bench, attention_mask=torch.ones_like(row["input_ids"]))


@setting("packed rows: cu_seq_lens", "the same with lengths for a varlen kernel (padding-free training)")
def packed_lengths(bench: Bench) -> Pairs:
    _, _, lengths = pack(bench) if bench.family in PER_TOKEN else (None, None, [1])
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    told = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths))
    yield from packed(bench, **told)


@setting(
    "inputs_embeds", "embeddings instead of ids, image columns said by hap.prompt; equals ids", decoder=True
)
def embeds(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs()
    ids = inputs["input_ids"]
    if "pixel_values" in inputs:
        raise NotApplicable("with images and embeddings transformers compares embeddings of placeholders")
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(ids)
    with bench.patched(model):
        yield "logits", bench.forward(model, given), bench.forward(model, inputs)
        want = bench.generate(model, inputs, 3).logits
        yield "answer", bench.generate(model, given, 3).logits, want
