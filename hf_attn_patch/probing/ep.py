"""`ep`: efficient probing, many queries that look at raw tokens and read a slice of the values each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pool import Pool, learned


class EfficientProbing(Pool):
    """``y = [sum_n a_1n V_n[slice 1], ..., sum_n a_Qn V_n[slice Q]]``, ``a_q = softmax_n(u_q . x_n C^-1/2)``.

    Source: Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency, arXiv 2506.10178;
    billpsomas/efficient-probing b8f4fb8 (READ; golden vectors RAN).

    Shapes: x [B, N, C], queries u [Q, C], V = x W_v [B, N, C / reduce], cut into Q slices; y [B, C / reduce]; maps
    [B, Q, N]. Keys and queries have no projection: C^2 / reduce + Q C parameters.

    Differs from the original code: nothing but the initial values of W_v (torch's default for a linear layer there
    too). The README of that code describes identity values and a mean over queries; the code does the above.

    Args:
        queries: Q; C must be a multiple of Q * reduce. reduce: d_out of the paper.
    """

    def __init__(self, width: int, queries: int = 4, reduce: int = 1):
        if queries < 1 or reduce < 1 or width % (queries * reduce):
            fits = [q for q in range(1, width + 1) if reduce >= 1 and width % (q * reduce) == 0][:8]
            raise ValueError(
                f"ep: {queries} queries and reduce={reduce} cut features of width {width} into unequal slices; "
                f"queries that fit: {', '.join(map(str, fits)) or 'none for this reduce'}, …"
            )
        super().__init__(width // reduce)
        self.queries = learned(queries, width)
        self.value = nn.Linear(width, width // reduce, bias=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = (self.queries @ x.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
        slices = self.value(x).unflatten(-1, (len(self.queries), -1))
        return torch.einsum("bqn,bnqd->bqd", maps, slices).flatten(1), maps
