"""`capture`: where attention goes (image, sinks, prompt, answer) and how spread out it is, per head, live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..call.mask import first_true
from ..call.program import MassEdit, Program
from ..errors import ConfigError, PatchError
from ..forward.needs import ImageKeys, PromptLength
from ..registry import Patch
from .calls import probabilities

CLASSES = ("text", "image", "sink", "answer")  # of keys; every visible key is in one
ROWS = ("answer", "prompt", "all")
BLOCK = 128  # query rows whose probabilities exist at a time


@dataclass
class AttentionTable:
    """Means over the rows (tokens) that were counted, per layer and head; they grow while the model runs.

    Attributes:
        rows: which rows are counted. sinks: how many first tokens of a row are called sinks.
        layers: layers seen, in order. counted: rows counted in each. entropy_known: False with ``entropy=False``.

    `image`, `sink`, `text`, `answer` (mass of the key class, 0 … 1, they sum to 1) and `entropy` (nats) are float64
    arrays [layers, heads].
    """

    rows: str = "answer"
    sinks: int = 1
    entropy_known: bool = True
    totals: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    counted: dict[int, int] = field(default_factory=dict, repr=False)

    def add(self, layer: int, sums: dict[str, Tensor], rows: int) -> None:
        """Add sums [H] over `rows` tokens for one call of `layer`."""
        kept = self.totals.setdefault(layer, {})
        for name, value in sums.items():
            kept[name] = value if name not in kept else kept[name] + value
        self.counted[layer] = self.counted.get(layer, 0) + rows

    @property
    def layers(self) -> list[int]:
        return sorted(layer for layer, rows in self.counted.items() if rows)

    def _mean(self, name: str) -> np.ndarray:
        if not self.layers:
            raise PatchError(
                f"nothing was counted: no forward ran inside capture, or none had rows of kind {self.rows!r}. "
                "Without a cache, say where the prompt ends with hap.prompt(model, length=...), or take rows='all'"
            )
        return np.stack([(self.totals[n][name] / self.counted[n]).cpu().numpy() for n in self.layers])

    @property
    def image(self) -> np.ndarray:
        """Mass on image tokens."""
        return self._mean("image")

    @property
    def sink(self) -> np.ndarray:
        """Mass on the first `sinks` tokens of the row."""
        return self._mean("sink")

    @property
    def text(self) -> np.ndarray:
        """Mass on the other tokens of the prompt."""
        return self._mean("text")

    @property
    def answer(self) -> np.ndarray:
        """Mass on tokens behind the prompt."""
        return self._mean("answer")

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of a row's probabilities in nats; exp of it is the number of keys a row spreads over.

        Raises:
            PatchError: captured with ``entropy=False``.
        """
        if not self.entropy_known:
            raise PatchError("the entropy was not captured: leave out entropy=False")
        return self._mean("entropy")

    def heads(self, name: str = "image", most: int = 10) -> list[tuple[int, int, float]]:
        """(layer, head, mean) of the `most` heads with the largest `name` (image, sink, text, answer, entropy)."""
        values = getattr(self, name)
        order = np.argsort(-values, axis=None, kind="stable")[:most]
        places = [np.unravel_index(i, values.shape) for i in order]
        return [(self.layers[a], int(h), float(values[a, h])) for a, h in places]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: per layer the numbers of its heads."""
        names = [*CLASSES, *(["entropy"] if self.entropy_known else [])]
        values = {name: self._mean(name).tolist() for name in names}
        counted = [self.counted[n] for n in self.layers]
        return {"rows": self.rows, "sinks": self.sinks, "layers": self.layers, "counted": counted, **values}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON; also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def __str__(self) -> str:
        if not self.layers:
            return "AttentionTable: nothing counted yet"
        names = ["image", "sink", "text", "answer"]
        lines = [
            f"mean attention of {self.counted[self.layers[0]]} rows ({self.rows}), {self.image.shape[1]} heads a layer",
            "layer " + "".join(f"{n:>8}" for n in names) + "  entropy   most on the image",
        ]
        for i, layer in enumerate(self.layers):
            means = "".join(f"{getattr(self, n)[i].mean():8.3f}" for n in names)
            spread = f"{self.entropy[i].mean():9.2f}" if self.entropy_known else "        -"
            best = int(self.image[i].argmax())
            lines.append(f"{layer:5d} {means}{spread}   head {best}: {self.image[i, best]:.3f}")
        return "\n".join(lines)

    __repr__ = __str__


def key_classes(program: Program, context: Any, sinks: int) -> Tensor:
    """int8 [B, S]: index into `CLASSES` of each key of `program`. A sink that is an image token counts as sink.

    Raises:
        PatchError: this forward had no ids, so image tokens are unknown.
    """
    mask, device = program.mask, program.query.device
    end = mask.kv_offset + mask.kv_len
    image = context.image_keys
    if image is None:
        raise PatchError(
            "capture: this forward had no input_ids, so image tokens are unknown; pass them, or name the image keys "
            "with hap.prompt(model, image_keys=...)"
        )
    image = image.to(device, torch.bool)
    image = image.repeat_interleave(
        program.batch // image.shape[0], 0
    )  # beams share the prompt of their item
    image = torch.nn.functional.pad(image, (0, max(end - image.shape[1], 0)))[:, :end]
    columns = torch.arange(end, device=device)
    length = end if context.prompt_length is None else context.prompt_length
    real = (
        torch.ones_like(image)
        if mask.padding is None
        else mask.padding[:, :end].expand(program.batch, -1).bool()
    )
    first = first_true(real)[:, None]
    sink = (columns >= first) & (columns < first + sinks)
    found = torch.where(columns >= length, CLASSES.index("answer"), CLASSES.index("text")).expand(image.shape)
    found = torch.where(image, CLASSES.index("image"), found)
    return torch.where(sink, CLASSES.index("sink"), found).to(torch.int8)


def counted_rows(program: Program, context: Any, kind: str) -> Tensor:
    """bool [B, L]: rows of `kind`: ``answer`` those that predict the answer (from the last of the prompt on),
    ``prompt`` those before them, ``all`` both; padding never."""
    mask = program.mask
    columns = mask.query_columns
    length = columns[-1] + 1 if context.prompt_length is None else context.prompt_length
    real = torch.ones(program.batch, program.q_len, dtype=torch.bool, device=program.query.device)
    if mask.padding is not None:
        real = mask.padding[:, columns].expand(program.batch, -1).bool()
    if kind == "all":
        return real
    answering = columns >= length - 1
    return real & (answering if kind == "answer" else ~answering)


def statistics(program: Program, classes: Tensor, rows: Tensor, block: int = BLOCK) -> dict[str, Tensor]:
    """Sums [H] over the rows of `rows` (bool [B, L]) of class masses and entropy, in float64; `block` rows at a time.

    classes: int8 [B, columns], see `key_classes`.
    """
    here = classes[:, program.mask.kv_offset :][:, None, None]
    sums = {
        n: torch.zeros(program.num_heads, dtype=torch.float64, device=rows.device)
        for n in (*CLASSES, "entropy")
    }
    for part in rows.any(0).nonzero()[:, 0].split(block):
        probs = probabilities(program, part)
        weight = rows[:, part][:, None, :, None]
        for number, name in enumerate(CLASSES):
            sums[name] += torch.where(weight & (here == number), probs, 0).sum((0, 2, 3), dtype=torch.float64)
        sums["entropy"] -= torch.where(weight, torch.xlogy(probs, probs), 0).sum(
            (0, 2, 3), dtype=torch.float64
        )
    return sums


@dataclass
class CaptureStatistics(Patch):
    """The patch behind `capture`; edits nothing. In no registry."""

    name = "capture_statistics"
    parts = ("text", "decoder")
    default_part = "text"
    needs = (PromptLength(), ImageKeys())

    table: Any = None

    def edit(self, program: Program, call: Any) -> None:
        table, mask, scratch = self.table, program.mask, call.context.scratch
        key = ("capture", call.key, mask.kv_offset, mask.kv_len)
        if key not in scratch:  # the same for all layers of a forward that have these keys
            chosen = counted_rows(program, call.context, table.rows)
            count = int(chosen.sum())
            scratch[key] = (chosen, count, key_classes(program, call.context, table.sinks) if count else None)
        rows, count, classes = scratch[key]
        if not count:
            return
        if program.ragged:
            raise PatchError(
                f"capture: the cache of {call.path} keeps a different span per head, so its heads have no common keys "
                "to count. Patch with cache='keep'"
            )
        if table.entropy_known:
            program.observe(
                lambda done, output: table.add(call.layer, statistics(done, classes, rows), count)
            )
        else:
            self._by_executor(program, call, classes, rows)

    def _by_executor(self, program: Program, call: Any, classes: Tensor, rows: Tensor) -> None:
        """Class masses as the executor has them anyway, through an edit that multiplies by 1."""

        def look(masses: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
            at = rows[:, columns - program.mask.q_offset][:, None, :, None]
            sums = torch.where(at, masses, 0).sum((0, 2), dtype=torch.float64)  # [H, C]
            self.table.add(call.layer, {name: sums[:, i] for i, name in enumerate(CLASSES)}, int(at.sum()))
            return torch.ones_like(masses)

        program.classify(classes)
        program.mass_edits.append(MassEdit(look, len(CLASSES), rows))


@contextmanager
def capture(
    model: Any,
    *,
    rows: Literal["answer", "prompt", "all"] = "answer",
    sinks: int = 1,
    entropy: bool = True,
    layers: Any = None,
    part: str | None = None,
) -> Iterator[AttentionTable]:
    """Statistics of every attention call inside the block, without eager attention and without an L x L matrix.

    Patches that are on the model are part of what is measured. The model computes what it computed before; every call
    is followed by one more pass over its keys, `BLOCK` rows at a time.

    Args:
        rows: ``answer`` (rows that predict the answer, prompt's last one included), ``prompt``, or ``all``.
        sinks: the first so many real tokens of a row are counted as sinks, not as image or text.
        entropy: False takes the masses from the executor itself (no second pass). The program then has key classes, so
            a patch that needs its own (pai, var, …) cannot be on the same layers.
        layers, part: as for `hap.patch`.

    Raises:
        ConfigError, PatchError: before anything has run.
    """
    from ..api import patched

    if rows not in ROWS:
        raise ConfigError(f"capture: rows={rows!r} is unknown; choose one of {', '.join(ROWS)}")
    if sinks < 0:
        raise ConfigError(f"capture: sinks={sinks} must be at least 0")
    table = AttentionTable(rows, sinks, entropy)
    with patched(model, CaptureStatistics(table=table), layers=layers, part=part):
        yield table
