"""What is kept between forwards: layouts of any number of layers, bounded by bytes; one build for many lengths."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_attn_patch.call.rules import AllOf, OnHeads, SinkWindow
from hf_attn_patch.kernels import attention, plain
from hf_attn_patch.kernels.kept import kept, nbytes
from hf_attn_patch.kernels.layout import BlockLayout, layout_for
from hf_attn_patch.kernels.layout_rows import shared_len
from hf_attn_patch.kernels.plan import plan_of

from .budget import assert_within_budget
from .cases import all_rules, make
from .test_layout import wanted

RULES = all_rules()
LENGTHS = [1, 2, 15, 63, 65, 111, 257]
POSITIONAL = {n: rule for n, (rule, _) in RULES.items() if rule.required_len() is None}
POSITIONAL["no rule"] = None
POSITIONAL["on heads"] = OnHeads(SinkWindow(3, 20), (0, 2), 4)
POSITIONAL["all of"] = AllOf((SinkWindow(3, 90), SinkWindow((8, 0), (50, 120))))


@pytest.fixture(autouse=True)
def nothing_kept():
    plain.best_layout.cache_clear(), layout_for.cache_clear()


@pytest.mark.parametrize("layers", [60, 80, 200])
def test_a_model_with_a_rule_per_layer_builds_its_layouts_once(layers):
    def forward():
        for layer in range(layers):
            program = make(B=1, H=2, L=96, D=8)
            program.restrict(SinkWindow(4, 16 + layer))
            attention(program, "torch")
        return plain.best_layout.cache_info().misses

    assert forward() == layers
    assert forward() == layers, "layouts were built again"


@dataclass
class Held:
    tensors: list[Tensor]
    numbers: list[int]


def test_bytes_bound_what_is_kept_and_the_least_recently_used_goes_first():
    made = []

    @kept(1000)
    def make_tensor(name: str, size: int = 100) -> Tensor:
        made.append(name)
        return torch.zeros(size, dtype=torch.float32)

    make_tensor("a"), make_tensor("b"), make_tensor("a"), make_tensor("c")
    assert make_tensor.cache_info()[:3] == (1, 3, 800)
    make_tensor("a"), make_tensor("b")
    assert made == ["a", "b", "c", "b"]
    big = make_tensor("big", 10_000)
    assert make_tensor("big", 10_000) is big, "what does not fit at all is kept until the next one"
    make_tensor("a")
    assert make_tensor.cache_info().entries == 1
    make_tensor.cache_clear()
    assert make_tensor.cache_info()[:3] == (0, 0, 0)
    assert nbytes(Held([torch.zeros(3), torch.zeros(2)], [1, 2])) == 20 + 72


def test_what_grows_after_it_was_made_is_measured_again():
    @kept(10_000)
    def grows(n: int) -> dict[str, Tensor]:
        return {"own": torch.zeros(1)}

    for n in range(100):
        grows(n)["derived"] = torch.zeros(250)
    assert grows.cache_info().bytes <= 10_000 + 17 * 1004, "never more than what came since the last look"
    grows(100)
    assert grows.cache_info().bytes <= 10_000


def test_plans_and_masks_count_as_bytes_of_their_layout():
    program = make(B=1, L=300)
    program.restrict(SinkWindow(4, 40))
    attention(program, "torch")
    info = plain.best_layout.cache_info()
    layout = plain.best_layout(SinkWindow(4, 40), 300, 300, 0, True, None)
    assert info.bytes == nbytes(layout) > nbytes(plan_of(layout)) > nbytes(layout.bits)


def test_threads_get_the_same_object():
    calls = []

    @kept(1 << 20)
    def slow(n: int) -> Tensor:
        calls.append(n)
        time.sleep(0.01)
        return torch.zeros(n + 1)

    got: list[list[Tensor]] = [[] for _ in range(8)]
    threads = [
        threading.Thread(target=lambda own=own: own.extend(slow(i % 5) for i in range(50))) for own in got
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(a is b for own in got for a, b in zip(own, got[0]))
    assert slow.cache_info().entries == 5 and slow.cache_info().hits + slow.cache_info().misses == 400


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (32, 32), (64, 128)], ids=str)
@pytest.mark.parametrize("name", POSITIONAL)
def test_a_shared_layout_shows_what_the_layout_of_its_length_shows(name, blocks):
    rule = POSITIONAL[name]
    heads = 1 if rule is None else rule.heads
    for L in LENGTHS:
        for offset, window in [(0, None), (37, None), (0, 50), (130, 90)]:
            S = offset + L
            got = layout_for(rule, L, S, offset, True, window, *blocks)
            exact = BlockLayout.from_rule(rule, L, S, offset, True, window, *blocks)
            assert torch.equal(got.dense(), exact.dense()), (L, offset, window)
            if rule is not None:
                assert torch.equal(got.dense()[0], wanted(rule, L, S, offset, True, window))
            assert got.visible_count() == exact.visible_count()
            assert (got.q_len, got.kv_len, got.heads) == (L, S, heads)
            assert torch.equal(got.transpose().dense(), exact.transpose().dense())
            assert torch.equal(got.picture() > 0, exact.picture() > 0)


@pytest.mark.parametrize("name", [n for n, (rule, _) in RULES.items() if rule.required_len() is not None])
def test_rules_of_a_grid_are_built_for_their_length(name):
    rule, arguments = RULES[name]
    n = rule.required_len()
    assert shared_len(rule, n, n, 0, True) == shared_len(rule, n, n, 0, False) == n
    assert torch.equal(layout_for(rule, n, n).dense(), BlockLayout.from_rule(rule, n, n).dense())


def test_lengths_of_one_step_share_one_build(monkeypatch):
    built = []
    original = BlockLayout.from_rule.__func__
    monkeypatch.setattr(
        BlockLayout, "from_rule", classmethod(lambda cls, *a, **k: built.append(a) or original(cls, *a, **k))
    )
    for L in range(641, 705):
        layout_for(SinkWindow((4, 9), (64, 100)), L, L, causal=True)
    assert len(built) == 1
    for L in range(2, 2049):
        layout_for(SinkWindow(4, 64), L, L, causal=True)
    assert len(built) < 1 + 32, "steps of an eighth of a power of two"


def test_cutting_costs_a_fraction_of_building():
    """CPU seconds of the best try."""
    rule, L = SinkWindow((64, 64, 64), (64, 192, 512)), 701

    def best(f, tries=20):
        seconds = []
        for i in range(tries):
            begin = time.thread_time()
            f(i)
            seconds.append(time.thread_time() - begin)
        return min(seconds)

    layout_for(rule, 704, 704, causal=True)
    cut = best(lambda i: layout_for(rule, L - i, L - i, causal=True))
    built = best(lambda i: BlockLayout.from_rule(rule, L - i, L - i, causal=True))
    assert cut < built / 4, (cut, built)


@pytest.mark.parametrize("L", LENGTHS)
def test_rows_of_different_lengths_in_a_batch(L):
    """Left and right padding: rows of a batch are texts of other lengths, their layouts are cut from shared ones."""
    for rule in (SinkWindow(4, 30), SinkWindow((2, 4), (20, 50))):
        program = make(B=3, L=L + 40, pads=[(0, 0), (40, 0), (3, 17)])
        program.restrict(rule)
        assert_within_budget(program, gradients=True)
