"""Small programs of every kind, by name: what an executor has to get right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Blend, MassEdit, Program, ScoreEdit
from hf_attn_patch.call.ragged import KVGroup, RaggedKV
from hf_attn_patch.call.rules import (
    BlockSinkWindow,
    BlockWindows,
    Disc,
    Neighborhood,
    SinkWindow,
    StridedShards,
)


def make(
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    L: int = 65,
    S: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    causal: bool = True,
    pads: list[tuple[int, int]] | None = None,
    q_offset: int | None = None,
    seed: int = 0,
    **mask: Any,
) -> Program:
    """A random float64 program. pads: per row of the batch (left, right) padding."""
    S = L if S is None else S
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    if pads is not None:
        columns = torch.arange(S)
        mask["padding"] = torch.stack([(columns >= a) & (columns < S - b) for a, b in pads])
    offset = (S - L if causal else 0) if q_offset is None else q_offset
    return Program(
        query=rand(B, H, L, D),
        key=rand(B, Hkv, S, D),
        value=rand(B, Hkv, S, D if Dv is None else Dv),
        mask=Mask(B, L, S, q_offset=offset, causal=causal, **mask),
        scale=D**-0.5,
    )


def edit(program: Program, **changes: Any) -> Program:
    for name, value in changes.items():
        setattr(program, name, value)
    return program


def classes(program: Program, count: int = 3, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (program.batch, program.mask.kv_len), generator=g, dtype=torch.int8)


def some_rows(program: Program, share: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.rand(program.batch, program.q_len, generator=g) < share


def opaque(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k) % 3 != 1) & (k <= q)


def grid(
    *size: int, window: Any, stride: int = 1, dilation: int = 1, causal: bool = False, prefix: int = 0
) -> Any:
    n = len(size)
    window = (window,) * n if isinstance(window, int) else window
    return Neighborhood(size, window, (stride,) * n, (dilation,) * n, (causal,) * n, prefix)


def shift_mass(masses: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Halve class 1 and give what is freed to class 2, where class 2 has mass (row sums stay 1)."""
    freed = 0.5 * masses[..., 1]
    factors = torch.ones_like(masses)
    has = masses[..., 2] > 0
    factors[..., 1] = torch.where(has, 0.5, 1.0)
    factors[..., 2] = torch.where(has, 1 + freed / masses[..., 2].clamp(min=1e-12), 1.0)
    return factors


def ragged(
    L: int, spans: list[int], seen: int = 70, pads: list[int] | None = None, window: bool = False
) -> Program:
    """A chunk of L queries over a cache whose KV heads keep different spans; slots in ring-buffer order."""
    program = make(B=2, H=6, Hkv=3, L=L, S=seen, pads=None if pads is None else [(p, 0) for p in pads])
    groups = []
    for head, span in enumerate(spans):
        columns = torch.cat([torch.arange(4), torch.arange(seen - span + 4, seen)]).roll(5)
        columns = torch.cat([columns, torch.full((3,), -1)]).expand(2, -1).contiguous()
        at = columns.clamp(min=0)[0]
        key, value = program.key[:, head : head + 1, at], program.value[:, head : head + 1, at]
        key, value = key.clone(), value.clone()
        key[:, :, -3:], value[:, :, -3:] = 50.0, 50.0  # what an empty slot holds must not matter
        groups.append(KVGroup((head,), key, value, columns))
    kv = RaggedKV(groups, seen)
    return edit(program, key=kv, value=kv)


def all_edits() -> dict[str, Callable[[Program], Program]]:
    """Every way to edit scores, masses and outputs."""
    amount = lambda p: torch.rand(p.batch, p.num_heads, p.q_len, 1, dtype=torch.float64)
    half = (1, 3)
    return {
        "add": lambda p: edit(p, score_edits=[ScoreEdit("add", 1.5, 1)]),
        "add tensor on heads": lambda p: edit(p, score_edits=[ScoreEdit("add", amount(p), 1, heads=half)]),
        "abs on rows": lambda p: edit(p, score_edits=[ScoreEdit("abs", 0.5, 1, some_rows(p))]),
        "multiply": lambda p: edit(p, score_edits=[ScoreEdit("multiply", 0.7)]),
        "mean_abs": lambda p: edit(p, score_edits=[ScoreEdit("mean_abs", 0.3, 2)]),
        "two score edits": lambda p: edit(
            p, score_edits=[ScoreEdit("add", 1.0, 1), ScoreEdit("abs", 0.5, 2)]
        ),
        "mass": lambda p: edit(p, mass_edits=[MassEdit(shift_mass, 3)]),
        "mass on rows and heads": lambda p: edit(p, mass_edits=[MassEdit(shift_mass, 3, some_rows(p), half)]),
        "mass on the last row": lambda p: edit(
            p, mass_edits=[MassEdit(shift_mass, 3, (torch.arange(p.q_len) == p.q_len - 1)[None])]
        ),
        "blend value": lambda p: edit(p, blends=[Blend("value", 0.3, half)]),
        "blend mean value": lambda p: edit(p, blends=[Blend("mean_value", amount(p))]),
        "blend rule": lambda p: edit(
            p, blends=[Blend(SinkWindow(2, 9), amount(p)), Blend(SinkWindow(0, 3), 0.3, half)]
        ),
        "head gate": lambda p: edit(
            p, head_gate=torch.rand(p.batch, p.q_len, p.num_heads, dtype=torch.float64)
        ),
        "head gate of heads": lambda p: edit(p, head_gate=torch.rand(p.num_heads, dtype=torch.float64)),
        "query scale": lambda p: edit(p, query_scale=1 + amount(p)),
        "query scale of rows": lambda p: edit(p, query_scale=1 + amount(p)[:1, :1]),
        "softcap": lambda p: edit(p, softcap=2.0),
        "sink logits": lambda p: edit(p, sink_logits=torch.randn(p.num_heads, dtype=torch.float64)),
        "position bias": lambda p: edit(
            p, position_bias=torch.randn(1, p.num_heads, p.q_len, p.mask.kv_len, dtype=torch.float64)
        ),
    }


def all_masks() -> dict[str, Callable[[], Program]]:
    """Every way to limit what is seen."""
    hole = torch.ones(2, 65, dtype=torch.bool)
    hole[0, 20:30] = hole[1, 0:3] = hole[1, 40] = False
    nothing = torch.ones(2, 65, dtype=torch.bool)
    nothing[1] = False
    dead = torch.rand(2, 1, 65, 65, generator=torch.Generator().manual_seed(3)) < 0.5
    dead[:, :, 7] = False
    given = torch.randn(1, 4, 65, 65, dtype=torch.float64).masked_fill(
        dead[:1], torch.finfo(torch.float32).min
    )
    return {
        "bidirectional": lambda: make(causal=False),
        "causal": lambda: make(),
        "sliding window": lambda: make(window=9),
        "window without causality": lambda: make(causal=False, window=9),
        "left padding": lambda: make(pads=[(0, 0), (17, 0)]),
        "left padding, bidirectional": lambda: make(causal=False, pads=[(0, 0), (17, 0)]),
        "right padding": lambda: make(pads=[(0, 11), (0, 0)]),
        "right padding, bidirectional": lambda: make(causal=False, pads=[(0, 11), (0, 40)]),
        "both paddings": lambda: make(pads=[(5, 11), (3, 0)]),
        "hole in padding": lambda: make(padding=hole),
        "hole in padding, bidirectional": lambda: make(causal=False, padding=hole),
        "a row of padding only": lambda: make(padding=nothing),
        "a row of padding only, bidirectional": lambda: make(causal=False, padding=nothing),
        "chunk with cache": lambda: make(L=33, S=97),
        "chunk with cache, padded": lambda: make(L=33, S=97, pads=[(70, 0), (5, 0)]),
        "chunk with cache and window": lambda: make(L=33, S=97, window=40, pads=[(0, 0), (5, 0)]),
        "sliding cache": lambda: make(L=5, S=40, q_offset=75, kv_offset=40, window=36),
        "static cache": lambda: make(L=33, S=97, q_offset=0),
        "static cache, padded": lambda: make(L=33, S=97, q_offset=0, pads=[(4, 64), (0, 64)]),
        "decode": lambda: make(L=1, S=97),
        "decode, padded": lambda: make(L=1, S=97, pads=[(30, 0), (0, 0)]),
        "cross attention": lambda: make(L=20, S=51, causal=False, pads=[(0, 9), (0, 0)]),
        "opaque rule": lambda: make(causal=False, rule=opaque),
        "opaque rule, padded": lambda: make(rule=opaque, pads=[(9, 0), (0, 3)]),
        "given bool": lambda: make(causal=False, given=dead),
        "given float": lambda: make(causal=False, given=given),
    }


def all_rules() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every rule, with the arguments of `make` it needs."""
    return {
        "sink window": (SinkWindow(4, 13), {}),
        "sink window, no sinks": (SinkWindow(0, 40), dict(L=257)),
        "sink window per KV head": (SinkWindow((4, 20), (13, 70)), dict(L=130)),
        "sink window per query head": (SinkWindow((4, 20, 0, 3), (13, 13, 5, 80)), dict(L=130)),
        "sink window beyond the sequence": (SinkWindow(500, 1000), dict(L=130)),
        "block sink window": (BlockSinkWindow((1,), (2,), 16), dict(L=130)),
        "block sink window per head": (BlockSinkWindow((1, 0), (2, 3), 16), dict(L=130)),
        "strided shards": (StridedShards(((0,), (3, 1)), 4, 2, 16), dict(L=230)),
        "strided shards, small blocks": (StridedShards(((1,), (0, 1, 2)), 3, 1, 5), dict(L=130)),
        "neighborhood 1d": (grid(70, window=9), dict(L=70, causal=False)),
        "neighborhood 1d strided": (grid(130, window=12, stride=4), dict(L=130, causal=False)),
        "neighborhood 1d dilated": (grid(67, window=5, dilation=3), dict(L=67, causal=False)),
        "neighborhood 1d causal": (grid(70, window=9, causal=True), dict(L=70, causal=False)),
        "neighborhood 1d prefix": (grid(140, window=9, prefix=3), dict(L=143, causal=False)),
        "neighborhood 2d": (grid(14, 14, window=5), dict(L=196, causal=False)),
        "neighborhood 2d blocked": (grid(16, 16, window=8, stride=8), dict(L=256, causal=False)),
        "neighborhood 2d prefix": (grid(9, 13, window=5, prefix=5), dict(L=122, causal=False)),
        "neighborhood 2d dilated": (grid(13, 10, window=3, dilation=3, prefix=1), dict(L=131, causal=False)),
        "neighborhood 2d uneven": (grid(7, 20, window=(3, 8), stride=2), dict(L=140, causal=False)),
        "neighborhood 3d": (grid(5, 6, 7, window=3), dict(L=210, causal=False)),
        "neighborhood 3d all": (
            grid(6, 6, 6, window=3, stride=2, dilation=2, causal=True),
            dict(L=216, causal=False),
        ),
        "windows": (BlockWindows.of((14, 14), (7, 7), (0, 0), (0, 0), 1), dict(L=197, causal=False)),
        "windows, shifted and cut": (
            BlockWindows.of((9, 13), (4, 5), (0, 0), (2, 3), 5),
            dict(L=122, causal=False),
        ),
        "windows with a halo": (
            BlockWindows.of((18, 17), (8, 8), (3, 1), (0, 0), 1),
            dict(L=307, causal=False),
        ),
        "small windows with a halo": (
            BlockWindows.of((5, 6, 7), (2, 3, 1), (1, 0, 2), (0, 1, 0), 0),
            dict(L=210, causal=False),
        ),
        "windows 1d": (BlockWindows.of((140,), (30,), (4,), (7,), 3), dict(L=143, causal=False)),
        "disc": (Disc((18, 17), 5.5, 2), dict(L=308, causal=False)),
        "disc 1d": (Disc((140,), 9.0, 3), dict(L=143, causal=False)),
        "ball": (Disc((5, 6, 7), 2.5), dict(L=210, causal=False)),
    }
