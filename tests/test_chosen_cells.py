"""Cells of a token grid chosen for a call (`ChosenCells`, its executor), tiles, and additions to the output."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import ChosenCells
from hf_attn_patch.call.token_permute import Tiles
from hf_attn_patch.install import stack
from hf_attn_patch.kernels import attention, chosen_cells

pytestmark = pytest.mark.filterwarnings("ignore:.*saves 0 %")


@pytest.fixture
def programs(monkeypatch):
    """Every program that runs, with its output."""
    seen, original = [], stack.attention
    monkeypatch.setattr(stack, "attention", lambda p, i: (seen.append((p, r := original(p, i))), r)[1])
    return seen


def qkv(length, heads=4, kv_heads=4, dim=8, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, dim, generator=draw).double() for h in (heads, kv_heads, kv_heads)]


def call_on(rule, kv_heads=4):
    length = rule.required_len()
    q, k, v = (x.requires_grad_() for x in qkv(length, kv_heads=kv_heads))
    return Program(q, k, v, Mask(2, length, length), 0.3, rules=[rule])


# -- the rule and its executor ----------------------------------------------------------------------------------------


def random_rule(grid, tile, prefix, heads, density, per_query, seed=0):
    cell = Tiles(grid, tile).cell()
    cells = int(cell.max()) + 1
    rows = len(cell) if per_query else cells
    chosen = torch.rand(2, heads, rows, cells, generator=torch.Generator().manual_seed(seed)) < density
    return ChosenCells(chosen, torch.arange(len(cell)) if per_query else cell, cell, prefix)


@pytest.mark.parametrize("per_query", [False, True], ids=["per cell", "per query"])
@pytest.mark.parametrize("grid, tile, prefix, heads, kv_heads, density", [
    ((8, 8), (2, 2), 1, 1, 4, 0.2), ((9, 10), (4, 3), 0, 4, 4, 0.2), ((9, 10), (2, 2), 5, 4, 2, 0.1),
    ((3, 4, 5), (2, 2, 2), 1, 1, 1, 0.3), ((40,), (7,), 2, 2, 4, 0.9), ((9, 10), (1, 1), 1, 4, 2, 0.2),
])  # fmt: skip
def test_gathered_cells_give_what_the_mask_gives_and_its_gradients(
    grid, tile, prefix, heads, kv_heads, density, per_query
):
    outputs, grads = [], []
    for impl in ("reference", "torch"):
        program = call_on(random_rule(grid, tile, prefix, heads, density, per_query), kv_heads)
        out = attention(program, impl).output
        out.square().sum().backward()
        outputs.append(out.detach())
        grads.append([x.grad for x in (program.query, program.key, program.value)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-11)


def test_a_row_that_chose_nothing_is_zero():
    rule = random_rule((6, 6), (2, 2), 0, 1, 0.3, per_query=False)
    rule.chosen[0, 0, 4] = False
    rows = rule.q_cell == 4
    for impl in ("reference", "torch"):
        out = attention(call_on(rule), impl).output
        assert (out[0][:, rows] == 0).all() and (out[1][:, rows] != 0).any() and torch.isfinite(out).all()


def test_only_chosen_cells_are_read(monkeypatch):
    # keys outside the chosen cells are NaN: a mask over all keys would spread them
    rule = random_rule((8, 8), (2, 2), 1, 1, 0.2, per_query=False)
    rule.chosen[:] = rule.chosen[:1, :, :1]
    program = call_on(rule)
    expected = attention(program, "reference").output
    unread = torch.cat([torch.zeros(1, dtype=torch.bool), ~rule.chosen[0, 0, 0][rule.k_cell]])
    assert unread.sum() > 20
    with torch.no_grad():
        dense_row = attention(program, "torch").output[:, :, :1]
        program.key[:, :, unread] = torch.nan
        program.value[:, :, unread] = torch.nan
    monkeypatch.setattr(
        chosen_cells, "run_rows", lambda program, rows: dense_row
    )  # the prefix row reads everything
    torch.testing.assert_close(attention(program, "torch").output, expected, rtol=0, atol=1e-12)


def test_batches_of_runs_are_bounded_and_do_not_matter(monkeypatch):
    program = call_on(random_rule((9, 10), (2, 3), 2, 4, 0.15, per_query=True))
    whole, sizes, original = attention(program, "torch").output, [], chosen_cells._gathered
    monkeypatch.setattr(chosen_cells, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(chosen_cells, "_gathered", lambda *a: (sizes.append(len(a[3])), original(*a))[1])
    torch.testing.assert_close(attention(program, "torch").output, whole, rtol=0, atol=1e-12)
    assert len(sizes) > 3 and sum(sizes) == 20 and max(sizes) < 10


def test_triton_refuses_cells_and_says_why():
    from hf_attn_patch.kernels.triton import geometry

    program = call_on(random_rule((4, 4), (2, 2), 0, 1, 0.5, per_query=False))
    assert "kernels take blocks of consecutive tokens" in geometry.why_not(program)


def test_share_counts_pairs_of_tokens():
    rule = random_rule((9, 10), (4, 3), 0, 4, 0.3, per_query=False)
    tokens = torch.arange(90)
    heads = torch.arange(4).reshape(1, 4, 1, 1)
    seen = rule.visible(heads, tokens.reshape(1, 1, -1, 1), tokens.reshape(1, 1, 1, -1))
    assert float(rule.share()) == pytest.approx(float(seen.double().mean()), abs=1e-12)


def test_an_addition_is_added_before_the_gates():
    rule = random_rule((4, 4), (2, 2), 0, 1, 0.5, per_query=False)
    plain, term = attention(call_on(rule)).output, qkv(16, seed=5)[0]
    program = call_on(rule)
    program.add(term, heads=(1, 2))
    program.add(term, heads=(2,))
    program.gate(torch.tensor([1.0, 0.5, 2.0, 1.0]).double())
    program.gate_by_output(lambda p, out: torch.full((1, 1, 4), 3.0))
    factor = torch.tensor([0.0, 1.0, 2.0, 0.0]).double().reshape(1, 4, 1, 1)
    gate = torch.tensor([1.0, 0.5, 2.0, 1.0]).double().reshape(1, 4, 1, 1)
    for impl in ("reference", "torch"):
        torch.testing.assert_close(attention(program, impl).output, 3 * gate * (plain + factor * term))


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, tile, dilation", [
    ((8, 8), (4, 4), None), ((7, 10), (4, 2), (1, 2)), ((3, 5, 7), (2, 2, 3), (1, 1, 2)), ((11,), (4,), (3,)),
])  # fmt: skip
def test_permute_and_restore_are_inverse_and_holes_are_zero(grid, tile, dilation):
    tiles = Tiles(grid, tile, dilation)
    x = torch.rand(2, tiles.tokens, 3) + 1
    there = tiles.permute(x)
    assert there.shape[1] == tiles.order().numel() and there.shape[1] % tiles.per_tile == 0
    assert torch.equal(tiles.restore(there), x)
    assert (there[:, tiles.order().flatten() < 0] == 0).all() and (there != 0).sum() == x.numel()
    assert torch.equal(tiles.permute(x.mT, -1), there.mT)


def test_tiles_of_a_cell_are_a_box_of_the_grid():
    cell = Tiles((9, 10), (4, 3)).cell().reshape(9, 10)
    for number in range(int(cell.max()) + 1):
        y, x = (cell == number).nonzero().T
        assert (y.max() - y.min() + 1) * (x.max() - x.min() + 1) == len(y) <= 12


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"tile \(2,\).*grid \(4, 4\)"):
        Tiles((4, 4), (2,))
    with pytest.raises(ValueError, match="15 tokens along dim -2 are no grid"):
        Tiles((4, 4), (2, 2)).permute(torch.zeros(1, 15, 2))
