"""`head_scores`: one score per head for a chosen objective, as a head set that methods read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelMismatchError
from ..model.sites import base_model
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work, model_name
from .capture import captured
from .data import Sample, check_lengths, needle, samples

ROWS = 64  # query rows whose attention is looked at, at the end of a text


@dataclass
class HeadScores(Calibrator):
    """Score every query head (or KV head: the mean over its group).

    Objectives:
        ``retrieval``: how often, while the model says a hidden number, the key a head attends most is the token that
            is being said, where the text said it. Source: Retrieval Head, arXiv 2404.15574 (nightdessert/Retrieval_Head
            3ac171a, READ). Prompts that the model answers wrongly do not count. Differs: the answer is scored in one
            forward (teacher forcing on the model's own greedy answer), which gives the same probabilities.
        ``needle_mass``: probability on those places, mean over the answer's tokens (a softer retrieval score).
        ``gradient``: ``E |sum_i o_i . dLoss/do_i|``, the gradient of the loss of the answers by a gate on the head's
            output at 1. Source: Are Sixteen Heads Really Better than One?, arXiv 1905.10650 (from memory, UNVERIFIED).
        ``window_loss``: how much the loss of the answers grows when one KV head alone reads 4 sinks and the last 256
            keys, all others everything (leave one out; always of KV heads). Ours, as a plain yardstick.
        ``image_mass``: probability on image tokens, mean over the last rows of the prompt. Needs `data`: a list of
            keyword arguments for the model's forward (``input_ids``, ``pixel_values``, …, as a processor makes them).

    The result is sorted by score, JSON of `hf_attn_patch.head_sets`.

    Options:
        kind: score query heads or KV heads. lengths, samples: tokens, and texts per length. answers: of prompts in the
        data: the model's own or the given ones (gradient, window_loss). top: heads that the options of the patch take.
    """

    name = "head_scores"
    summary = "which heads retrieve, matter for the loss, or look at the image: a head set"
    patch = "retrieval_mask"

    objective: Literal["retrieval", "needle_mass", "gradient", "window_loss", "image_mass"] = "retrieval"
    kind: Literal["q", "kv"] = "q"
    lengths: tuple[int, ...] = (600, 1200)
    samples: int = 6
    answers: Literal["model", "given"] = "model"
    top: int | None = None
    seed: int = 0

    def validate(self) -> None:
        self.require(
            len(self.lengths) > 0 and min(self.lengths) >= 128, "lengths", "at least 128 tokens each"
        )
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.top is None or self.top >= 1, "top", "at least 1, or None for all heads")
        for name, choices in (("objective", OBJECTIVES), ("kind", ("q", "kv"))):
            self.require(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
        if self.objective == "window_loss":
            self.require(self.kind == "kv", "kind", "kv for objective=window_loss, which closes KV heads")

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        report: dict[str, Any] = {"objective": self.objective}
        if self.objective == "image_mass":
            scores = _image_mass(model, data, progress)
        else:
            if tokenizer is None:
                raise CalibrationError(f"{self.name}: needs the tokenizer of the model (tokenizer=)")
            report["notes"] = check_lengths(self.name, model, self.lengths)
            chosen = self._samples(data, model, tokenizer)
            one = {
                "retrieval": _retrieval,
                "needle_mass": _needle_mass,
                "gradient": _gradient,
                "window_loss": _window_loss,
            }[self.objective]
            found = []
            for done, sample in enumerate(chosen):
                progress(self.objective, done, len(chosen))
                kept = work.json(f"sample-{done}", functools.partial(_plain, one, model, sample))
                if kept is not None:
                    found.append(np.array(kept))
            progress(self.objective, len(chosen), len(chosen))
            report.update(samples=len(chosen), counted=len(found))
            if not found:
                raise CalibrationError(
                    f"{self.name}: the model answers none of the {len(chosen)} prompts, so nothing can be seen of its "
                    "retrieval. Take shorter lengths, or objective=gradient"
                )
            scores = np.mean(found, 0)
        heads = head_set(scores, model, self.objective, self.kind, self.name)
        report["best"] = [f"{h['layer']}-{h['head']}: {h['score']:.3f}" for h in heads["heads"][:10]]
        from .pictures import draw_plan

        picture = draw_plan(scores, f"{self.objective} score", 0.0, float(scores.max()) or 1.0)
        return Calibration(
            self.name,
            self.patch,
            heads,
            {"head_set": heads} if self.top is None else {"head_set": heads, "top": self.top},
            report,
            {} if picture is None else {"heads": picture},
        )

    def _samples(self, data: Any, model: Any, tokenizer: Any) -> list[Sample]:
        if self.objective in ("gradient", "window_loss"):
            return [
                s
                for i, n in enumerate(self.lengths)
                for s in samples(
                    data, model, tokenizer, n, self.samples, answers=self.answers, seed=self.seed + i
                )
            ]
        if data is not None:
            raise CalibrationError(
                f"{self.name}: objective={self.objective} makes its own prompts (the place of the answer must be "
                "known); leave data out, or take objective=gradient"
            )
        return [
            needle(tokenizer, n, (i + 0.5) / self.samples, self.seed * 1000 + 100 * level + i)
            for level, n in enumerate(self.lengths)
            for i in range(self.samples)
        ]


def head_set(scores: np.ndarray, model: Any, objective: str, kind: str, who: str) -> dict[str, Any]:
    """Head-set JSON, best first, of scores [layers, H] of query heads (or of KV heads, as window_loss has them).

    kind: "q", or "kv" for the mean over the query heads of a group.
    """
    if kind == "kv" and objective != "window_loss":
        from .moa import shape_of

        scores = scores.reshape(len(scores), shape_of(model, who)[1], -1).mean(-1)
    order = np.argsort(-scores, axis=None, kind="stable")
    heads = [
        {"layer": int(i // scores.shape[1]), "head": int(i % scores.shape[1]), "score": float(scores.flat[i])}
        for i in order
    ]
    return {"model": model_name(base_model(model)), "objective": objective, "kind": kind, "heads": heads}


OBJECTIVES = ("retrieval", "needle_mass", "gradient", "window_loss", "image_mass")


def last_rows(model: Any, rows: int, **inputs: Any) -> tuple[list[Tensor], Any]:
    """(probabilities [H, rows, S] of the last `rows` queries of the first batch row per layer, the model's output)."""
    found: dict[int, Tensor] = {}

    def look(layer: int, program: Any, output: Tensor) -> None:
        query, key = program.query[0, :, -rows:].float(), program.key[0].float()
        group = query.shape[0] // key.shape[0]
        score = query @ key.repeat_interleave(group, 0).mT * program.scale
        last = torch.arange(key.shape[1], device=key.device)
        own = torch.arange(key.shape[1] - query.shape[1], key.shape[1], device=key.device).unsqueeze(-1)
        hidden = last > own
        if program.mask.window is not None:
            hidden |= last <= own - program.mask.window
        found[layer] = score.masked_fill_(hidden, -torch.inf).softmax(-1)

    with captured(model, look), torch.inference_mode():
        out = model(**inputs)
    return [found[layer] for layer in sorted(found)], out


def _answer_rows(model: Any, sample: Sample) -> tuple[list[Tensor], Tensor, Tensor, bool]:
    """(probabilities per layer, answer tokens [n], prompt tokens, whether the model says them) at the answer."""
    ids = sample.ids[None].to(model.device)
    count = len(sample) - sample.start
    maps, out = last_rows(model, count + 1, input_ids=ids, use_cache=False, logits_to_keep=count + 1)
    said = out.logits[0, -count - 1 : -1].argmax(-1)
    answer = ids[0, sample.start :]
    return [m[:, :-1] for m in maps], answer, ids[0], bool((said == answer).all())


def _retrieval(model: Any, sample: Sample) -> np.ndarray | None:
    maps, answer, ids, right = _answer_rows(model, sample)
    if not right:
        return None
    places = torch.tensor(sample.columns, device=ids.device)
    spoken = torch.isin(answer, ids[places])  # " 12345" may begin with a token that the text does not hold
    found = []
    for probability in maps:
        top = probability.argmax(-1)  # [H, answer]
        copied = torch.isin(top, places) & (ids[top] == answer)
        found.append((copied & spoken).sum(-1) / spoken.sum().clamp(min=1))
    return torch.stack(found).cpu().numpy().astype(np.float64)


def _needle_mass(model: Any, sample: Sample) -> np.ndarray | None:
    maps, _, ids, right = _answer_rows(model, sample)
    if not right:
        return None
    places = torch.tensor(sample.columns, device=ids.device)
    return torch.stack([m[:, :, places].sum(-1).mean(-1) for m in maps]).cpu().numpy().astype(np.float64)


def _gradient(model: Any, sample: Sample) -> np.ndarray:
    from .influence import answer_loss

    outputs: dict[int, Tensor] = {}

    def look(layer: int, program: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs[layer] = output

    with captured(model, look), torch.enable_grad():
        answer_loss(model, sample).backward()
    found = []
    for layer in sorted(outputs):
        output = outputs[layer]
        assert output.grad is not None
        found.append((output.detach() * output.grad).float().sum((0, 2, 3)).abs())
    return torch.stack(found).cpu().numpy().astype(np.float64)


def _window_loss(model: Any, sample: Sample) -> np.ndarray:
    from ..api import patched
    from .influence import answer_loss
    from .moa import shape_of

    layers, kv_heads = shape_of(model, "head_scores")
    found = np.zeros((layers, kv_heads))
    with torch.inference_mode():
        dense = float(answer_loss(model, sample))
        for layer, head in np.ndindex(layers, kv_heads):
            alphas = np.ones((layers, kv_heads))
            alphas[layer, head] = 0.0
            with patched(model, "duo", alphas=alphas.tolist(), threshold=0.5, sinks=4, window=256):
                found[layer, head] = float(answer_loss(model, sample)) - dense
    return found


def _plain(one: Any, model: Any, sample: Sample) -> Any:
    made = one(model, sample)
    return None if made is None else made.tolist()


def _image_mass(model: Any, data: Any, progress: Progress) -> np.ndarray:
    from ..forward.needs.images import image_token_ids

    tokens = image_token_ids(model.config)
    if not tokens:
        raise ModelMismatchError(
            f"head_scores: {type(model).__name__} has no image tokens; objective=image_mass needs a "
            "vision-language model"
        )
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise CalibrationError(
            "head_scores: objective=image_mass needs data, a list of keyword arguments for the model's forward with "
            "input_ids and pixel_values (from Python; there is no file format for it)"
        )
    found = []
    for done, inputs in enumerate(data):
        progress("image_mass", done, len(data))
        ids = inputs.get("input_ids")
        if ids is None or len(ids) != 1:
            raise CalibrationError(f"head_scores: item {done} needs input_ids of one row, without padding")
        image = torch.isin(ids[0], torch.tensor(tokens, device=ids.device))
        if not image.any():
            raise CalibrationError(f"head_scores: item {done} has no image token ({tokens}) in its input_ids")
        rows = min(ROWS, int(ids.shape[1] - 1 - int(image.nonzero().max())))
        if rows < 1:
            raise CalibrationError(f"head_scores: item {done} has no token after its image")
        maps, _ = last_rows(model, rows, **inputs)
        found.append(torch.stack([m[:, :, image].sum(-1).mean(-1) for m in maps]).cpu().numpy())
    progress("image_mass", len(data), len(data))
    return np.mean(np.asarray(found, dtype=np.float64), 0)
