"""Two-layer models and a character tokenizer for the tests of eval, cli and report. Random weights, no network."""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.testbed.pixels import Pixels


class Characters:
    """A tokenizer with one token per ASCII character; anything else is '?'."""

    pad_token_id = 0
    eos_token_id = 0

    def __call__(self, text: str | list[str], return_tensors: str | None = None, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self.encode(t) for t in text]}
        ids = self.encode(text)
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def encode(self, text: str) -> list[int]:
        return [min(ord(c), 127) if ord(c) < 128 else ord("?") for c in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ids)


def language_model() -> tuple[Any, Characters]:
    """A random Llama: 2 layers, 4 heads / 2 KV heads, vocabulary 128, weights large enough for peaked attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), Characters()


def vision_model() -> tuple[Any, Pixels]:
    """A random DINOv2: 2 layers, 4 heads, 56 pixels = 4 x 4 patches + CLS."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.3,
    )
    return Dinov2Model(config).eval(), Pixels(size=56)
