"""Questions about images: prompts through a processor, batches padded on the left, greedy answers.

Works with any model of `AutoModelForImageTextToText` and its `AutoProcessor` (tested: see tests/test_eval_vlm.py). The
prompt is the user's turn of the processor's chat template; a processor without one gets ``<image>\\ntext``, or what
``template=`` says.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .task import Scores, Task, Tick

NEUTRAL_ITEMS = 64
THUMBNAIL = 160  # pixels, longer side


@dataclass(frozen=True)
class ImageRef:
    """One image, read when it is needed. where: path, or the name of a row. rows, row: a `datasets.Dataset` and the row
    whose column `image` it is; None = `where` is a file."""

    where: str
    rows: Any = None
    row: int = 0

    def load(self) -> Any:
        """PIL image in RGB."""
        if self.rows is not None:
            return self.rows[self.row]["image"].convert("RGB")
        from PIL import Image

        with Image.open(self.where) as image:
            return image.convert("RGB")

    def thumbnail(self, side: int = THUMBNAIL) -> str:
        """A small JPEG as a data URI."""
        image = self.load()
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Item:
    """What is asked about one image. texts: the questions, one prompt each. expected: an answer to each, as the data
    say it. group: label in tables. facts: for the record. extra: what only the task's `grade` needs."""

    image: ImageRef
    texts: tuple[str, ...]
    expected: tuple[str, ...]
    group: str
    facts: dict[str, Any] = field(default_factory=dict)
    extra: Any = None


class VlmTask(Task):
    """Base of tasks that show an image, ask, and grade the answer.

    Subclasses are dataclasses that give `read` and `grade`, and have the fields ``batch_size``, ``max_new_tokens``,
    ``template`` and ``neutral`` (items of the neutral check; 0 = none).
    """

    takes: ClassVar[str] = "processor"
    batch_size: int
    max_new_tokens: int
    template: str | None
    neutral: int

    def read(self, seed: int) -> list[Item]:
        """The items, from the data.

        Raises:
            ValueError: data are missing or are not what they should be.
        """
        raise NotImplementedError

    def grade(self, answers: list[str], item: Item) -> dict[str, float]:
        """Column -> number, from the answers to the texts of one item."""
        raise NotImplementedError

    def check_fields(self, **at_least: int) -> None:
        """Raises ValueError for numbers that are too small and a template without its two places."""
        for name, least in {"batch_size": 1, "max_new_tokens": 1, "neutral": 0, **at_least}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{self.name}: {name}={value} must be at least {least}")
        if self.template is not None and any(self.template.count(p) != 1 for p in ("{image}", "{text}")):
            raise ValueError(
                f"{self.name}: template={self.template!r} must hold {{image}} and {{text}} once each, e.g. "
                "'USER: {image}\\n{text} ASSISTANT:'"
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Item]:
        require_image_text_model(self.name, model, processor)
        return self.read(seed)

    def batches(self, items: list[Item]) -> list[list[int]]:
        size = self.batch_size
        return [list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size)]

    def neutral_batches(self, batches: list[list[int]]) -> list[list[int]]:
        """Whole batches of `neutral` items or a few more, spread evenly: neighbours in a batch decide the last bits."""
        if not self.neutral or not batches:
            return []
        wanted = min(len(batches), -(-self.neutral // max(map(len, batches))))
        return [batches[i * len(batches) // wanted] for i in range(wanted)]

    def score(self, model: Any, processor: Any, items: list[Item], reference: Any, tick: Tick) -> Scores:
        scores: dict[str, list[float]] = {name: [] for name in self.columns()}
        self.answers: list[str] = []
        for batch in self.batches(items):
            asked = [(items[i].image, text) for i in batch for text in items[i].texts]
            said = iter(generate(model, processor, asked, self.max_new_tokens, self.template))
            for i in batch:
                mine = [next(said) for _ in items[i].texts]
                self.answers.append("\n".join(mine))
                for name, value in self.grade(mine, items[i]).items():
                    scores[name].append(float(value))
            tick(len(batch))
        return scores

    def groups(self, items: list[Item]) -> list[str]:
        return [item.group for item in items]

    def facts(self, items: list[Item]) -> list[dict[str, Any]]:
        return [
            {
                **item.facts,
                "image": item.image.where,
                "asked": list(item.texts),
                "expected": list(item.expected),
            }
            for item in items
        ]

    def attachments(self, items: list[Item], most: int) -> list[dict[str, str]]:
        return [{"image": item.image.thumbnail()} for item in items[:most]]

    def pictures(
        self, model: Any, processor: Any, items: list[Item], answers: list[str]
    ) -> list[dict[str, str]]:
        from .vlm_pictures import of_answer

        count = getattr(self, "heat_maps", 0)
        return [
            of_answer(model, processor, item.image, item.texts[0], answer, self.template)
            for item, answer in zip(items[:count], answers)
        ]


def generate(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[ImageRef, str]],
    new: int,
    template: str | None = None,
) -> list[str]:
    """Greedy answers of at most `new` tokens to (image, text) pairs, in one batch padded on the left.

    A method of `hf_attn_patch.decoding` that is on for the model decodes them.

    Raises:
        ValueError: the processor cannot make a batch of these prompts (its own words are in the message), or a prompt
        came out without an image.
    """
    import torch

    from ..decoding import processors

    images = [image.load() for image, _ in asked]
    inputs = inputs_of(model, processor, asked, template, images)
    second = processors(model, inputs, processor=processor, images=images, texts=[text for _, text in asked])
    pad = processor.tokenizer.pad_token_id
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            logits_processor=second,
            pad_token_id=processor.tokenizer.eos_token_id if pad is None else pad,
        )
    start = 0 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
    return [text.strip() for text in processor.batch_decode(out[:, start:], skip_special_tokens=True)]


def inputs_of(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[ImageRef, str]],
    template: str | None = None,
    images: list[Any] | None = None,
) -> dict[str, Any]:
    """Inputs of one batch of (image, text), padded on the left, on the device of `model`. images: already loaded.

    Raises:
        ValueError: as `generate`.
    """
    images = [image.load() for image, _ in asked] if images is None else images
    texts = [prompt(processor, text, template) for _, text in asked]
    bos = getattr(processor.tokenizer, "bos_token", None)
    # a chat template that writes <s> itself must not get a second one
    options = {"add_special_tokens": False} if bos and all(t.startswith(bos) for t in texts) else {}
    with left_padding(processor):
        try:
            # one list per prompt: a flat list is the images of one prompt to some processors
            nested = [[image] for image in images]
            made = processor(images=nested, text=texts, return_tensors="pt", padding=True, **options)
        except (ValueError, TypeError, IndexError) as error:
            said = str(error).rstrip(".")
            raise ValueError(
                f"{type(processor).__name__} makes no batch of {len(asked)} prompts such as {texts[0]!r}: {said}. "
                "Say where the image goes with template='… {image} … {text} …'."
            ) from error
    inputs = {k: _moved(v, model) for k, v in dict(made).items()}
    _require_image_tokens(model, inputs["input_ids"], texts)
    return inputs


def prompt(processor: Any, text: str, template: str | None = None) -> str:
    """The prompt of one question with its image placeholder."""
    if template is None and getattr(processor, "chat_template", None):
        return _chat(processor, text)
    place = getattr(processor, "image_token", None) or "<image>"
    filled = (template or "{image}\n{text}").replace("{image}", str(place), 1)
    return filled.replace("{text}", text, 1)


def _chat(processor: Any, text: str) -> str:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


@contextmanager
def left_padding(processor: Any) -> Iterator[None]:
    """The processor's tokenizer pads on the left inside, with its end-of-text token if it has nothing to pad with."""
    tokenizer = processor.tokenizer
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = pad


def require_image_text_model(task: str, model: Any, processor: Any) -> None:
    """Raises ValueError unless `model` says text about images and `processor` makes its inputs."""
    from ..forward.needs.images import image_token_ids

    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(
            f"{task}: {type(model).__name__} generates no text. Give a model of AutoModelForImageTextToText."
        )
    if not image_token_ids(model.config) and getattr(model.config, "vision_config", None) is None:
        raise ValueError(
            f"{task}: {type(model).__name__} takes no images: its config has neither image tokens nor a vision "
            "part. Give a model of AutoModelForImageTextToText."
        )
    lacks = [n for n in ("tokenizer", "batch_decode") if not hasattr(processor, n)]
    if not callable(processor) or lacks:
        found = "nothing" if processor is None else type(processor).__name__
        raise ValueError(
            f"{task}: needs the processor of the model, for images and text (AutoProcessor.from_pretrained), "
            f"found {found}."
        )


def _require_image_tokens(model: Any, ids: Any, texts: Sequence[str]) -> None:
    """A prompt whose image got lost would be answered from the text alone, and some models say nothing about it."""
    import torch

    from ..forward.needs.images import image_token_ids

    placeholders = image_token_ids(model.config)
    if not placeholders:
        return
    found = torch.isin(ids, torch.tensor(placeholders, device=ids.device)).any(-1)
    lost = [text for text, there in zip(texts, found.tolist()) if not there]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(texts)} prompts hold no image token, such as {lost[0]!r}. Say where the image goes "
            "with template='… {image} … {text} …', in the words of this model."
        )


def _moved(value: Any, model: Any) -> Any:
    """Tensors on the model's device, floating ones in its dtype."""
    if not hasattr(value, "to"):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
