"""`sink_dims`: channels of the hidden state that are huge in sink tokens, for `var` on models it does not know."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.sites import base_model
from ..patches.grounding.sink_dims import ratios, sink_tokens
from . import data as texts
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work, model_name
from .image_data import has_images, samples

NEAREST = 3  # channels that a refusal names


@dataclass
class SinkDims(Calibrator):
    """Find the channels d in which the first token of a prompt has ``|x_d| / RMS(x) > tau`` in most layers.

    x: the hidden state that enters a layer, layers from `first_layer` on. The first token (BOS, or the first word for
    models without one) is the attention sink every language model has, and sinks inside images share its channels
    (See What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv 2503.03321; how its authors found
    theirs was not readable, UNVERIFIED). Usually 1 to 5 channels are found; none is an error, because `var`
    would then edit nothing.

    Data: prompts or texts (default: prose), or questions about images, with which the report also says how many
    image tokens of each layer are sinks (`var` leaves a layer without any alone). With images the processor is needed.

    Options:
        tau: as in `var`; the ratio is at most the square root of the number of channels. share: of (prompt, layer)
        pairs in which a channel must exceed it. samples: prompts. length: tokens of a text prompt.
    """

    name = "sink_dims"
    summary = "channels of the hidden state that are huge in sink tokens: dims of var"
    patch = "var"
    takes = "processor"
    task = "pope"

    tau: float = 20.0
    share: float = 0.5
    first_layer: int = 2
    samples: int = 16
    length: int = 32
    seed: int = 0

    def validate(self) -> None:
        self.require(self.tau > 0, "tau", "> 0")
        self.require(0 <= self.share < 1, "share", "from 0 to below 1")
        self.require(self.first_layer >= 0, "first_layer", ">= 0")
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.length >= 2, "length", "at least 2")

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        config = model.config.get_text_config()
        width, layers = config.hidden_size, config.num_hidden_layers
        self.require(self.first_layer < layers, "first_layer", f"below {layers}, the layers of this model")
        self.require(
            self.tau < math.sqrt(width),
            "tau",
            f"below {math.sqrt(width):.1f}: no ratio is larger with {width} channels",
        )
        images = None
        if has_images(data):
            images = samples(self.name, data, model, tokenizer, self.samples, answers="given", seed=self.seed)
            prompts = [s.inputs for s in images]
        else:
            prompts = [{"input_ids": ids[None].to(model.device)} for ids in self._texts(data, tokenizer)]
        pieces = []
        for done, inputs in enumerate(prompts):
            progress("first tokens", done, len(prompts))
            make = functools.partial(_first_token, model, inputs, self.first_layer)
            pieces.append(work.tensors(f"prompt-{done}", make)["ratios"])
        progress("first tokens", len(prompts), len(prompts))
        ratio = torch.stack(pieces).flatten(0, 1)  # [prompts * layers, C]
        shares, middle = (ratio > self.tau).double().mean(0), ratio.double().median(0).values
        order = sorted(range(width), key=lambda d: (-float(shares[d]), -float(middle[d])))
        dims = [d for d in order if float(shares[d]) > self.share]
        told = lambda d: f"{d} (ratio {float(middle[d]):.1f}, above tau in {float(shares[d]):.0%})"
        if not dims:
            near = ", ".join(map(told, sorted(range(width), key=lambda d: -float(middle[d]))[:NEAREST]))
            raise CalibrationError(
                f"{self.name}: no channel of the first token exceeds tau={self.tau:g} in more than {self.share:.0%} of "
                f"{len(ratio)} (prompt, layer) pairs; nearest: {near}. So there is no sink dimension, and var would "
                "edit nothing: lower tau (here and in var), or take another method"
            )
        plan = {
            "model": model_name(base_model(model)),
            "hidden_size": width,
            "tau": self.tau,
            "dims": dims,
            "shares": {str(d): float(shares[d]) for d in dims},
        }
        report = {"prompts": len(prompts), "dims": [told(d) for d in dims]}
        if images is not None:
            report["visual sinks per layer"] = self._visual_sinks(model, images, tuple(dims), progress)
        return Calibration(self.name, self.patch, plan, {"dims": plan, "tau": self.tau}, report)

    def _texts(self, data: Any, tokenizer: Any) -> list[Tensor]:
        """Token ids [n] of every prompt, special tokens included."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None:
            raise CalibrationError(f"{self.name}: needs the tokenizer or processor of the model (tokenizer=)")
        if data is None:
            from ..testbed.prose import filler_sentences

            said = random.Random(self.seed).sample(filler_sentences(), self.samples)
        else:
            said = [row["prompt" if "prompt" in row else "text"] for row in texts.records(data)][
                : self.samples
            ]
        return [tokenizer(text, return_tensors="pt")["input_ids"][0, : self.length] for text in said]

    def _visual_sinks(
        self, model: Any, images: list, dims: tuple[int, ...], progress: Progress
    ) -> list[float]:
        """Image tokens per prompt that are sinks of each layer from `first_layer` on, mean over the prompts."""
        found = []
        for done, sample in enumerate(images):
            progress("image sinks", done, len(images))
            states = _hidden_states(model, sample.inputs)[self.first_layer :]
            found.append([float(sink_tokens(h, dims, self.tau)[0, sample.image].sum()) for h in states])
        progress("image sinks", len(images), len(images))
        return torch.tensor(found).mean(0).tolist()


@torch.inference_mode()
def _hidden_states(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What enters each layer of the text part, [1, L, C]."""
    states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return list(
        states[: model.config.get_text_config().num_hidden_layers]
    )  # behind the last one comes its output


def _first_token(model: Any, inputs: dict[str, Any], first_layer: int) -> dict[str, Tensor]:
    states = _hidden_states(model, inputs)[first_layer:]
    return {"ratios": torch.stack([ratios(h[0, 0]) for h in states]).float().cpu()}
