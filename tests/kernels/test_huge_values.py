"""Sizes far beyond the text cost what the text costs, and overflow nowhere."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.rules import BlockSinkWindow, SinkWindow, StridedShards
from hf_attn_patch.kernels import attention, why_not
from hf_attn_patch.kernels.layout import BlockLayout
from hf_attn_patch.patches.sparse.block_topk import BlockTopK, MoBA, Quest, XAttention

from .budget import assert_within_budget, cast, device_of
from .cases import make
from .test_layout import LargestTensor, wanted

HUGE = 1 << 31
RULES = {
    "sinks": SinkWindow(HUGE, 4),
    "window": SinkWindow(4, HUGE),
    "both, per head": SinkWindow((HUGE, 3), (5, HUGE)),
    "larger than int64 likes to be multiplied": SinkWindow(1 << 40, 1 << 40),
    "blocks": BlockSinkWindow((1,), (2,), HUGE),
    "many blocks": BlockSinkWindow((HUGE,), (HUGE,), 64),
    "shards": StridedShards(((0,), (3, HUGE - 1)), HUGE, 1, 16),
    "long shards": StridedShards(((0,), (1,)), 2, 1, HUGE),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_allocate_by_the_text(name):
    rule, L = RULES[name], 200
    with LargestTensor() as watch:
        layout = BlockLayout.from_rule(rule, L, L, causal=True)
    assert watch.numel < 1 << 20
    assert torch.equal(layout.dense()[0], wanted(rule, L, L, causal=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("L, S", [(100, 100), (3, 90), (1, 90)])
@pytest.mark.parametrize("name", RULES)
def test_rules_in_every_executor(name, L, S, impl):
    program = make(L=L, S=S, pads=[(7, 0), (0, 0)])
    program.restrict(RULES[name])
    if (reason := why_not(impl, cast(program, torch.float32, device_of(impl)))) is not None:
        pytest.skip(reason)
    assert_within_budget(program, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("L, S", [(65, 65), (1, 65)])
def test_a_window_of_the_model(L, S, impl):
    pytest.importorskip("triton")
    assert_within_budget(make(L=L, S=S, window=HUGE), impl)


class Call:
    heads, context = None, None


METHODS = {
    "block_topk": BlockTopK(block=HUGE, topk=1),
    "minmax": BlockTopK(block=HUGE, topk=1, score="minmax", sinks=HUGE, recent=HUGE),
    "threshold": BlockTopK(block=HUGE, topk=0),
    "antidiagonal": BlockTopK(block=HUGE, score="antidiagonal", stride=1 << 16),
    "one stride": XAttention(block=HUGE, stride=HUGE),
    "moba": MoBA(block=HUGE),
    "quest": Quest(block=HUGE, prompt="sparse"),
    "many blocks": BlockTopK(block=16, topk=HUGE, sinks=HUGE, recent=HUGE),
}


@pytest.mark.parametrize(
    "mask", [{}, dict(pads=[(30, 0), (0, 0)]), dict(L=5, S=77), dict(L=1, S=77)], ids=str
)
@pytest.mark.parametrize("name", METHODS)
def test_a_block_longer_than_the_text_is_dense_and_costs_no_more(name, mask):
    program = make(**{"L": 77, **mask})
    dense = attention(make(**{"L": 77, **mask}), "reference").output
    with LargestTensor() as watch:
        METHODS[name].edit(program, Call())
    assert watch.numel <= 2 * 4 * 77 * 77
    torch.testing.assert_close(attention(program, "torch").output, dense)
    assert name == "many blocks" or not program.rules, "the model's own dense attention can run"


def test_a_block_of_all_but_one_token_still_chooses():
    program = make(L=77)
    BlockTopK(block=76, topk=1, sinks=0).edit(program, Call())
    assert program.rules


def test_a_cache_that_dropped_tokens_is_refused_all_the_same():
    from hf_attn_patch.errors import CacheError

    program = make(L=5, S=40, q_offset=75, kv_offset=40)
    with pytest.raises(CacheError):
        BlockTopK(block=HUGE).edit(program, Call())
