"""CPU time of one decoded token, patched against dense in turns within one run, per patched layer.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_token --out benchmarks/results/token-cpu.md
    OMP_NUM_THREADS=1 python -m benchmarks.bench_token --layers 2 --prompts 40 --tokens 6 --repeats 1    # does it run?

The shape of SmolLM2-135M (30 layers, 9 query heads over 3 KV heads of 64, hidden 576) with random weights: what is
timed does not depend on them. Grounding methods run on a LLaVA with that text model and an image of 64 tokens. Both
models share their weights and have a cache each; at every position each decodes the same token, the order alternating,
so that a busy machine slows both alike. Time is CPU time of this process, one thread. Before anything is timed, the
patched model's logits are compared with those of the reference executor; a method that differs gets no number.

`per layer` is (patched - dense) / patched layers: of the minima over all positions and repeats, and the median of the
pairs. The minima say what the code costs, the medians what it cost here.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_attn_patch as hap
from hf_attn_patch.env import cpu_name

ROOT = Path(__file__).resolve().parent.parent
IMAGE = 64  # tokens, in a prompt of a grounding method
TEXT, GROUNDING = ("streaming", "moa", "duo", "quest", "head_gate"), ("pai", "vaf")
SETTLE = 3  # first tokens of an answer are not counted: programs are built there
WORST = 1e-3  # of the largest logit


def options(name: str, layers: int) -> dict[str, Any]:
    """Of a method; edits on every layer, plans cut to `layers`."""
    if name == "streaming":
        return {"sinks": 4, "window": 256}
    if name == "moa":
        plan = json.loads((ROOT / "hf_attn_patch" / "patches" / "plans" / "smollm2-demo.json").read_text())
        return {"plan": {key: rows[:layers] for key, rows in plan.items()}}
    if name == "duo":
        plan = json.loads((ROOT / "benchmarks" / "plans" / "smollm2-duo.json").read_text())
        return {"alphas": plan["alphas"][:layers], "sparsity": 0.5, "sinks": 4, "window": 256}
    if name == "head_gate":
        return {"gate": 0.5}
    return {"first_layer": 0, "last_layer": None} if name in GROUNDING else {}


def text_config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip


def make(grounding: bool, layers: int) -> Any:
    """Random weights, float32, on the CPU."""
    from transformers import CLIPVisionConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    if not grounding:
        return LlamaForCausalLM(text_config(layers)).eval().requires_grad_(False)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=112,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(text_config=text_config(layers), vision_config=vision, image_token_index=49151)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """A copy with the same weights, not with weights of its own."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def prompt(length: int, grounding: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 49000, (1, length), generator=random)
    if not grounding:
        return {"input_ids": ids}
    if length < IMAGE + 8:
        raise SystemExit(f"a prompt of {length} tokens holds no image of {IMAGE} and a question")
    ids[:, 5 : 5 + IMAGE] = 49151
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 112, 112, generator=random)}


@dataclass
class Stream:
    """One model that decodes into a cache of its own."""

    model: Any
    cache: Any = None
    logits: Any = None

    def prefill(self, inputs: dict[str, Tensor]) -> None:
        # a cache that knows its layers, as generate makes it
        from transformers import DynamicCache

        output = self.model(
            **inputs, past_key_values=DynamicCache(config=self.model.config), use_cache=True, logits_to_keep=1
        )
        self.cache, self.logits = output.past_key_values, output.logits

    def step(self, token: Tensor) -> float:
        """CPU milliseconds of one more token."""
        began = time.process_time_ns()
        output = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        took = time.process_time_ns() - began
        self.cache, self.logits = output.past_key_values, output.logits
        return took / 1e6


def check(name: str, model: Any, inputs: dict[str, Tensor], tokens: Tensor, layers: int) -> float:
    """Largest difference to the reference executor after the prompt and some tokens, relative to the largest logit.

    Raises:
        SystemExit: it is above what float32 explains.
    """
    streams = []
    for impl in ("auto", "reference"):
        one = twin(model)
        hap.patch(one, name, **options(name, layers), impl=impl)
        streams.append(Stream(one))
    worst = 0.0
    for stream in streams:
        stream.prefill(inputs)
    for token in tokens[: SETTLE + 1]:
        for stream in streams:
            stream.step(token.view(1, 1))
        auto, reference = (s.logits.double() for s in streams)
        worst = max(worst, float((auto - reference).abs().max() / reference.abs().max()))
    if worst > WORST:
        raise SystemExit(
            f"{name}: logits differ from the reference executor by {worst:.2g}, no number is given"
        )
    return worst


def measure(name: str, model: Any, length: int, layers: int, count: int, repeats: int) -> dict[str, Any]:
    """Dense and patched in turns: milliseconds per token at every position of every repeat."""
    inputs = prompt(length, name in GROUNDING)
    tokens = torch.randint(3, 49000, (count + SETTLE,), generator=torch.Generator().manual_seed(1))
    off = check(name, model, inputs, tokens, layers)
    patched = twin(model)
    handle = hap.patch(patched, name, **options(name, layers))
    dense_ms: list[float] = []
    patched_ms: list[float] = []
    for repeat in range(repeats):
        dense, other = Stream(model), Stream(patched)
        dense.prefill(inputs)
        other.prefill(inputs)
        for position, token in enumerate(tokens):
            order = (dense, other) if (position + repeat) % 2 == 0 else (other, dense)
            took = {id(stream): stream.step(token.view(1, 1)) for stream in order}
            if position >= SETTLE:
                dense_ms.append(took[id(dense)])
                patched_ms.append(took[id(other)])
    sites = len(handle.sites)
    pairs = [b - a for a, b in zip(dense_ms, patched_ms)]
    return {
        "method": name,
        "prompt": length,
        "layers": sites,
        "dense_min": min(dense_ms),
        "dense_median": statistics.median(dense_ms),
        "patched_min": min(patched_ms),
        "patched_median": statistics.median(patched_ms),
        "ratio_min": min(patched_ms) / min(dense_ms),
        "ratio_median": statistics.median(b / a for a, b in zip(dense_ms, patched_ms)),
        "layer_min": (min(patched_ms) - min(dense_ms)) / sites,
        "layer_median": statistics.median(pairs) / sites,
        "off": off,
    }


HEAD = (
    "| method | prompt | layers patched | dense ms, min / median | patched ms, min / median | ratio, min / median "
    "| ms per layer, min / median | off the reference |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['method']} | {row['prompt']} | {row['layers']} "
        f"| {row['dense_min']:.2f} / {row['dense_median']:.2f} "
        f"| {row['patched_min']:.2f} / {row['patched_median']:.2f} "
        f"| {row['ratio_min']:.2f}x / {row['ratio_median']:.2f}x "
        f"| {row['layer_min']:+.3f} / {row['layer_median']:+.3f} | {row['off']:.0e} |"
    )


def page(rows: list[dict[str, Any]], asked: argparse.Namespace, command: str) -> str:
    """The table with what it takes to read and to repeat it."""
    from transformers import __version__ as transformers

    methods = dict.fromkeys(row["method"] for row in rows)
    said = "; ".join(
        f"{name} {', '.join(f'{k}={v}' for k, v in options(name, 1).items() if k not in ('plan', 'alphas'))}".strip()
        for name in methods
    )
    return "\n".join(
        [
            "# CPU time of one decoded token",
            "",
            f"    {command}",
            "",
            f"{asked.layers} layers, 9 query heads over 3 KV heads of 64, hidden 576, float32, random weights; "
            f"{asked.repeats} x {asked.tokens} tokens per row, dense and patched in turns; {cpu_name()}, one thread, "
            f"torch {torch.__version__}, transformers {transformers}, {time.strftime('%Y-%m-%d')}, load "
            f"{os.getloadavg()[0]:.1f}. Options: {said}.",
            "",
            *HEAD,
            *(line(row) for row in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=[*TEXT, *GROUNDING], default=[*TEXT, *GROUNDING])
    parser.add_argument("--prompts", nargs="+", type=int, default=[200, 512])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=24, help="decoded per repeat, beside the first three")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table there (markdown)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("\n".join(HEAD))
    with torch.inference_mode():
        for grounding in (False, True):
            chosen = [name for name in asked.methods if (name in GROUNDING) == grounding]
            if not chosen:
                continue
            model = make(grounding, asked.layers)
            for name in chosen:
                for length in asked.prompts:
                    rows.append(measure(name, model, length, asked.layers, asked.tokens, asked.repeats))
                    print(line(rows[-1]), flush=True)
    if asked.out is not None:
        import shlex
        import sys

        command = f"OMP_NUM_THREADS=1 python -m benchmarks.bench_token {shlex.join(sys.argv[1:])}"
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(page(rows, asked, command))


if __name__ == "__main__":
    main()
