"""Training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_attn_patch as hap

from .base import Bench, Pairs, setting


def gradients(bench: Bench, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(4)
    output = model(**inputs, **({"use_cache": False} if bench.decoder else {}))[0]
    loss = output.square().mean()
    if not bench.dense:
        loss = loss + sum(hap.aux_losses(model, weighted=True).values())
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def checkpointing(bench: Bench, reentrant: bool) -> Pairs:
    model, inputs = bench.fresh(train=True), bench.inputs(left_pad=0)
    other = bench.inputs(batch=1, length=13, seed=3)
    with bench.patched(model):
        want = [gradients(bench, model, x) for x in (inputs, other)]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = [gradients(bench, model, x) for x in (inputs, other)]
    for number, (a, b) in enumerate(zip(got, want)):
        yield f"step {number}: what has gradients", sorted(a), sorted(b)
        for name in b:
            yield f"step {number}: {name}", a[name], b[name]


@setting("gradient checkpointing", "use_reentrant=False; gradients of a step without")
def checkpointing_new(bench: Bench) -> Pairs:
    yield from checkpointing(bench, False)


@setting("gradient checkpointing, reentrant", "use_reentrant=True; gradients of a step without")
def checkpointing_old(bench: Bench) -> Pairs:
    yield from checkpointing(bench, True)


@setting("padded training batch", "gradients of a left-padded batch; the sum of its rows alone", text=True)
def padded(bench: Bench) -> Pairs:
    from ..conformance.families import row_of

    model, pads = bench.fresh(train=True), [4, 0]
    inputs = bench.inputs(left_pad=pads)

    def step(x: dict[str, Any], pad: list[int]) -> dict[str, Tensor]:
        torch.manual_seed(4)
        output = model(**x, use_cache=False)[0]
        loss = sum(output[row, skip:].square().sum() for row, skip in enumerate(pad))
        names, weights = zip(*[(n, p) for n, p in model.named_parameters() if "attn_patch" not in n])
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return {n: g for n, g in zip(names, found) if g is not None}

    with bench.patched(model):
        got = step(inputs, pads)
        rows = [step(row_of(inputs, row, 2, pad), [0]) for row, pad in enumerate(pads)]
    for name, value in got.items():
        yield name, value, rows[0][name] + rows[1][name]
