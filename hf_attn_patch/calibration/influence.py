"""Gradient influence of attention: how much the loss would change if one entry were masked.

Source: MoA, arXiv 2406.14909 (thu-nics/MoA e224fe3, READ and RAN). With A = softmax(scale Q K^T), g = dLoss/dA =
dO V^T and row i renormalised after entry (i, j) is gone, to first order::

    E_ij = A_ij (sum_n g_in A_in - g_ij) / (1 - A_ij)          a row with one key: E = -g A

Exact for a loss that is linear in A. Differs from the original code: the entry of a row that holds nearly all of its
probability is computed from the sum of the others (1 - A loses all digits there), grouped queries read their KV head
without copies, and no L x L tensor of the model is kept: scores are recomputed a band of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import captured
from .data import Sample


def influence_of(probability: Tensor, gradient: Tensor) -> Tensor:
    """E [..., S] from rows of probabilities (0 where masked) and their gradients [..., S]."""
    eps = torch.finfo(probability.dtype).eps
    mean = (gradient * probability).sum(-1, keepdim=True)
    effect = probability * (mean - gradient) / (1 - probability + eps)
    # the largest entry of each row, where 1 - A is a difference of nearly equal numbers
    top = probability.argmax(-1, keepdim=True)
    largest, own = probability.gather(-1, top), gradient.gather(-1, top)
    others = probability.scatter(-1, top, 0.0)
    rest = others.sum(-1, keepdim=True)
    exact = (
        largest
        * ((others * gradient).sum(-1, keepdim=True) - own * rest)
        / rest.clamp(min=torch.finfo(rest.dtype).tiny)
    )
    exact = torch.where(rest > 0, exact, -own * largest)
    return effect.scatter(-1, top, exact)


def influence(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, allowed: Tensor, scale: float
) -> Tensor:
    """E [B, H, L, S] of one attention call, dense (tests, small inputs).

    query, grad_output: [B, H, L, D]. key, value: [B, Hkv, S, D]. allowed: bool, broadcastable to [B, H, L, S].
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    score = (query @ key.mT * scale).masked_fill(~allowed, -torch.inf)
    probability = score.softmax(-1).nan_to_num(0.0)  # a row without keys has none
    return influence_of(probability, grad_output @ value.mT)


def block_influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    scale: float,
    block: int = 64,
    rows: int = 64,
    first: int = 0,
) -> Tensor:
    """Sums of |E| over blocks of a causal call without padding: float32 [H, nb, nb], nb = ceil(L / block).

    query, grad_output: [H, L, D]. key, value: [Hkv, L, D]. rows: computed at a time (a multiple of `block`).
    first: query rows before it count as 0.
    """
    heads, length, _ = query.shape
    group, blocks = heads // key.shape[0], -(-length // block)
    found = query.new_zeros(heads, blocks, blocks, dtype=torch.float32)
    for head in range(key.shape[0]):
        mine = slice(head * group, (head + 1) * group)
        for start in range(first // rows * rows, length, rows):
            stop = min(start + rows, length)
            score = query[mine, start:stop] @ key[head, :stop].mT * scale
            later = torch.arange(stop, device=query.device) > torch.arange(
                start, stop, device=query.device
            ).unsqueeze(-1)
            probability = score.masked_fill_(later, -torch.inf).softmax(-1)
            gradient = grad_output[mine, start:stop] @ value[head, :stop].mT
            effect = influence_of(probability, gradient).abs()
            if start < first:
                effect[:, : first - start] = 0
            wide, high = -stop % block, -(stop - start) % block
            tiles = F.pad(effect, (0, wide, 0, high)).unflatten(-1, (-1, block)).unflatten(1, (-1, block))
            at = start // block
            found[mine, at : at + tiles.shape[1], : tiles.shape[3]] = tiles.sum((2, 4)).float()
    return found


def profile(
    model: Any,
    samples: Sequence[Sample],
    block: int = 64,
    answer_rows: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean block influence over `samples` of one length class: float32 [layers, H, nb, nb].

    answer_rows: only entries of the query rows that say the answer. Entries of other rows change it through later
    layers; each by little, but there are so many that their absolute values drown the few that fetch something far
    away. SmolLM2-135M, a number at one tenth of 1024 tokens: the fourteen KV heads with most influence there all have a
    gate >= 0.85 in the training of `duo` if rows of the answer count, three of them if all rows do. The original takes
    all rows.

    The loss of a sample is the mean negative log-likelihood of its answer. Layers are worked off one at a time, so
    memory is that of one forward with gradients of activations. Samples shorter than the longest fill their corner.

    Raises:
        ValueError: NaN in the loss or in the gradients of a layer (named).
    """
    longest = max(len(s) for s in samples)
    blocks = -(-longest // block)
    total: Tensor | None = None
    for sample in samples:
        per_layer = _profile_one(model, sample, block, sample.start - 1 if answer_rows else 0)
        if total is None:
            total = torch.zeros(len(per_layer), per_layer[0].shape[0], blocks, blocks)
        for layer, found in enumerate(per_layer):
            n = found.shape[-1]
            total[layer, :, :n, :n] += found / len(samples)
        tick()
    assert total is not None
    return total


def _profile_one(model: Any, sample: Sample, block: int, first: int) -> list[Tensor]:
    calls: dict[int, tuple[Any, ...]] = {}

    def look(layer: int, program: Any, output: Tensor) -> None:
        output.retain_grad()
        calls[layer] = (
            program.query.detach(),
            program.key.detach(),
            program.value.detach(),
            program.scale,
            output,
        )

    with captured(model, look), torch.enable_grad():
        answer_loss(model, sample).backward()
    found = []
    for layer in sorted(calls):
        query, key, value, scale, output = calls.pop(layer)
        gradient = output.grad
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"the gradient of layer {layer} is not finite on {sample}; calibrate in float32 (--dtype float32)"
            )
        one = [t[0].float() for t in (query, key, value, gradient)]
        found.append(block_influence(one[0], one[1], one[2], one[3], scale, block, first=first).cpu())
    return found


def answer_loss(model: Any, sample: Sample) -> Tensor:
    """Mean negative log-likelihood of the answer, with a graph that reaches every attention call.

    Raises:
        ValueError: the loss is not finite.
    """
    ids = sample.ids[None].to(model.device)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(torch.is_grad_enabled())
    keep = len(sample) - sample.start + 1
    logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep).logits[0]
    logits = logits[-keep:-1]  # models that know no logits_to_keep give all
    loss = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, sample.start :]
    )
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of {sample} is {float(loss)}; calibrate in float32 (--dtype float32)")
    return loss
