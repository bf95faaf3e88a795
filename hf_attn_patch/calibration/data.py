"""What calibration runs on: prompts with answers, of chosen lengths.

Without data of their own, users get needles in prose: a number is said somewhere in a long text and asked for at the
end, so that the answer depends on one distant place. Every sample ends in plain prose or in an answer of the model
itself, and the loss is taken on those tokens only: long-range supervision on the model's own words is what makes
gradient influence point at the heads that reach (MoA, arXiv 2406.14909, ablation of its calibration data, READ).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrator import CalibrationError


@dataclass(frozen=True)
class Sample:
    """One text. ids: int64 [n]. start: first token of the answer (its prediction is the first that counts).

    kind: ``needle``, ``prose`` or ``data``. columns: places in the prompt that hold what is asked for, if known.
    """

    ids: Tensor
    start: int
    kind: str = "data"
    columns: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Sample({self.kind}, {len(self)} tokens, answer from {self.start})"


def check_lengths(who: str, model: Any, lengths: Sequence[int]) -> list[str]:
    """Notes on `lengths` beyond what the model was made for; positions it does not have are an error.

    Raises:
        CalibrationError: learned positions end before the longest length.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or max(lengths) <= limit:
        return []
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        return [
            f"length {max(lengths)} is beyond the {limit} positions this model was made for (RoPE goes on)"
        ]
    raise CalibrationError(f"{who}: length {max(lengths)} asked for, the model has {limit} positions")


def needle(tokenizer: Any, length: int, depth: float, seed: int, answer: int = 12) -> Sample:
    """A passkey prompt just below `length` tokens, answer included: the number, and where the text said it."""
    from ..eval.passkey import Passkey

    task = Passkey((max(length - answer, 64),), (depth,))
    item = task.haystacks(tokenizer, seed)[0]
    said = tokenizer(f" {item.key}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    prompt = item.ids[0]
    digits = said[-len(item.key) :].tolist() if len(said) >= len(item.key) else said.tolist()
    tokens = prompt.tolist()
    columns = [
        c
        for i in range(len(tokens) - len(digits) + 1)
        if tokens[i : i + len(digits)] == digits
        for c in range(i, i + len(digits))
    ]
    return Sample(torch.cat([prompt, said]), len(prompt), "needle", tuple(columns))


def prose(tokenizer: Any, length: int, seed: int, answer: float = 0.5) -> Sample:
    """A stretch of prose; the last `answer` share of it counts."""
    from ..testbed import prose as source

    wanted = length * 8
    available = len(source._text())
    at = random.Random(seed).randrange(max(available - wanted, 1))
    text = source.prose(min(wanted, available - at), at)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0, :length]
    if len(ids) < length:
        raise CalibrationError(
            f"the prose of this machine does not fill {length} tokens; ask for less or give data"
        )
    return Sample(ids, length - max(int(length * answer), 1), "prose")


def synthetic(tokenizer: Any, length: int, count: int, seed: int = 0, needles: float = 0.5) -> list[Sample]:
    """`count` samples of one length, the share `needles` of them needles, spread over depths."""
    hidden = max(round(count * needles), 1) if needles else 0
    depths = [0.08 + 0.6 * i / max(hidden, 1) for i in range(hidden)]
    found = [needle(tokenizer, length, d, seed * 1000 + i) for i, d in enumerate(depths)]
    return found + [prose(tokenizer, length, seed * 1000 + 500 + i) for i in range(count - hidden)]


def records(data: Any) -> list[dict[str, Any]]:
    """Records of a JSONL file, a text file (one record without answer per file) or a list.

    Raises:
        CalibrationError: no such file, a line that is no JSON object, or a record without ``prompt`` or ``text``.
    """
    if isinstance(data, (str, Path)):
        file = Path(data)
        if not file.is_file():
            raise CalibrationError(f"data: {str(data)!r} is no file (JSONL with prompt and answer, or text)")
        text = file.read_text(encoding="utf-8")
        if file.suffix not in (".jsonl", ".json"):
            return [{"text": text}]
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{file}, line {number}: not JSON ({error})") from error
    else:
        rows = list(data)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt", row.get("text")), str):
            raise CalibrationError(
                f"record {number} of the data has no prompt and no text: {str(row)[:80]}. Give "
                '{"prompt": ..., "answer": ...} or {"text": ...}'
            )
    if not rows:
        raise CalibrationError("the data hold no record")
    return rows


def samples(
    data: Any,
    model: Any,
    tokenizer: Any,
    length: int,
    count: int,
    *,
    answers: str,
    seed: int = 0,
    new: int = 32,
) -> list[Sample]:
    """`count` samples of at most `length` tokens.

    Args:
        data: None = `synthetic`; else `records`. answers: ``given`` takes the records' answers, ``model`` lets the
            (dense) model answer every prompt greedily with `new` tokens. Records with text only count as prose.

    Raises:
        CalibrationError: answers are asked for that the data do not have, or no record is long enough.
    """
    if data is None:
        return synthetic(tokenizer, length, count, seed)
    rows = records(data)
    random.Random(seed).shuffle(rows)
    encode = lambda text: tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    found: list[Sample] = []
    for row in rows:
        if len(found) == count:
            break
        if "prompt" not in row:
            ids = encode(row["text"])
            for at in range(0, len(ids) - length + 1, length):
                found.append(Sample(ids[at : at + length], length // 2, "prose"))
            continue
        if answers == "given" and not isinstance(row.get("answer"), str):
            raise CalibrationError(
                f"a record has no answer ({str(row)[:60]}…); add answers to the data, or let the model answer "
                "(answers=model)"
            )
        prompt = encode(row["prompt"])
        said = encode(row["answer"]) if answers == "given" else own_answer(model, tokenizer, prompt, new)
        room = length - len(said)
        if room < 2 or len(said) == 0:
            continue
        if len(prompt) > room:  # the middle goes, as LongBench does: instructions stand at both ends
            prompt = torch.cat([prompt[: room // 2], prompt[len(prompt) - (room - room // 2) :]])
        if len(prompt) + len(said) > length // 2:
            found.append(Sample(torch.cat([prompt, said]), len(prompt), "data"))
    if not found:
        raise CalibrationError(
            f"no record of the data fills half of {length} tokens; give longer data or smaller lengths"
        )
    return found[:count]


@torch.inference_mode()
def own_answer(model: Any, tokenizer: Any, prompt: Tensor, new: int) -> Tensor:
    """What the model itself says after `prompt` (int64 [n]), greedily: int64 [<= new]."""
    ids = prompt[None].to(model.device)
    pad = getattr(tokenizer, "pad_token_id", None) or getattr(tokenizer, "eos_token_id", None)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=pad,
    )
    return out[0, len(prompt) :].cpu()
