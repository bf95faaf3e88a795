"""CPU time of two-stream decoding and of `capture`, relative to plain ``generate``.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_decoding

A random LLaVA with the text model of SmolLM2-135M (30 layers) and 256 image tokens: what is timed does not depend on
weights. CPU time of this process, not the clock, so that other work on the machine counts little; best of `--repeats`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import hf_attn_patch as hap

METHODS: dict[str, dict[str, Any]] = {
    "vcd": {},
    "icd": {"tokens": [5, 6, 7]},
    "m3id": {},
    "pai": {},
    "sid": {},
}


def llava() -> Any:
    """Random weights, float32, on the CPU."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=224,
        patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=49151)
    return LlavaForConditionalGeneration(config).eval()


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """20 tokens, an image of 256, 30 tokens."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (1, 50), generator=random)
    image = torch.full((1, 256), model.config.image_token_id)
    ids = torch.cat([text[:, :20], image, text[:, 20:]], 1)
    pixels = torch.randn(1, 3, 224, 224, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def best(run: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of `repeats` runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--new", type=int, default=33, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = llava()
    inputs = prompt(model)

    def answer(*streams: Any) -> Any:
        return model.generate(
            **inputs, max_new_tokens=asked.new, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=list(streams),
        )  # fmt: skip

    dense = best(answer, asked.repeats)
    print(f"dense {dense:.2f} s of CPU time for an answer of {asked.new} tokens")
    for name, options in METHODS.items():
        stream = hap.two_stream(model, name, inputs=inputs, **options)
        print(f"{name} {best(lambda: answer(stream), asked.repeats) / dense:.2f}x")  # noqa: B023
    for label, entropy in (("capture", True), ("capture, entropy=False", False)):
        with hap.capture(model, entropy=entropy):
            print(f"{label} {best(answer, asked.repeats) / dense:.2f}x")


if __name__ == "__main__":
    main()
