"""Memory grows with the length, not with its square."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.program import MassEdit
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention

from .cases import classes, make, shift_mass
from .test_layout import LargestTensor


def largest(L: int, gradients: bool = False, edited: bool = False, **arguments) -> int:
    """Elements of the largest tensor made while a left-padded batch of two runs."""
    program = make(H=2, Hkv=1, L=L, D=16, pads=[(0, 0), (L // 3, 0)], **arguments)
    for name in ("query", "key", "value"):
        setattr(program, name, getattr(program, name).float().requires_grad_(gradients))
    program.restrict(SinkWindow(64, 256))
    if edited:
        program.classify(classes(program))
        program.mass_edits.append(MassEdit(shift_mass, 3))
    with LargestTensor() as watch:
        out = attention(program, "torch").output
        if gradients:
            out.sum().backward()
    return watch.numel


@pytest.mark.parametrize(
    "case", [{}, {"gradients": True}, {"window": 300}], ids=["forward", "backward", "window"]
)
def test_a_left_padded_batch_of_32k_tokens_stays_linear(case):
    small, large = largest(8192, **case), largest(32768, **case)
    assert large <= 4.2 * small
    assert large <= 3 * 2 * 2 * 32768 * 16, "more than a few times the queries"


def test_edited_attention_stays_linear():
    assert largest(8192, edited=True) <= 1.1 * max(2 * 2 * 8192 * 16, 3 * (1 << 21))


def test_holes_in_padding_stay_linear():
    program = make(H=2, Hkv=1, L=8192, D=16)
    program.mask.padding = torch.rand(2, 8192, generator=torch.Generator().manual_seed(0)) < 0.9
    program.restrict(SinkWindow(64, 256))
    with LargestTensor() as watch:
        attention(program, "torch")
    assert watch.numel < 8192 * 8192 / 16
