"""Measurement of launch configurations: a handful of candidates per kernel, the fastest is remembered on request.

A candidate must give the result of the configuration in the table before it is timed.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.kernels.layout import BlockLayout
from hf_attn_patch.kernels.triton import configs
from hf_attn_patch.kernels.triton.classes import class_attention
from hf_attn_patch.kernels.triton.configs import Config
from hf_attn_patch.kernels.triton.decode import decode
from hf_attn_patch.kernels.triton.layout_attention import layout_attention

from .case import Context
from .other_cases import VAR, image_in_the_middle

KERNELS = ("layout", "layout_dq", "layout_dkv", "decode", "classes")


def candidates(kernel: str) -> list[Config]:
    """What is tried besides the table's row. Blocks of the backward are the forward's; there, tokens per step vary."""
    made = {
        "layout": itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)),
        "classes": itertools.product((64, 128), (32, 64), (4, 8), (1, 2, 3)),
        "layout_dq": itertools.product((0,), (32, 64), (4, 8), (1, 2, 3)),
        "layout_dkv": itertools.product((32, 64, 128), (0,), (4, 8), (1, 2, 3)),
        "decode": itertools.product((16, 32), (32, 64, 128), (2, 4), (2, 3, 4)),
    }[kernel]
    return [Config(*numbers) for numbers in made]


def problem(context: Context, kernel: str, dim: int) -> Callable[[], Callable[[], Tensor]]:
    """A function that sets the problem up under the configuration in force, and returns the call to time."""
    heads, kv_heads, L = (2, 1, 64) if context.tiny else (32, 8, 8192)
    if kernel == "decode":
        B, S = (1, 64) if context.tiny else (8, 32768)
        torch.manual_seed(0)
        q = context.heads(B, heads, 1, dim)
        k, v = (context.heads(B, kv_heads, S, dim).contiguous() for _ in range(2))
        return lambda: lambda: decode(q, k, v, scale=dim**-0.5, q_columns=S - 1)[0]
    q, k, v = context.qkv(1, heads, kv_heads, L, dim)
    cotangent = context.heads(1, heads, L, dim)
    classes, behind = image_in_the_middle(context, 1, L)

    def layout(name: str) -> BlockLayout:
        chosen = configs.config(name, context.on, dim, context.dtype)
        return BlockLayout.from_rule(
            None, L, L, causal=True, block_q=chosen.block_q, block_k=chosen.block_k, device=context.device
        )

    def set_up() -> Callable[[], Tensor]:
        if kernel == "classes":
            blocks = layout("classes")
            return lambda: class_attention(
                q, k, v, blocks, classes, 4, scale=dim**-0.5, transfer=VAR, edited=behind[:, None]
            )[0]
        blocks = layout("layout")
        if kernel == "layout":
            return lambda: layout_attention(q, k, v, blocks, scale=dim**-0.5)[0]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = layout_attention(*leaves, blocks, scale=dim**-0.5)[0]
        wanted = {"layout_dq": 0, "layout_dkv": 1}[kernel]
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)[wanted]

    return set_up


def tune(
    context: Context, kernel: str, dim: int, choices: list[Config] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows {"kernel", "dim", "config", "ms" or "why"}, the table's own configuration first."""
    set_up = problem(context, kernel, dim)
    own = configs.config(kernel, context.on, dim, context.dtype)
    expected = None
    for chosen in [own, *(c for c in (choices or candidates(kernel)) if c != own)]:
        line: dict[str, Any] = {"kernel": kernel, "dim": dim, "config": chosen, "own": chosen == own}
        try:
            with configs.forced(kernel, chosen) if chosen != own else contextlib.nullcontext():
                call = set_up()
                found = call().float()
                expected = found if expected is None else expected
                difference = float((found - expected).norm() / expected.norm())
                if not difference <= 1e-2:
                    raise ValueError(f"another result: {difference:.3g} of the norm")
                line["ms"] = context.clock.interleaved({"ours": call})["ours"].p50
        except Exception as error:
            line["why"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        yield line


def combinations() -> list[tuple[str, int, Config]]:
    """Everything that `tune` will compile."""
    return [(kernel, dim, c) for dim in (64, 128) for kernel in KERNELS for c in candidates(kernel)]


def compile_part(context: Context, part: int, of: int) -> None:
    """Run a share of the combinations once: Triton keeps what it compiles, and other processes find it."""
    for kernel, dim, chosen in combinations()[part::of]:
        with contextlib.suppress(Exception), configs.forced(kernel, chosen):
            problem(context, kernel, dim)()()


def best(lines: list[dict[str, Any]]) -> Config | None:
    """The fastest configuration if it is more than 2 % faster than the table's, else None."""
    timed = [line for line in lines if "ms" in line]
    own = next((line for line in timed if line["own"]), None)
    if not timed:
        return None
    fastest = min(timed, key=lambda line: line["ms"])
    return None if own is not None and fastest["ms"] > 0.98 * own["ms"] else fastest["config"]


if __name__ == "__main__":
    compile_part(Context(), int(sys.argv[1]), int(sys.argv[2]))
