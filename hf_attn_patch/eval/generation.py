"""Greedy answers through ``model.generate`` and its KV cache, batched with padding on the left; prompts of a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .task import Scores, Task, Tick, require_language_model


@dataclass(frozen=True)
class Prompt:
    """One question. ids: token ids. expected: strings of the right answer. new: tokens to generate at most.

    group: label in tables. facts: what the record says about it. stop: the answer ends before this string, if any
    (one that stands only behind white space does not count).
    """

    ids: tuple[int, ...]
    expected: tuple[str, ...]
    new: int
    group: str
    facts: dict[str, Any] = field(default_factory=dict)
    stop: str | None = None


class PromptTask(Task):
    """Base of tasks that ask and read the answer. Subclasses give `items` of `Prompt` and `grade`; fields of theirs
    called ``batch_size`` (prompts per generate call) are used."""

    def grade(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """Metric -> number, for one answer."""
        raise NotImplementedError

    def batches(self, items: list[Any]) -> list[list[int]]:
        size = getattr(self, "batch_size", 1)
        return [list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size)]

    def score(self, model: Any, processor: Any, items: list[Any], reference: Any, tick: Tick) -> Scores:
        scores: dict[str, list[float]] = {m.name: [] for m in self.metrics}
        self.answers: list[str] = []
        for batch in self.batches(items):
            asked = [items[i] for i in batch]
            for prompt, answer in zip(asked, generate(model, processor, asked)):
                self.answers.append(answer)
                for name, value in self.grade(answer, prompt).items():
                    scores[name].append(value)
            tick(len(batch))
        return scores

    def groups(self, items: list[Any]) -> list[str]:
        return [item.group for item in items]

    def facts(self, items: list[Any]) -> list[dict[str, Any]]:
        return [{**item.facts, "tokens": len(item.ids), "expected": list(item.expected)} for item in items]


def generate(model: Any, processor: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Greedy continuations of the prompts, cut at each one's end-of-text token, `new` tokens and `stop`.

    Shorter prompts are padded on the left; with a correct mask the answers are those of one prompt at a time.
    """
    import torch

    from ..decoding import processors

    pad = pad_token(processor)
    length, new = max(len(p.ids) for p in prompts), max(p.new for p in prompts)
    rows = [[pad] * (length - len(p.ids)) + list(p.ids) for p in prompts]
    mask = [[0] * (length - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    ids = torch.tensor(rows, device=model.device)
    second = processors(
        model, {"input_ids": ids}, processor=processor
    )  # a decoding that is on refuses text here
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            stopping_criteria=_stopping(processor, prompts, length),
            logits_processor=second,
        )
    ends = _end_tokens(model, processor)
    answers = []
    for prompt, row in zip(prompts, out[:, length:].tolist()):
        said = row[: prompt.new]
        said = said[: next((i for i, token in enumerate(said) if token in ends), len(said))]
        answers.append(cut(processor.decode(said, skip_special_tokens=True), prompt.stop))
    return answers


def cut(text: str, stop: str | None) -> str:
    """`text` before the first `stop` that has something but white space in front of it."""
    if stop is None:
        return text
    body = text.lstrip()
    at = body.find(stop)
    return text if at < 0 else text[: len(text) - len(body) + at]


def _stopping(processor: Any, prompts: Sequence[Prompt], length: int) -> Any:
    """Ends a row when its `stop` has been said; None if no prompt has one."""
    if not any(p.stop for p in prompts):
        return None
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Said(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            over = []
            for prompt, row in zip(prompts, input_ids[:, length:].tolist()):
                text = processor.decode(row, skip_special_tokens=True)
                over.append(len(row) >= prompt.new or cut(text, prompt.stop) != text)
            return torch.tensor(over, device=input_ids.device)

    return StoppingCriteriaList([Said()])


def _end_tokens(model: Any, processor: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(config, "eos_token_id", None), getattr(processor, "eos_token_id", None)):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def pad_token(processor: Any) -> int:
    """The token to pad with: the processor's pad token, its end-of-text token, or 0 (masked, so any will do)."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(processor, name, None)
        if value is not None:
            return int(value)
    return 0


def encode(processor: Any, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt: as it stands, or as the user's turn of the chat template.

    Raises:
        ValueError: chat without a template.
    """
    if not chat:
        return list(processor(text)["input_ids"])
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"chat=true: {type(processor).__name__} has no chat template. Leave chat out: the prompt is then continued."
        )
    turns = [{"role": "user", "content": text}]
    made = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(processor(made, add_special_tokens=False)["input_ids"])


def fit(build: Callable[[int], str], count: Callable[[str], int], length: int, least: int, most: int) -> int:
    """The largest n in least … most such that ``count(build(n)) <= length``, where the count grows with n.

    Raises:
        ValueError: even `least` is too long, with the number of tokens it takes.
    """
    smallest = count(build(least))
    if smallest > length:
        raise ValueError(f"takes at least {smallest} tokens")
    low, high, step = least, min(least + 16, most), 32
    while high > low and count(build(high)) <= length:  # low fits
        low, high, step = high, min(high + step, most), step * 2
    while high - low > 1:
        middle = (low + high) // 2
        if count(build(middle)) <= length:
            low = middle
        else:
            high = middle
    return low


def check_lengths(task: str, model: Any, processor: Any, lengths: Sequence[int], new: int) -> None:
    """Raises ValueError unless the model predicts tokens and has positions for the longest prompt and its answer."""
    require_language_model(task, model, processor)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(lengths) + new > limit:
        raise ValueError(
            f"{task}: {max(lengths)} + {new} new tokens, the model has {limit} positions. "
            f"Ask for lengths up to {limit - new}."
        )
