"""Pictures for the page of a vision-language task: where the answer's attention goes, on the image and by head."""

from __future__ import annotations

import base64
from typing import Any

from .vlm_data import ImageRef, inputs_of


def of_answer(
    model: Any, processor: Any, image: ImageRef, text: str, answer: str, template: str | None
) -> dict[str, str]:
    """Title -> picture (data URI) of one answer: attention flow from all its tokens over the image, and the mass
    that each head puts on image tokens in the rows that say it. Empty where matplotlib is missing or the image
    tokens form no grid.

    The answer is read in one forward, with whatever patches the model carries.
    """
    import torch

    from .. import attention_flow, capture
    from ..api import prompt as prompt_length
    from ..calibration.pictures import draw_plan
    from ..errors import PatchError

    before = inputs_of(model, processor, [(image, text)], template)
    tokens = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
    if not tokens.numel():
        return {}
    length = before["input_ids"].shape[1]
    inputs = dict(before)
    for name, more in (("input_ids", tokens), ("attention_mask", torch.ones_like(tokens))):
        inputs[name] = torch.cat([before[name], more.to(before[name])], 1)
    inputs = {k: v for k, v in inputs.items() if k not in ("token_type_ids", "mm_token_type_ids")}
    found: dict[str, str | None] = {}
    try:
        rows = range(length - 1, length - 1 + tokens.shape[1])  # the rows that say the answer's tokens
        maps = attention_flow(model, inputs, tokens=list(rows))
        found["attention flow"] = maps[0].picture(image.load(), title="attention flow, mean over the answer")
        with torch.no_grad(), capture(model) as table, prompt_length(model, length=length):
            model(**inputs, use_cache=False)
        found["image mass by head"] = draw_plan(
            table.image, "mass on image tokens", 0.0, float(table.image.max())
        )
    except PatchError:
        pass  # image tokens without a grid (tiles, merged tokens): there is no map to draw
    return {title: data_uri(svg) for title, svg in found.items() if svg is not None}


def data_uri(svg: str) -> str:
    """An SVG as the source of an <img>: several of them on a page then share no ids."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
