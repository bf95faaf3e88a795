"""`duo` calibration: gates per KV head, trained on passkeys so that streaming attention changes no answer."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import patched
from ..model.sites import base_model
from ..patches.sparse.duo import full_heads, gates
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work, model_name
from .data import Sample, check_lengths, samples
from .pictures import draw_plan

WORDS = ("alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec "
         "romeo sierra tango uniform victor whiskey xray yankee zulu").split()  # fmt: skip
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
PIECES = 10  # finished parts of the training that an interrupted run can go on from


@dataclass
class DuoCalibrator(Calibrator):
    """Gates for the `duo` patch: which KV heads need the whole context (retrieval heads), which do with a window.

    Source: DuoAttention, arXiv 2410.10819 (mit-han-lab/duo-attention fe93c31, READ; its losses RAN). The model is
    frozen and only the gates of ``duo:mode=train`` learn: AdamW, learning rate `lr` with a fifth of the steps to warm
    up and a fifth to cool down, gates clipped to [0, 1] after each step. Loss: squared difference of the last hidden
    states of the dense and of the mixed model, mean over channels and over the tokens of questions and answers
    (`distillation`), plus `l1` times the mean gate. Data: `passkeys` sequences of `words` words at random depths of
    real prose, all asked for at the end; or your own prompts with answers.

    Options: sparsity: share of streaming heads of the plan (the gates are kept, another share needs no new run).
    lengths: of the samples, in turn. sinks, window: what streaming heads read.

    Differs from the original code: sized for a small model on a CPU (2000 steps of 1k-32k tokens with 10 passkeys of
    32 words, lr 0.02, sinks 128 there); the full term of the mix is the student's own (see the patch), so a gate also
    feels what streaming does to the layers before it; `relative` divides the difference by the mean square of the dense
    states, because hidden states of other models are of other sizes and the weight of the L1 term is not; no Ulysses,
    no FSDP.
    """

    name = "duo"
    summary = "gates per KV head trained on passkeys: retrieval heads and streaming heads"
    patch = "duo"

    sparsity: float = 0.5
    lengths: tuple[int, ...] = (640, 768, 896)
    steps: int = 60
    lr: float = 0.05
    l1: float = 0.05
    relative: bool = False
    sinks: int = 64
    window: int = 256
    passkeys: int = 4
    words: int = 6
    seed: int = 0

    def validate(self) -> None:
        self.require(0.0 <= self.sparsity <= 1.0, "sparsity", "in [0, 1]")
        self.require(len(self.lengths) > 0, "lengths", "at least one length in tokens")
        self.require(self.steps >= 1, "steps", "at least 1")
        self.require(self.lr > 0, "lr", "positive")
        self.require(self.l1 >= 0, "l1", "not negative")
        self.require(self.sinks >= 0, "sinks", "not negative")
        self.require(self.window >= 1, "window", "at least 1 (a window counts the query's own key)")
        self.require(1 <= self.passkeys <= len(ORDINALS), "passkeys", f"1 to {len(ORDINALS)}")
        self.require(self.words >= 1, "words", "at least 1")
        longest = max(self.lengths, default=0)
        if longest <= self.sinks + self.window:
            raise CalibrationError(
                f"duo: at {longest} tokens a streaming head with {self.sinks} sinks and a window of {self.window} "
                "reads everything, so there is nothing to learn. Give longer lengths or a smaller window"
            )

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        notes = check_lengths(self.name, model, self.lengths)
        chosen = self._samples(model, tokenizer, data)
        state: dict[str, Tensor] = {"losses": torch.zeros(0, 2)}
        at = 0
        ends = sorted({round((i + 1) * self.steps / PIECES) for i in range(PIECES)} - {0})
        progress("gates", 0, self.steps)
        for end in ends:
            piece = functools.partial(self._train, model, chosen, state, at, end, progress)
            state = work.tensors(f"gates-{end:05d}", piece)
            at = end
        heads = state["heads"].tolist()
        table = [[round(a, 4) for a in row.tolist()] for row in state["alphas"].split(heads)]
        return self._result(model, table, state["losses"], notes)

    def _samples(self, model: Any, tokenizer: Any, data: Any) -> list[Sample]:
        """A sample for every step, of the lengths in turn."""
        lengths = [self.lengths[step % len(self.lengths)] for step in range(self.steps)]
        if data is None:
            return [
                passkey_sample(tokenizer, n, self.passkeys, self.words, self.seed * 100003 + step)
                for step, n in enumerate(lengths)
            ]
        pool = {
            n: samples(data, model, tokenizer, n, self.steps, answers="given", seed=self.seed)
            for n in set(lengths)
        }
        return [pool[n][step % len(pool[n])] for step, n in enumerate(lengths)]

    def _train(
        self,
        model: Any,
        chosen: list[Sample],
        state: dict[str, Tensor],
        begin: int,
        end: int,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Gates, optimiser state and losses after step `end`, from those after step `begin`."""
        losses = []
        with patched(model, "duo", mode="train", sinks=self.sinks, window=self.window) as handle:
            own = list(gates(model).values())
            sizes = [a.numel() for a in own]
            optimizer = torch.optim.AdamW(own, lr=self.lr, weight_decay=0.0)
            if begin:
                parts = [state[name].split(sizes) for name in ("alphas", "exp_avg", "exp_avg_sq")]
                for gate, alpha, mean, square in zip(own, *parts):
                    gate.data.copy_(alpha)
                    optimizer.state[gate] = {
                        "step": torch.tensor(float(begin)),
                        "exp_avg": mean.to(gate.device).clone(),
                        "exp_avg_sq": square.to(gate.device).clone(),
                    }
            for step in range(begin, end):
                optimizer.param_groups[0]["lr"] = self.lr * schedule(step, self.steps)
                optimizer.zero_grad()
                with handle.disabled(), torch.no_grad():
                    teacher = last_hidden(model, chosen[step])
                student = last_hidden(model, chosen[step])
                distance = distillation(teacher, student, self.relative)
                size = torch.cat(own).abs().mean()
                loss = distance + self.l1 * size
                if not bool(torch.isfinite(loss)):
                    raise CalibrationError(
                        f"duo: the loss of step {step} is {float(loss.detach())} (distance "
                        f"{float(distance.detach())}). The model gives no finite hidden states for this sample; use "
                        "float32 or other data"
                    )
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for gate in own:
                        gate.clamp_(0, 1)
                losses.append([float(distance.detach()), float(size.detach())])
                progress("gates", step + 1, self.steps)
            flat = lambda key: torch.cat([optimizer.state[g][key].detach().float().cpu() for g in own])
            return {
                "alphas": torch.cat([g.detach().float().cpu() for g in own]),
                "exp_avg": flat("exp_avg"),
                "exp_avg_sq": flat("exp_avg_sq"),
                "losses": torch.cat([state["losses"], torch.tensor(losses)]),
                "heads": torch.tensor(sizes),
            }

    def _result(self, model: Any, table: list[list[float]], losses: Tensor, notes: list[str]) -> Calibration:
        full = full_heads(table, self.sparsity)
        ranked = sorted(
            (
                {"layer": layer, "head": head, "score": a}
                for layer, row in enumerate(table)
                for head, a in enumerate(row)
            ),
            key=lambda entry: -entry["score"],
        )
        span = {"sinks": self.sinks, "window": self.window}
        plan = {
            "model": model_name(base_model(model)) or type(base_model(model)).__name__,
            "objective": "duo",
            "kind": "kv",
            **span,
            "alphas": table,
            "heads": ranked,
        }
        count, least = sum(map(len, table)), max(len(losses) // 10, 1)
        report = {
            "full_heads": sum(map(sum, full)),
            "heads": count,
            "sparsity": self.sparsity,
            "mean_gate": round(sum(map(sum, table)) / count, 4),
            "at_zero": sum(a == 0 for row in table for a in row),
            "at_one": sum(a == 1 for row in table for a in row),
            "best": [f"layer {e['layer']} KV head {e['head']}: {e['score']}" for e in ranked[:10]],
            "distance_first_tenth": round(float(losses[:least, 0].mean()), 5),
            "distance_last_tenth": round(float(losses[-least:, 0].mean()), 5),
            "notes": notes,
        }
        pictures = {}
        if len(set(map(len, table))) == 1 and (svg := draw_plan(np.array(table), "gates of duo")):
            pictures["gates"] = svg
        options = {"alphas": {"alphas": table}, "sparsity": self.sparsity, **span}
        return Calibration(self.name, self.patch, plan, options, report, pictures)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: up in the first fifth of the steps, down in the last, never below 0.1."""
    part = max(steps // 5, 1)
    return min(1.0, max((step + 1) / part, 0.1), max((steps - step) / part, 0.1))


def last_hidden(model: Any, sample: Sample) -> Tensor:
    """Last hidden states [1, n, C] of questions and answers of a sample (the tokens from `start` on)."""
    decoder = base_model(model).base_model
    ids = sample.ids[None].to(base_model(model).device)
    hidden = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    return hidden[:, sample.start :]


def distillation(teacher: Tensor, student: Tensor, relative: bool = False) -> Tensor:
    """Mean over tokens and channels of the squared difference of hidden states [..., C], in float32.

    relative: in units of the mean square of `teacher`.
    """
    distance = (teacher.float() - student.float()).pow(2).mean()
    return distance / teacher.float().pow(2).mean() if relative else distance


def passkey_sample(tokenizer: Any, length: int, count: int, words: int, seed: int) -> Sample:
    """Prose of about `length` tokens in which `count` keys of `words` words are said, and the questions with answers.

    `start` is the first token of the first question; `columns` are the places of the keys in the prose.

    Raises:
        CalibrationError: questions and keys leave less than half of the length to the prose.
    """
    from ..testbed.prose import filler_sentences

    draw = random.Random(seed)
    encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    keys = [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(count)]
    names = ORDINALS[:count]
    needles = [
        (encode(f" Remember: the {name} key to the vault is"), encode(f" {key}."))
        for name, key in zip(names, keys)
    ]
    asked = [
        t for name, key in zip(names, keys) for t in encode(f"\nWhat is the {name} key to the vault? {key}.")
    ]
    room = length - len(asked) - sum(len(a) + len(b) for a, b in needles)
    if room < length // 2:
        raise CalibrationError(
            f"duo: {count} keys of {words} words leave {room} of {length} tokens to the prose; give longer lengths, or "
            "fewer passkeys or words"
        )
    sentences = filler_sentences()
    at, filler = draw.randrange(len(sentences)), []
    while True:
        sentence = encode(" " + sentences[at % len(sentences)])
        if len(sentence) > room:
            break
        filler.append(sentence)
        room -= len(sentence)
        at += 1
    places = sorted(
        draw.randrange(round(0.05 * len(filler)), max(round(0.95 * len(filler)), 1)) for _ in range(count)
    )
    ids: list[int] = []
    columns: list[int] = []
    for number, sentence in enumerate([*filler, []]):
        for place, (said, key) in zip(places, needles):
            if place == number:
                ids += said
                columns += range(len(ids), len(ids) + len(key))
                ids += key
        ids += sentence
    return Sample(torch.tensor(ids + asked), len(ids), "passkeys", tuple(columns))
