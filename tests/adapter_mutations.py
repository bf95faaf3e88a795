"""Seeded damage to the files of an adapter: structure, types, values and bytes."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from safetensors.torch import load, save

CONFIG, TENSORS = "attn_patch_config.json", "attn_patch.safetensors"
Files = dict[str, bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 10**5, 10**7, 2**31 - 1, 2**31, -(2**31), 2**53, 10**30, 0.0, 0.5,
    -0.5, 1e-30, 1e9, -1e9, 1e30, 1e308, float("nan"), float("inf"), -float("inf"), "", "a", "all", "0", "-1", "0-3",
    "999999999", ":", "::0", "/etc/passwd", "../../x", "/dev/zero", "NaN", "é\u202e", [], [0], [[]], [[0.5]], [None],
    ["a"], {}, {"a": 1}, {"0": [0]}, {"heads": []}, {"0": {}}, [1, 2], [2, 2], [1000, 1000], [0, 0], [-1, -1],
)  # fmt: skip

PLAIN: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    5,
    17,
    64,
    4096,
    10**6,
    2**31 - 1,
    -1,
    0.0,
    1.0,
    0.25,
    3.5,
    -2.5,
    1e4,
    2e9,
)


def _paths(data: Any, at: tuple = ()) -> list[tuple]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for k, v in items for p in ((*at, k), *_paths(v, (*at, k)))]


def _holder(data: Any, path: tuple) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _structure(draw: random.Random, data: dict[str, Any]) -> None:
    """One change of the JSON, most often among the options."""
    paths = _paths(data)
    inside = [p for p in paths if p[0] == "config" and len(p) > 1]
    path = draw.choice(inside if inside and draw.random() < 0.85 else paths)
    holder, key = _holder(data, path), path[-1]
    kind, value = draw.randrange(20), holder[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        kind = draw.choice((4, 4, 5, 5, 6, 7, kind))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(draw.choice(ODD))] = holder.pop(key)
    elif kind == 2 and isinstance(value, list):
        holder[key] = value * draw.choice((0, 2, 50)) or value[:-1]
    elif kind == 3:
        for _ in range(draw.choice((1, 3, 40, 2000))):
            value = [value]
        holder[key] = value
    elif kind == 4 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = value * draw.choice((-1, 0, 10, 1e3, 1e6, 1e9, 1e40)) + draw.choice((0, 1, -1, 0.5))
    elif kind == 5 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = int(value) * draw.choice((-1, 0, 10, 10**3, 10**6, 10**9)) + draw.choice((0, 1, -1))
    elif kind == 6:
        holder[key] = _holder(data, other := draw.choice(paths))[other[-1]]
    elif isinstance(value, list) and value and draw.random() < 0.5:
        holder[key] = [draw.choice((v, w)) for v, w in zip(value, draw.sample(value, len(value)))]
    elif kind < 10:
        holder[key] = draw.choice(ODD)
    else:
        holder[key] = draw.choice(PLAIN)


def _text(draw: random.Random, raw: bytes) -> bytes:
    """Damage that only text can have: equal keys, digits, depth, cut."""
    text = raw.decode()
    kind = draw.randrange(5)
    if kind == 0 and '": ' in text:
        at = draw.choice([i for i in range(len(text)) if text.startswith('": ', i)])
        begin = text.rfind('"', 0, at)
        end = min((i for i in (text.find(c, at) for c in ",\n") if i > 0), default=at + 3)
        text = f"{text[:begin]}{text[begin:end]}, {text[begin:]}"
    elif kind == 1:
        at = draw.choice([i for i, c in enumerate(text) if c.isdigit()])
        text = f"{text[:at]}{'9' * draw.choice((3, 12, 400, 6000))}{text[at:]}"
    elif kind == 2:
        size = draw.choice((40, 5000, 200000))
        text = text.replace("null", "[" * size + "]" * size, 1)
    elif kind == 3:
        text = text[: draw.randrange(len(text))]
    else:
        at = draw.randrange(len(text))
        text = (
            text[:at]
            + draw.choice(['"', "{", "}", "[", ",", ":", "\x00", "\\u0000", "\ud7ff", "1e999"])
            + text[at:]
        )
    return text.encode("utf-8", "replace")


def _bytes(draw: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 4, 30))):
        if not data:
            break
        at = draw.randrange(min(len(data), draw.choice((16, 200, len(data)))))
        kind = draw.randrange(4)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + draw.choice((1, 8))]
        else:
            data[at:at] = draw.randbytes(draw.choice((1, 8)))
    return bytes(data)


def _tensors(draw: random.Random, files: Files) -> Files:
    """Other values, dtypes, shapes or names; the JSON may be told of it."""
    tensors = load(files[TENSORS])
    data = json.loads(files[CONFIG])
    name = draw.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = draw.randrange(8)
    if kind == 0:
        value = torch.full_like(value, draw.choice((float("nan"), float("inf"), 3e38, 1e9, -1e9, 0.0, 1e-40)))
    elif kind == 1:
        value = value.to(
            draw.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64))
        )
    elif kind == 2:
        value = draw.choice((value[None], value.flatten()[:0], value.repeat(2, *[1] * (value.ndim - 1))))
    elif kind == 3:
        name += draw.choice((".x", "0", " ", "/../x"))
    elif kind == 4:
        value = value * draw.choice((-1.0, 1e3, 1e9, 1e20, 1e38))
    elif kind == 5:
        value = value.double() * 1e300
    if kind != 6:
        tensors[name] = value.contiguous()
    if draw.random() < 0.5:
        data["tensors"] = {k: list(v.shape) for k, v in tensors.items()}
    if draw.random() < 0.3:
        data["changed"] = list(tensors)
    return {CONFIG: json.dumps(data).encode(), TENSORS: save(tensors)}


def mutate(draw: random.Random, files: Files) -> Files:
    """`files` of an adapter with one to three changes."""
    files = dict(files)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.randrange(20)
        try:
            if kind < (14 if TENSORS in files else 18):
                data = json.loads(files[CONFIG])
                _structure(draw, data)
                files[CONFIG] = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
            elif kind == 18:
                files[CONFIG] = _text(draw, files[CONFIG])
            elif kind == 19:
                name = draw.choice(sorted(files))
                files[name] = _bytes(draw, files[name])
            else:
                files = _tensors(draw, files)
        except Exception:
            continue  # damaged beyond this kind of change by the one before
    return files
