"""The paired bootstrap against answers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from hf_attn_patch.eval import Metric, paired_bootstrap

MEAN = Metric("score", "", True)
PERPLEXITY = Metric("perplexity", "ppl", False, "exp_mean")


def test_constant_difference_has_an_interval_of_no_width():
    found = paired_bootstrap([1.0, 5.0, 2.0, 8.0], [1.5, 5.5, 2.5, 8.5], MEAN)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.significant


def test_interval_of_normal_differences_is_the_textbook_one():
    rng = np.random.default_rng(1)
    first, noise = rng.normal(0, 50, 400), rng.normal(1.0, 2.0, 400)
    found = paired_bootstrap(first.tolist(), (first + noise).tolist(), MEAN)
    half = 1.96 * noise.std(ddof=1) / 20
    assert found.value == pytest.approx(noise.mean())
    assert found.low == pytest.approx(noise.mean() - half, abs=0.03)
    assert found.high == pytest.approx(noise.mean() + half, abs=0.03)


def test_pairing_is_what_makes_it_narrow():
    rng = np.random.default_rng(2)
    first = rng.normal(0, 50, 200)
    paired = paired_bootstrap(first.tolist(), (first + 1).tolist(), MEAN)
    shuffled = paired_bootstrap(first.tolist(), (rng.permutation(first) + 1).tolist(), MEAN)
    assert paired.significant and not shuffled.significant


def test_no_difference_is_not_significant():
    found = paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], MEAN)
    assert found.value == 0 and not found.significant


def test_perplexity_is_the_exponential_of_the_token_weighted_mean():
    found = paired_bootstrap([1.0, 2.0], [1.0, 3.0], PERPLEXITY, weights=[3.0, 1.0])
    assert found.value == pytest.approx(np.exp(6 / 4) - np.exp(5 / 4))


def test_same_seed_same_interval_and_another_seed_another():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=30).tolist(), rng.normal(size=30).tolist()
    assert paired_bootstrap(a, b, MEAN, seed=4) == paired_bootstrap(a, b, MEAN, seed=4)
    assert paired_bootstrap(a, b, MEAN, seed=4) != paired_bootstrap(a, b, MEAN, seed=5)


def test_one_item_has_no_interval():
    found = paired_bootstrap([1.0], [2.0], MEAN)
    assert (found.value, found.low, found.high, found.significant) == (1.0, None, None, False)


@pytest.mark.parametrize("first, second", [([1.0], [1.0, 2.0]), ([], [])])
def test_unpaired_scores_are_refused(first, second):
    with pytest.raises(ValueError, match="same items on both sides"):
        paired_bootstrap(first, second, MEAN)
