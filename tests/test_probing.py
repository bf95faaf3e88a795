"""Heads on frozen tokens: one signature, maps that say what was read, a seeded recipe, errors before the first step."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch import probing
from hf_attn_patch.probing.acmil import HIDDEN, Acmil
from hf_attn_patch.probing.ep import EfficientProbing
from hf_attn_patch.probing.pool import Mean

SHAPE = (9, 32)
HEADS = list(probing.names())


def tokens(n=24, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def build(name, classes=3, **options):
    torch.manual_seed(0)
    return probing.build(name, SHAPE, classes, **options).eval()


@pytest.mark.parametrize("name", HEADS)
def test_head_gives_logits_and_maps_for_one_image_and_for_many(name):
    head, x = build(name), tokens(5)
    with torch.no_grad():
        logits, maps = head.attend(x)
        alone, _ = head.attend(x[:1])
    assert logits.shape == (5, 3) and maps.ndim == 3 and maps.shape[::2] == (5, SHAPE[0])
    torch.testing.assert_close(logits, head(x))
    torch.testing.assert_close(alone, logits[:1])


@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("cbam", "cait", "clip")])
def test_maps_are_probabilities(name):
    with torch.no_grad():
        _, maps = build(name).attend(tokens(4))
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))


@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("cbam", "clip")])
def test_pooling_does_not_care_for_the_order_of_tokens(name):
    head, x = build(name).double(), tokens(4).double()
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, maps = head.attend(x)
        shuffled, moved = head.attend(x[:, order])
    torch.testing.assert_close(shuffled, logits)
    torch.testing.assert_close(moved, maps[..., order])


@pytest.mark.parametrize("name", ["cbam", "clip"])
def test_pooling_on_a_grid_refuses_another_number_of_tokens(name):
    with pytest.raises(ValueError, match="made for 9 tokens, got 8"):
        build(name)(tokens(2)[:, 1:])


def test_one_query_of_zeros_and_identity_values_are_the_mean():
    pool = EfficientProbing(32, queries=1)
    with torch.no_grad():
        pool.queries.zero_()
        pool.value.weight.copy_(torch.eye(32))
    torch.testing.assert_close(pool(tokens()), Mean(32)(tokens()))


def test_parameters_of_efficient_probing_are_those_of_the_paper():
    # ViT-B, 32 queries, 1000 classes: the paper's "< 1.4 M" (C^2 + Q C + (C + 1) classes)
    head = probing.build("ep", (196, 768), 1000, queries=32)
    assert sum(p.numel() for p in head.parameters()) == 768**2 + 32 * 768 + 769 * 1000 == 1_383_400


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_a_class_that_is_written_into_one_token(name):
    x = tokens(96)
    labels = torch.arange(96) % 3
    x[torch.arange(96), torch.arange(96) % SHAPE[0]] += 6 * torch.eye(3, SHAPE[1])[labels]
    fitted = probing.fit(x[:72], labels[:72], head=name, steps=60, lr=1e-2, batch=24, seed=0)
    found = fitted.logits(x[72:]).argmax(-1)
    assert (found == labels[72:]).float().mean() > 0.6  # chance is 1/3
    assert fitted.parameters == sum(p.numel() for p in fitted.head.parameters()) and name in str(fitted)


def test_fit_gives_the_same_head_for_the_same_seed_and_leaves_torchs_generator_alone():
    x, labels = tokens(), torch.arange(24) % 3
    before = torch.random.get_rng_state()
    first, second, other = (probing.fit(x, labels, "acmil", 5, seed=s).logits(x) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_labels_per_image_are_learned_independently():
    x = tokens(64)
    labels = (x[:, :, :4].mean(1) > 0).long()
    fitted = probing.fit(x, labels, "ep", 150, 1e-2, seed=0)
    assert fitted.logits(x).shape == (64, 4) and fitted.accuracy > 0.9


@pytest.mark.parametrize("kinds", [[0, 2], [0, 1, 3]])
def test_linear_probe_never_answers_a_class_it_has_not_seen(kinds):
    x = tokens(30)
    labels = torch.tensor(kinds * 30)[:30]
    x[:, :, 0] += 5 * labels[:, None]
    fitted = probing.fit(x, labels, "linear", classes=5)
    assert fitted.logits(x).shape == (30, 5)
    assert (fitted.logits(x).argmax(-1) == labels).all()


def test_linear_probe_is_scikit_learns_on_standardised_means():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels = tokens(60), torch.arange(60) % 3
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
        x.mean(1).numpy(), labels.numpy()
    )
    ours = probing.fit(x, labels, "linear").logits(tokens(40, seed=5)).softmax(-1)
    wanted = theirs.predict_proba(tokens(40, seed=5).mean(1).numpy())
    # both stop at the same gradient norm, from data that differ in rounding
    torch.testing.assert_close(ours.double(), torch.from_numpy(wanted).double(), rtol=0, atol=1e-3)


# -- acmil ----------------------------------------------------------------------------------------------------------


def test_acmil_hides_favourites_in_training_only():
    torch.manual_seed(0)
    head, x = Acmil(32, 3, branches=2, hide=5, drop=0.6), tokens(3)
    with torch.no_grad():
        scores = head.train().run(x).scores
        assert (head.eval().run(x).scores > HIDDEN).all()
    hidden = scores == HIDDEN
    assert (hidden.sum(-1) == 3).all()  # int(5 * 0.6)
    best = head.run(x).raw.topk(5, -1).indices
    assert (hidden.gather(-1, best).sum(-1) == 3).all()


def test_acmil_without_masking_trains_as_it_evaluates_and_with_one_branch_has_one_loss():
    torch.manual_seed(0)
    head, x = Acmil(32, 3, branches=1, hide=0), tokens(3)
    with torch.no_grad():
        assert torch.equal(head.train()(x), head.eval()(x))
        assert set(head.losses(head.run(x), torch.tensor([0, 1, 2]))) == {"bag"}


def test_branches_that_read_the_same_pay_the_full_difference_loss():
    torch.manual_seed(0)
    head = Acmil(32, 3, branches=3, hide=0)
    with torch.no_grad():
        head.scorer.weight.copy_(head.scorer.weight[:1].expand(3, -1))
        losses = head.losses(head.run(tokens(4)), torch.tensor([0, 1, 2, 0]))
    assert losses["difference"].item() == pytest.approx(1, abs=1e-6)


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "no head is called 'epp'. Did you mean 'ep'": {"head": "epp"},
    "unknown option 'querys'": {"head": "ep", "querys": 3},
    "unequal slices": {"head": "ep", "queries": 5},
    "do not divide features of width 32": {"head": "aim", "heads": 5},
    "no square grid": {"head": "cbam", "features": tokens()[:, 1:]},
    "24 features for 23 labels": {"labels": torch.zeros(23, dtype=torch.long)},
    "not finite": {"features": tokens().fill_(float("nan"))},
    "asked for 2": {"classes": 2},
    "expected \\[n, N, C\\]": {"features": torch.zeros(24)},
    "needs two classes": {"head": "linear", "labels": torch.zeros(24, dtype=torch.long)},
    "steps=0": {"steps": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_a_reason(message):
    given = {"features": tokens(), "labels": torch.arange(24) % 3, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        probing.fit(**given)


def test_a_name_has_one_owner():
    with pytest.raises(ValueError, match="two heads are called 'ep'"):
        probing.register("ep", Mean)
