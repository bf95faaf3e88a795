"""One attention call on a token grid, as a patch meets it in a ViT: what benchmarks of vision methods share."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.kernels import attention


class GridCall:
    """Random q, k, v (float32 [1, heads, 1 + side^2, 64], the first token is CLS) and patches that edit calls on them.

    >>> call = GridCall(side=64, heads=6)
    >>> program = call.edited(*call.patch("swin_window", {"window": 16}))
    """

    def __init__(self, side: int, heads: int, dim: int = 64) -> None:
        draw, self.length = torch.Generator().manual_seed(0), side**2 + 1
        self.side, self.heads, self.dim = side, heads, dim
        self.q, self.k, self.v = (torch.randn(1, heads, self.length, dim, generator=draw) for _ in range(3))

    def patch(self, name: str, options: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
        """The patch and the tensors that it would own on this site, as it draws them."""
        patch, tensors = registry.build(name, options), torch.nn.Module()
        site: Any = SimpleNamespace(
            layer=0, num_heads=self.heads, num_kv_heads=self.heads, head_dim=self.dim, module=None
        )
        for key, tensor in patch.tensors(site).items():
            tensors.register_parameter(key, torch.nn.Parameter(tensor))
        return patch, tensors

    def edited(self, patch: Any, tensors: torch.nn.Module) -> Program:
        """A fresh call after the patch."""
        program = Program(self.q, self.k, self.v, Mask(1, self.length, self.length), self.dim**-0.5)
        facts = SimpleNamespace(grid=(self.side, self.side))
        patch.edit(
            program,
            SimpleNamespace(
                path="bench", heads=None, layer=0, context=facts, tensors=tensors, training=False
            ),
        )
        return program


def gate(name: str, program: Program, output: torch.Tensor) -> None:
    """The whole output against the float64 reference, on the choice that was made.

    Raises:
        SystemExit: they are further apart than float32 can explain.
    """
    wide = {
        field.name: value.double()
        for field in fields(program)
        if isinstance(value := getattr(program, field.name), torch.Tensor) and value.is_floating_point()
    }
    error = float((attention(replace(program, **wide), "reference").output - output).abs().max())
    if not error < 100 * torch.finfo(torch.float32).eps * float(wide["value"].abs().max()):
        raise SystemExit(f"{name}: rows are {error:.3g} off, no number")
