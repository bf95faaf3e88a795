"""Features on disk: what a model made of some images, kept in safetensors under a name that changes with either.

The name is a hash of the weights (those of patches included), the config, the patches that are on, and the pixels.
Nothing has to be invalidated by hand, and two models of one name cannot be confused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import api
from .features import encode

FORMAT = 1
IGNORED = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation", "dtype")


def encoded(
    model: Any,
    pixels: Any,
    batch: int,
    folder: str | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[Any, Any]:
    """(cls [n, D], patches [n, T, D]) as `features.encode`, read from `folder` if they are there, else written to it.

    Args:
        folder: None = keep nothing.

    Raises:
        ValueError: the model has no patch tokens (see `features`).
    """
    if folder is None:
        return encode(model, pixels, batch, tick)
    from safetensors.torch import load_file, save_file

    root = Path(folder).expanduser()
    path = root / f"features-{key(model, pixels)}.safetensors"
    if path.is_file():
        kept = load_file(path)
        tick(len(pixels))
        return kept["cls"], kept["patches"]
    cls, patches = encode(model, pixels, batch, tick)
    root.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")  # a run that is killed leaves no half file under the name
    save_file({"cls": cls.contiguous(), "patches": patches.contiguous()}, scratch)
    scratch.replace(path)
    return cls, patches


def key(model: Any, pixels: Any) -> str:
    """32 hex digits that stand for `model` as it is now, patches included, and `pixels`."""
    found = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if k not in IGNORED}
    facts = [FORMAT, type(model).__name__, config, patches_of(model)]
    found.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        _add(found, tensor)
    _add(found, pixels)
    return found.hexdigest()


def patches_of(model: Any) -> list[dict[str, Any]]:
    """What is on `model`, as plain data: method, options, where, by which executor."""
    return [
        {
            "name": handle.name,
            "config": handle.config.to_dict(),
            "sites": [
                [site.path, [[heads, str(config)] for heads, config in _variants(site, handle)]]
                for site in handle.sites
            ],
            "impl": handle._entry.impl,
        }
        for handle in api.active(model)
        if handle._entry.enabled
    ]


def _variants(site: Any, handle: Any) -> list[Any]:
    """(heads, options) of a patch at a site: layers and heads may carry options of their own."""
    from ..install.stack import stacks_of

    return [
        variant
        for stack in stacks_of(site.module)
        for patch in stack.site_patches()
        if patch.entry is handle._entry
        for variant in patch.variants
    ]


def _add(found: Any, tensor: Any) -> None:
    import torch

    plain = tensor.detach().cpu().contiguous()
    found.update(f"{plain.dtype}{list(plain.shape)}".encode())
    found.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
