"""A forward that does not happen: random queries and keys of the right shape, so that a method edits a call as ever."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..call.mask import Mask
from ..call.program import Program
from ..errors import PatchError
from ..forward.needs.grid import SeenGrid
from ..model.sites import Site

CLS = ("cls_token", "class_embedding", "class_token", "distillation_token")
REGISTERS = ("register_tokens", "registers")


class Forward:
    """What a method may ask of the running forward, made up. Facts that only a real one has raise `PatchError`."""

    def __init__(self, model: Any, length: int, grid: tuple[int, ...] | None, image_tokens: int = 0):
        self.model, self.config = model, model.config
        self.grid, self.pixels, self.prompt_length, self.seen = grid, SeenGrid(grid), length, 0
        self.first_prompt = length
        self.memory: dict[str, Any] = {}
        self.scratch: dict[Any, Any] = {}
        self.handed: dict[str, Any] = {}
        self.override: dict[str, Any] = {}
        self.image_free_pass = None
        columns = torch.arange(length)
        self.image_keys = ((columns >= 1) & (columns <= image_tokens))[None]
        self._length = length
        self._hidden: dict[int, Tensor] = {}

    def _random(self, path: str) -> Tensor:
        site = self.model.get_submodule(path)
        width = next((m.in_features for m in site.modules() if isinstance(m, nn.Linear)), None)
        if width is None:
            raise PatchError(f"{path} has no linear layer to tell its width by")
        if width not in self._hidden:
            self._hidden[width] = torch.randn(
                1, self._length, width, generator=torch.Generator().manual_seed(width)
            )
        return self._hidden[width]

    layer_input = attention_input = _random

    def query_before_norm(self, path: str, heads: int, length: int) -> Tensor | None:
        return None

    def __getattr__(self, name: str) -> Any:
        raise PatchError(f"it asks for {name!r}, which only a real forward has")


def program_of(site: Site, queries: int, keys: int, known: dict[Any, Tensor]) -> Program:
    """One attention call of `site` on random q, k, v (kept in `known`, the same for sites of one shape), batch 1.

    Raises:
        PatchError: the shape of the site is unknown.
    """
    heads, kv_heads, dim = site.num_heads, site.num_kv_heads, site.head_dim
    if not heads or not kv_heads or not dim:
        raise PatchError(
            f"{site.path}: heads or head dimension are unknown; see hap.sites.register_site_facts"
        )

    def made(what: str, count: int, length: int) -> Tensor:
        key = (what, count, length, dim)
        if key not in known:
            seed = torch.Generator().manual_seed(len(known))
            known[key] = torch.randn(1, count, length, dim, generator=seed)
        return known[key]

    mask = Mask(1, queries, keys, q_offset=keys - queries, causal=site.causal, window=site.window)
    return Program(
        made("q", heads, queries), made("k", kv_heads, keys), made("v", kv_heads, keys), mask, scale=dim**-0.5
    )


def prefix_tokens(model: nn.Module) -> int:
    """Tokens of a vision tower before its patches (CLS, registers), by the names of the parameters that hold them."""
    count = 0
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        count += last in CLS
        count += parameter.shape[-2] if last in REGISTERS else 0
    return count
