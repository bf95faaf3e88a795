"""Calibration of `moa`: influence, rules, losses and plans against the original code's numbers, and the whole way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_attn_patch.calibration import plan_search
from hf_attn_patch.calibration.calibrator import CalibrationError
from hf_attn_patch.calibration.influence import block_influence, influence, influence_of
from hf_attn_patch.calibration.moa import MoaCalibrator, scaled
from hf_attn_patch.errors import ConfigError
from hf_attn_patch.patches.sparse.moa import MoA
from tests.test_golden import read


def test_influence_is_that_of_the_original():
    case = read("moa__influence")[0]
    q, k, v, grad = (case[f"in.{name}"].double() for name in ("q", "k", "v", "grad_out"))
    allowed = case["in.attend"]
    got = influence(q, k, v, grad, allowed, q.shape[-1] ** -0.5)
    want = case["out.E"].double()
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()  # tolerance of the file
    blocks = block_influence(*(t[0] for t in (q, k, v, grad)), q.shape[-1] ** -0.5, block=8, rows=16)
    want = case["out.E_abs_block"][0].double()
    assert (blocks - want).abs().max() <= 1e-4 * want.abs().max()


def test_influence_is_the_true_change_of_a_loss_that_is_linear_in_the_probabilities():
    gen = torch.Generator().manual_seed(0)
    score, gradient = torch.randn(2, 9, 9, generator=gen, dtype=torch.float64).unbind(0)
    score = score.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    p = score.softmax(-1)
    effect = influence_of(p, gradient)
    for i, j in itertools.combinations(range(9), 2):
        i, j = j, i  # j < i: entry (i, j) is masked, the row renormalised
        without = p[i].clone()
        without[j] = 0
        change = ((without / without.sum() - p[i]) * gradient[i]).sum()
        torch.testing.assert_close(effect[i, j], change)


def test_influence_of_a_row_with_nearly_all_mass_on_one_key_keeps_its_digits():
    score = torch.tensor([[0.0, 17.0, 1.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    want = influence_of(score.softmax(-1), gradient)
    got = influence_of(score.float().softmax(-1), gradient.float()).double()
    naive = score.float().softmax(-1)
    naive = (
        naive * ((naive * gradient.float()).sum(-1, keepdim=True) - gradient.float()) / (1 - naive + 1.2e-7)
    )
    assert (got - want).abs().max() < 1e-6 < (naive.double() - want).abs().max()


@pytest.mark.parametrize("length, rows", [(63, 16), (65, 16), (111, 32), (16, 64)])
def test_block_influence_of_grouped_heads_and_odd_lengths(length, rows):
    gen = torch.Generator().manual_seed(length)
    q, grad = torch.randn(2, 4, length, 8, generator=gen, dtype=torch.float64).unbind(0)
    k, v = torch.randn(2, 2, length, 8, generator=gen, dtype=torch.float64).unbind(0)
    got = block_influence(q, k, v, grad, 8**-0.5, block=16, rows=rows)
    causal = torch.ones(length, length).tril().bool()
    dense = influence(q[None], k[None], v[None], grad[None], causal, 8**-0.5)[0].abs()
    blocks = -(-length // 16)
    want = torch.zeros(4, blocks, blocks, dtype=torch.float64)
    for m, n in itertools.product(range(blocks), repeat=2):
        want[:, m, n] = dense[:, m * 16 : m * 16 + 16, n * 16 : n * 16 + 16].sum((1, 2))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    first = length // 3
    late = block_influence(q, k, v, grad, 8**-0.5, block=16, rows=rows, first=first)
    dense[:, :first] = 0
    for m, n in itertools.product(range(blocks), repeat=2):
        want[:, m, n] = dense[:, m * 16 : m * 16 + 16, n * 16 : n * 16 + 16].sum((1, 2))
    torch.testing.assert_close(late.double(), want, rtol=1e-5, atol=1e-5)


def test_the_search_space_is_that_of_the_original():
    case = read("moa__search_space_default")[0]
    got = plan_search.search_space(
        case["in.alpha_grid"].tolist(),
        case["in.beta_grid"].tolist(),
        shortest=2048,
        longest=8192,
        extend=16384,
        lengths=case["in.lengths"].tolist(),
    )
    assert len(got) == 48
    assert np.array_equal(got.alphas, case["out.alpha"]) and np.array_equal(got.betas, case["out.beta"])
    assert np.array_equal(got.local, case["out.n_local_blocks"])
    np.testing.assert_allclose(got.density, case["out.kv_density"], rtol=0, atol=1e-12)


def test_the_loss_of_a_rule_is_that_of_the_original():
    case = read("moa__delta_rules")[0]
    rules = plan_search.search_space(
        [-512, -256, 0, 256, 512],
        [0, 0.25, 0.5, 0.75, 1.0],
        shortest=1024,
        longest=1024,
        extend=2048,
        lengths=[1024],
    )
    assert np.array_equal(rules.alphas, case["out.alpha"]) and np.array_equal(rules.betas, case["out.beta"])
    got = plan_search.losses(case["in.E_abs_block"].numpy().astype(float), rules.local[:, 0])
    np.testing.assert_allclose(got, case["out.delta_1024"].numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        1024 * rules.density[None, :, 0].repeat(5, 0), case["out.latency_1024"].numpy()
    )


def golden_search() -> tuple[dict, plan_search.Search]:
    case = read("moa__plan_search_small")[0]
    loss = case["in.accuracy_loss"].numpy().astype(float).reshape(3, 2, 3, 5)
    cost = case["in.latency"].numpy().astype(float).reshape(4, 2, 3, 5)
    bound = case["in.upper"].numpy().astype(float) / 6
    return case, plan_search.Search(loss, cost, bound, case["in.lower"].numpy().astype(float) / 6)


def test_plans_reach_the_optimum_keep_the_bounds_and_beat_or_match_the_originals():
    case, search = golden_search()
    for objective, best in enumerate(case["out.single_objective_optimum"].tolist()):
        assert search.solve(objective).objectives[objective] == pytest.approx(best, abs=1e-4)
    front = search.pareto()
    for plan in front:
        density = search.densities(plan)
        assert (density <= search.upper + 1e-6).all() and (density >= search.lower - 1e-6).all()
        assert all(len(set(row)) <= 2 for row in plan.rules)
    feasible = [
        search.plan(np.array(choice).reshape(2, 3))
        for choice in itertools.product(range(5), repeat=6)
        if all(len(set(part)) <= 2 for part in (choice[:3], choice[3:]))
    ]
    feasible = [
        p
        for p in feasible
        if (search.densities(p) <= search.upper + 1e-6).all()
        and (search.densities(p) >= search.lower - 1e-6).all()
    ]
    assert len(feasible) == int(case["out.num_feasible"])
    true_front = {tuple(np.round(p.objectives, 6)) for p in plan_search.undominated(feasible)}
    assert {tuple(np.round(p.objectives, 6)) for p in front} <= true_front


def test_bounds_that_no_rules_meet_name_what_can_be_met():
    case, search = golden_search()
    impossible = plan_search.Search(search.loss, search.cost, [0.05] * 4, [0.045] * 4)
    with pytest.raises(CalibrationError, match=r"asked 0.045 to 0.050, the rules reach 0\.\d+ to 0\.\d+"):
        impossible.pareto()


def test_a_larger_window_never_loses_more():
    gen = np.random.default_rng(0)
    loss = plan_search.losses(np.tril(gen.random((3, 12, 12))), np.arange(1, 14))
    assert (np.diff(loss, axis=-1) <= 1e-12).all() and np.allclose(loss[:, -2:], 0)


def test_measured_losses_scale_the_influence_of_a_head_and_keep_its_shape():
    gen = np.random.default_rng(0)
    maps = [np.tril(gen.random((2, 3, n, n))) for n in (16, 32)]
    measured = np.array([[0.5, 0.02, -0.01], [0.1, -0.03, 0.04]])
    out = scaled(maps, measured, block=64)
    lost = np.stack([plan_search.losses(layer, np.array([3]))[:, 0] for layer in out[0]])
    # heads below the noise (mean size of what came out negative: 0.02) count as the noise
    np.testing.assert_allclose(lost, [[0.5, 0.02, 0.02], [0.1, 0.02, 0.04]])
    for before, after in zip(maps, out):
        ratio = after.sum((-2, -1)) / before.sum((-2, -1))
        np.testing.assert_allclose(after, before * ratio[..., None, None])


@pytest.mark.parametrize(
    "change, found", [("objective", "5"), ("missing", "5 of them"), ("kind", "0 of them")]
)
def test_measured_wants_the_window_loss_of_every_kv_head(change, found):
    table = {
        "objective": "gradient" if change == "objective" else "window_loss",
        "kind": "q" if change == "kind" else "kv",
        "heads": [{"layer": i // 2, "head": i % 2, "score": 0.1} for i in range(6 - (change != "kind"))],
    }
    with pytest.raises(CalibrationError, match=f"{found}.*calibrate head_scores"):
        MoaCalibrator(measured=table)._measured(3, 2)


def test_texts_shorter_than_the_profiles_get_the_spans_of_the_shortest():
    plan = {"alphas": [[-448.0, 64.0]], "betas": [[0.75, 0.125]]}
    free, held = MoA(plan=plan), MoA(plan={**plan, "shortest": 1024})
    for patch in (free, held):
        patch.validate()
    assert free.kv_rules(0, 2, 608) == [128, 192] and held.kv_rules(0, 2, 608) == [320, 192]
    assert free.kv_rules(0, 2, 2048) == held.kv_rules(0, 2, 2048)
    with pytest.raises(ConfigError, match="shortest"):
        MoA(plan={**plan, "shortest": -1}).validate()
