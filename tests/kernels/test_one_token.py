"""The short way of one decoded token with edited scores is what `reference` says, and takes no call it does not fit."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program, ScoreEdit
from hf_attn_patch.kernels import attention, one_token

EDITS = {
    "abs of a class": [ScoreEdit("abs", 0.7, 1)],
    "two factors": [ScoreEdit("multiply", 1.4, 1), ScoreEdit("multiply", 0.6, 2)],
    "added on heads": [ScoreEdit("add", -2.0, 1, heads=(0, 3))],
    "rows": [ScoreEdit("abs", 0.5, 1, rows=torch.tensor([[True], [False]]))],
    "every key": [ScoreEdit("multiply", 1.2)],
    "one after the other": [
        ScoreEdit("multiply", -1.5, 1),
        ScoreEdit("abs", 0.4, 1),
        ScoreEdit("add", 1.0, 2),
    ],
}


def program(edits, length=37, kv=2, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(length + kv)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    mask = Mask(2, 1, length, q_offset=length - 1, causal=True, **more)
    made = Program(rand(2, 4, 1, 8), rand(2, kv, length, 8), rand(2, kv, length, 6), mask, 8**-0.5)
    made.classify(torch.randint(0, 3, (2, length), generator=g).to(torch.int8))
    made.score_edits = list(edits)
    return made


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 15, 257])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_one_token_is_what_the_reference_says(edits, length, kv):
    made = program(edits, length, kv)
    assert one_token.applies(made)
    for _ in range(2):  # the second layer takes what the first one made
        truth = attention(made, "reference").output
        assert (attention(made, "torch").output - truth).abs().max() <= 1e-12


def test_layers_of_one_forward_share_what_depends_on_classes_only():
    made = program(EDITS["two factors"])
    attention(made, "torch")
    kept = made.mask.__dict__["amounts of one token"]
    attention(made, "torch")
    assert len(kept) == 2 and made.mask.__dict__["amounts of one token"] is kept


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.score_edits.append(ScoreEdit("mean_abs", 0.5, 1)),
        lambda p: p.score_edits.append(ScoreEdit("add", float("-inf"), 1)),
        lambda p: p.score_edits.append(ScoreEdit("add", torch.ones(1, 4, 1, 1), 1)),
        lambda p: setattr(p, "softcap", 2.0),
        lambda p: setattr(p.mask, "window", 5),
        lambda p: p.score_edits.clear(),
    ],
)
def test_other_calls_take_the_general_way(change):
    made = program(EDITS["abs of a class"])
    change(made)
    assert not one_token.applies(made)
    truth = attention(made, "reference").output
    assert (attention(made, "torch").output - truth).abs().max() <= 1e-12


def test_padding_takes_the_general_way():
    padding = torch.arange(37) >= torch.tensor([[0], [4]])
    made = program(EDITS["abs of a class"], padding=padding)
    assert not one_token.applies(made)
    truth = attention(made, "reference").output
    assert (attention(made, "torch").output - truth).abs().max() <= 1e-12
