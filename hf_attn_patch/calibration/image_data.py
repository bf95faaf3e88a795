"""Questions about images, with answers, as tensors of one model: what calibration of vision-language models runs on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .calibrator import CalibrationError

FORMAT = '{"image": path, "question": ..., "answer": ...}'
MISSING_SHOWN = 3


@dataclass(frozen=True)
class ImageSample:
    """One question about one or more images, answered.

    inputs: arguments of the model's forward for one row without padding, the answer included. start: column of the
    answer's first token. image: bool [L], True on image tokens.
    """

    inputs: dict[str, Tensor]
    start: int
    image: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __repr__(self) -> str:
        return f"ImageSample({len(self)} tokens, {int(self.image.sum())} of images, answer from {self.start})"


def records(data: Any) -> list[dict[str, Any]]:
    """Records ``{"image": [...], "prompt": str, "answer": str or None}`` of a JSONL file or a list.

    A record has ``image`` (a path or a PIL image, or a list of them) and ``question`` or ``prompt``; paths in a file
    count from its folder.

    Raises:
        CalibrationError: no data, a line that is no JSON, a record without image or question, or images that are
            not there (their number and the first are named).
    """
    folder, rows = Path(), data
    if isinstance(data, (str, Path)):
        file = Path(data)
        if not file.is_file():
            raise CalibrationError(f"data: {str(data)!r} is no file (JSONL of {FORMAT})")
        folder, rows = file.parent, []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise CalibrationError(f"{file}, line {number}: not JSON ({error})") from error
    if rows is None or not len(rows):
        raise CalibrationError(
            f"this needs questions about images: data= (--data), JSONL or a list of {FORMAT}"
        )
    found, missing = [], []
    for number, row in enumerate(rows, 1):
        asked = row.get("question", row.get("prompt")) if isinstance(row, dict) else None
        images = row.get("image") if isinstance(row, dict) else None
        if not isinstance(asked, str) or images is None:
            raise CalibrationError(
                f"record {number} of the data has no image or no question: {str(row)[:80]}. Give {FORMAT}"
            )
        listed = list(images) if isinstance(images, (list, tuple)) else [images]
        listed = [folder / i if isinstance(i, (str, Path)) else i for i in listed]
        missing += [str(i) for i in listed if isinstance(i, Path) and not i.is_file()]
        found.append({"image": listed, "prompt": asked, "answer": row.get("answer")})
    if missing:
        raise CalibrationError(
            f"{len(missing)} images of the data are not there: {', '.join(missing[:MISSING_SHOWN])}"
            + (", …" if len(missing) > MISSING_SHOWN else "")
        )
    return found


def has_images(data: Any) -> bool:
    """True if the first record of `data` (JSONL or a list) has an image."""
    if isinstance(data, (str, Path)) and Path(data).suffix in (".jsonl", ".json") and Path(data).is_file():
        with Path(data).open(encoding="utf-8") as file:
            return '"image"' in next((line for line in file if line.strip()), "")
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], dict) and "image" in data[0]


def samples(
    who: str,
    data: Any,
    model: Any,
    processor: Any,
    count: int,
    *,
    answers: Literal["given", "model"] = "given",
    seed: int = 0,
    new: int = 32,
) -> list[ImageSample]:
    """At most `count` samples, in an order that `seed` says.

    Args:
        who: the calibrator, for messages. data: see `records`. processor: of text and images (`AutoProcessor`).
        answers: ``given`` takes those of the records, ``model`` lets the model answer greedily with `new` tokens.

    Raises:
        CalibrationError: no such processor, an answer that is not there, or a prompt without image tokens.
    """
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise CalibrationError(
            f"{who}: needs the processor of text and images (tokenizer=AutoProcessor.from_pretrained(...)), got "
            f"{type(processor).__name__}"
        )
    rows = records(data)
    random.Random(seed).shuffle(rows)
    return [encode(who, row, model, processor, answers, new) for row in rows[:count]]


def encode(
    who: str, row: dict[str, Any], model: Any, processor: Any, answers: str = "given", new: int = 32
) -> ImageSample:
    """One record of `records` for one model; arguments and errors as `samples`."""
    from PIL import Image

    from ..forward.needs.images import image_token_ids

    images = [Image.open(i).convert("RGB") if isinstance(i, Path) else i for i in row["image"]]
    made = processor(
        images=images, text=[prompt_of(row["prompt"], len(images), processor)], return_tensors="pt"
    )
    inputs = {
        k: v.to(model.device, model.dtype if v.is_floating_point() else None)
        for k, v in made.items()
        if isinstance(v, Tensor)
    }
    ids = inputs["input_ids"]
    tokens = torch.tensor(image_token_ids(model.config), device=ids.device)
    if not bool(torch.isin(ids, tokens).any()):
        raise CalibrationError(
            f"{who}: the processor wrote no image token ({tokens.tolist()}) for the prompt {row['prompt'][:60]!r}; is "
            "it the processor of this model?"
        )
    said = _answer(who, row, model, processor, inputs, answers, new)
    start = ids.shape[1]
    for name, value in inputs.items():
        if value.shape == ids.shape and name != "input_ids" and not value.is_floating_point():
            fill = 1 if name == "attention_mask" else 0  # token types: the answer is text
            inputs[name] = torch.nn.functional.pad(value, (0, len(said)), value=fill)
    inputs["input_ids"] = torch.cat([ids, said[None]], 1)
    return ImageSample(inputs, start, torch.isin(inputs["input_ids"][0], tokens))


def prompt_of(text: str, images: int, processor: Any) -> str:
    """`text` with the placeholders of its images: as it is if it has them, else in the processor's chat template, else
    behind them."""
    token = getattr(processor, "image_token", None)
    if token and token in text:
        return text
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turns, add_generation_prompt=True)
    if not token:
        raise CalibrationError(
            f"{type(processor).__name__} has neither a chat template nor an image token; write the placeholder into "
            "the questions"
        )
    return f"{token * images}\n{text}"


@torch.inference_mode()
def _answer(
    who: str,
    row: dict[str, Any],
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    answers: str,
    new: int,
) -> Tensor:
    """Tokens of the answer, int64 [n >= 1]."""
    length = inputs["input_ids"].shape[1]
    if answers == "model":
        pad = processor.tokenizer.pad_token_id
        pad = processor.tokenizer.eos_token_id if pad is None else pad
        return model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=pad)[
            0, length:
        ].clone()
    if not isinstance(row["answer"], str) or not row["answer"]:
        raise CalibrationError(
            f"{who}: the record {row['prompt'][:60]!r} has no answer; add answers to the data, or let the model answer "
            "(answers=model)"
        )
    found = processor.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    return torch.tensor(found, device=model.device)
