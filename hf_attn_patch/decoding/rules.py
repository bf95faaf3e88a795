"""What two streams of logits become: the formulas of contrastive decoding, as pure functions on [rows, vocabulary]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def implausible(main: Tensor, beta: float) -> Tensor:
    """bool [..., V]: tokens with ``main < log(beta) + max main``, which no contrast may make likely (beta 0: none).

    Shared by VCD, ICD, SID, AGLA, M3ID and PAI (adaptive plausibility, from contrastive decoding, arXiv 2210.15097).
    """
    if beta == 0:
        return torch.zeros_like(main, dtype=torch.bool)
    return main < math.log(beta) + main.amax(-1, keepdim=True)


def cut(logits: Tensor, main: Tensor, beta: float) -> Tensor:
    """`logits` with -inf at the tokens that are `implausible` for `main`; all [..., V]."""
    return logits.masked_fill(implausible(main, beta), float("-inf"))


def contrast(main: Tensor, other: Tensor, alpha: float) -> Tensor:
    """``(1 + alpha) l - alpha l'`` on raw logits [..., V]: VCD, ICD, SID (READ and RAN)."""
    return (1 + alpha) * main - alpha * other


def image_prior(main: Tensor, blind: Tensor, lamda: float, step: float) -> Tensor:
    """M3ID: ``l + (1 - g) / g (l - u)``, g = exp(-lamda step), l and u the log-softmax of `main` and `blind` [..., V].

    step: 1 for the first generated token (LijunZhang01/Octopus avisc_utils/avisc_sample.py, READ and RAN).
    """
    l, u = main.log_softmax(-1), blind.log_softmax(-1)
    kept = math.exp(-lamda * step)
    return l + (1 - kept) / kept * (l - u)


def guided(main: Tensor, blind: Tensor, gamma: float) -> Tensor:
    """PAI: ``gamma (l - u) + u`` with l and u the log-softmax of `main` and `blind` [..., V] (READ and RAN)."""
    l, u = main.log_softmax(-1), blind.log_softmax(-1)
    return gamma * (l - u) + u


def assembled(main: Tensor, local: Tensor, alpha: float) -> Tensor:
    """AGLA: ``l + alpha l'`` on raw logits [..., V]; a sum, so the result is 1 + alpha times as peaked (READ, RAN)."""
    return main + alpha * local
