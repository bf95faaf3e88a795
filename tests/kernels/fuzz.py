"""Random programs and random conversations of a span cache, each from a seed; how many comes from HAP_FUZZ.

``HAP_FUZZ=2500 pytest tests/kernels -k fuzz`` looks longer than the suite does; a failing seed fails alone.
"""

from __future__ import annotations

import os
import random
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.program import Blend, MassEdit, MassTransfer, Program, ScoreEdit
from hf_attn_patch.call.rules import BlockSinkWindow, Rule, SinkWindow, StridedShards

from .cases import classes, grid, make, opaque, shift_mass

LENGTHS = (1, 2, 15, 31, 63, 64, 65, 111, 129)


def seeds(usual: int, share: float = 1.0) -> range:
    """Seeds of one test: `usual` in the suite, `share` of HAP_FUZZ where somebody asked for more."""
    asked = os.environ.get("HAP_FUZZ")
    return range(usual if asked is None else max(1, int(int(asked) * share)))


def random_program(seed: int) -> Program:
    """A random float64 call with random edits; all that a `Program` can hold except dropout and ragged keys."""
    r = random.Random(seed)
    maybe = lambda p: r.random() < p
    Hkv, B = r.choice((1, 2, 3)), r.choice((1, 1, 2, 3))
    options: dict[str, Any] = dict(B=B, Hkv=Hkv, H=Hkv * r.choice((1, 2, 4)), D=r.choice((8, 16)), seed=seed)
    options["Dv"] = r.choice((options["D"], options["D"], 8, 24))
    L = r.choice(LENGTHS) if maybe(0.6) else r.randint(1, 140)
    kind = r.choice(("causal", "causal", "chunk", "static", "bidirectional", "cross", "grid"))
    rules: list[Rule] = []
    S = L
    if kind == "grid":
        size, prefix = (r.randint(3, 9), r.randint(3, 9)), r.choice((0, 0, 1, 4))
        L = S = prefix + size[0] * size[1]
        dilation = r.choice((1, 1, 2))
        window = tuple(r.randint(2, max(2, s // dilation)) for s in size)
        if all(w * dilation <= s for w, s in zip(window, size)):
            stride = r.randint(1, min(window))
            rules.append(grid(*size, window=window, stride=stride, dilation=dilation, prefix=prefix))
    elif kind in ("chunk", "cross"):
        S = L + r.randint(1, 100) if kind == "chunk" else r.randint(1, 140)
    elif kind == "static":
        options["q_offset"] = r.randint(0, 60)
        S = options["q_offset"] + L + r.randint(0, 90)
    causal = kind in ("causal", "chunk", "static")
    options |= dict(L=L, S=S, causal=causal)
    if kind != "grid":
        if maybe(0.2):
            options["window"] = r.randint(1, S + 5)
        if maybe(0.5):
            options |= _padding(r, B, S)
        if maybe(0.1):
            options["rule"] = opaque
        elif maybe(0.1) and kind in ("bidirectional", "cross"):
            options["given"] = _given(r, B, options["H"], L, S)
    program = make(**options)
    for rule in rules:
        program.restrict(rule)
    while kind != "grid" and maybe(0.4):
        rule, heads = _rule(r, program), None
        if maybe(0.3):
            heads = tuple(sorted(r.sample(range(program.num_heads), r.randint(1, program.num_heads))))
        program.restrict(rule, heads)
    _edits(r, program, own=causal or L == S)
    return program


def _padding(r: random.Random, B: int, S: int) -> dict[str, Any]:
    if r.random() < 0.2:
        hole = torch.rand(B, S, generator=torch.Generator().manual_seed(r.randint(0, 1 << 30))) < 0.8
        return dict(padding=hole)
    left, right = r.random() < 0.7, r.random() < 0.3
    pads = []
    for _ in range(B):
        a = r.randint(0, S) if left and r.random() < 0.7 else 0
        pads.append((a, r.randint(0, S - a) if right and r.random() < 0.7 else 0))
    return dict(pads=pads)


def _given(r: random.Random, B: int, H: int, L: int, S: int) -> Tensor:
    g = torch.Generator().manual_seed(r.randint(0, 1 << 30))
    shape = (r.choice((1, B)), r.choice((1, H)), L, S)
    seen = torch.rand(shape, generator=g) < 0.6
    if r.random() < 0.5:
        return seen
    return torch.randn(shape, generator=g, dtype=torch.float64).masked_fill(
        ~seen, torch.finfo(torch.float64).min
    )


def _rule(r: random.Random, program: Program) -> Rule:
    heads = r.choice([n for n in (1, program.num_kv_heads, program.num_heads)])
    many = lambda lo, hi: tuple(r.randint(lo, hi) for _ in range(heads))
    kind = r.choice(("sink window", "sink window", "blocks", "shards"))
    if kind == "sink window":
        wide = r.choice((9, 60, 200))
        one = heads == 1 and r.random() < 0.5
        return (
            SinkWindow(r.randint(0, 20), r.randint(1, wide))
            if one
            else SinkWindow(many(0, 20), many(1, wide))
        )
    if kind == "blocks":
        return BlockSinkWindow(many(0, 2), many(1, 4), r.choice((5, 16, 64)))
    stride = r.randint(1, 5)
    residues = tuple(tuple(sorted(r.sample(range(stride), r.randint(1, stride)))) for _ in range(heads))
    return StridedShards(residues, stride, r.randint(1, 3), r.choice((5, 16, 32)))


def _edits(r: random.Random, program: Program, own: bool) -> None:
    maybe = lambda p: r.random() < p
    g = torch.Generator().manual_seed(r.randint(0, 1 << 30))
    B, H, L = program.batch, program.num_heads, program.q_len
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    some_heads = lambda: tuple(sorted(r.sample(range(H), r.randint(1, H)))) if maybe(0.4) else None
    rows = lambda: torch.rand(r.choice((1, B)), L, generator=g) < 0.4 if maybe(0.4) else None
    amount = lambda: (
        r.uniform(-1, 1.5) if maybe(0.5) else rand(r.choice((1, B)), r.choice((1, H)), r.choice((1, L)), 1)
    )
    if maybe(0.5):
        program.classify(classes(program, seed=r.randint(0, 1 << 30)))
        key_class = lambda: r.choice((None, 0, 1, 2))
        while maybe(0.5):
            kind = r.choice(("add", "abs", "multiply", "mean_abs"))
            value = float("-inf") if kind == "add" and maybe(0.2) else amount()
            program.score_edits.append(ScoreEdit(kind, value, key_class(), rows(), some_heads()))  # type: ignore[arg-type]
        while maybe(0.3):
            weights: Any = shift_mass
            if maybe(0.5):
                weights = MassTransfer(
                    (0.3, 0.0, 0.5), give=1, within=(0, 1), limited=(0,), min_mass=0.1, max_share=0.7
                )
            program.mass_edits.append(MassEdit(weights, 3, rows(), some_heads()))
    if maybe(0.15):
        program.softcap = r.uniform(1, 30)
    if maybe(0.15):
        program.sink_logits = torch.randn(H, generator=g, dtype=torch.float64)
    if maybe(0.1):
        shape = (r.choice((1, B)), r.choice((1, H)), L, program.mask.kv_len)
        program.position_bias = torch.randn(shape, generator=g, dtype=torch.float64)
    if maybe(0.2):
        program.query_scale = 1 + rand(r.choice((1, B)), r.choice((1, H)), r.choice((1, L)), 1)
    if maybe(0.3):
        gate = rand(r.choice((1, B)), r.choice((1, L)), H)
        sparse = maybe(0.5)
        program.gate(gate * (rand(*gate.shape) < 0.5) if sparse else gate, sparse=sparse)
    while maybe(0.25):
        target: Any = r.choice(("value", "mean_value") if own else ("mean_value",))
        if maybe(0.3) and not any(rule.required_len() for rule in program.rules):
            target = SinkWindow(r.randint(0, 3), r.randint(1, 20))
        program.blends.append(Blend(target, abs(amount()) if maybe(0.5) else rand(B, H, L, 1), some_heads()))
