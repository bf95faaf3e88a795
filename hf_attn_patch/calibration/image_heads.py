"""`image_heads`: which heads look at the image while the model answers, as a head set that methods read."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ModelMismatchError
from ..forward.needs.images import image_token_ids
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work
from .head_scores import head_set, last_rows
from .image_data import ImageSample, samples


@dataclass
class ImageHeads(Calibrator):
    """Rank every head by its image mass: the probability on image tokens, mean over the rows that predict the answer.

    The rows are those from the last token of the prompt to the last but one of the answer, so every answer counts the
    same whatever its length. The result is sorted by score, JSON of `hf_attn_patch.head_sets` (objective
    ``image_mass``). Ours, as a plain yardstick: the mass is what `pai`, `vaf`, `hgai` raise and `var` selects by.

    Data: questions about images, ``{"image": path, "question": ..., "answer": ...}`` (`calibration.image_data`).

    Options:
        samples: questions. answers: of the data, or the model's own (greedy, `new` tokens). kind: rank query heads or
        KV heads (mean over the group). top: heads that the options of the patch take.
    """

    name = "image_heads"
    summary = "which heads look at the image while the model answers: a head set"
    patch = "retrieval_mask"
    takes = "processor"
    task = "pope"

    samples: int = 32
    answers: Literal["given", "model"] = "given"
    new: int = 32
    kind: Literal["q", "kv"] = "q"
    top: int | None = None
    seed: int = 0

    def validate(self) -> None:
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.answers in ("given", "model"), "answers", "given or model")
        self.require(self.new >= 1, "new", "at least 1")
        self.require(self.kind in ("q", "kv"), "kind", "q or kv")
        self.require(self.top is None or self.top >= 1, "top", "at least 1, or None for all heads")

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        if not image_token_ids(model.config):
            raise ModelMismatchError(
                f"{self.name}: {type(model).__name__} has no image tokens (image_token_id); it is for vision-language "
                "models"
            )
        chosen = samples(
            self.name,
            data,
            model,
            tokenizer,
            self.samples,
            answers=self.answers,
            seed=self.seed,
            new=self.new,
        )
        found = []
        for done, sample in enumerate(chosen):
            progress("image mass", done, len(chosen))
            found.append(work.json(f"sample-{done}", functools.partial(_plain_mass, model, sample)))
        progress("image mass", len(chosen), len(chosen))
        scores = np.mean(np.asarray(found, dtype=np.float64), 0)
        if self.top is not None and self.top > scores.size:
            raise CalibrationError(f"{self.name}: top={self.top}, but there are {scores.size} query heads")
        heads = head_set(scores, model, "image_mass", self.kind, self.name)
        report = {
            "samples": len(chosen),
            "image share of the keys": float(np.mean([float(s.image.float().mean()) for s in chosen])),
            "mean mass per layer": [round(float(m), 4) for m in scores.mean(1)],
            "best": [f"{h['layer']}-{h['head']}: {h['score']:.3f}" for h in heads["heads"][:10]],
        }
        from .pictures import draw_plan

        picture = draw_plan(scores, "image mass", 0.0, float(scores.max()) or 1.0)
        return Calibration(
            self.name,
            self.patch,
            heads,
            {"head_set": heads} if self.top is None else {"head_set": heads, "top": self.top},
            report,
            {} if picture is None else {"heads": picture},
        )


def image_mass(model: Any, sample: ImageSample) -> np.ndarray:
    """Probability on image tokens, mean over the rows that predict the answer: [layers, H]."""
    maps, _ = last_rows(model, len(sample) - sample.start + 1, **sample.inputs, use_cache=False)
    # the row of the answer's last token predicts what is not there
    return np.stack([m[:, :-1, sample.image].sum(-1).mean(-1).cpu().numpy() for m in maps]).astype(np.float64)


def _plain_mass(model: Any, sample: ImageSample) -> list:
    return image_mass(model, sample).tolist()
