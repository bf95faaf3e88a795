"""A tiny LLaMA with a tokenizer of single characters, saved as a folder: what training needs, without a hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.tiny import tiny_model


def characters() -> Any:
    """Tokenizer with one token per ASCII character; 0 pads, 2 ends."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {t: i for i, t in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def language_model(seed: int = 0) -> Any:
    """A fresh tiny LLaMA in float32."""
    import torch

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_model("llama").float().eval()


def save_folder(folder: Path) -> Path:
    language_model().save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder
