"""`calibrate duo` and `calibrate vertical_slash`: what a search finds, how it goes on, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.calibration.calibrator import CalibrationError
from hf_attn_patch.calibration.duo import DuoCalibrator, distillation, passkey_sample, schedule
from hf_attn_patch.calibration.vertical_slash import PUBLISHED, VerticalSlashCalibrator
from hf_attn_patch.install import stack
from hf_attn_patch.model import head_sets
from hf_attn_patch.patches.sparse.duo import full_heads
from tests.eval_models import language_model
from tests.test_golden import read

DUO = dict(lengths=(560, 600), steps=20, lr=0.1, l1=1e-4, sinks=2, window=8, passkeys=1, words=3)
LINES = dict(length=300, samples=2, sinks=2, recent=8, last=32, budget=60)


@pytest.fixture(scope="module")
def small():
    return language_model()


# -- duo --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mute():
    """A model in which KV head 1 of layer 0 and KV head 0 of layer 1 have no effect: their output weights are 0."""
    model, tokenizer = language_model()
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 0)):
            width = model.config.hidden_size // model.config.num_key_value_heads
            model.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    return model, tokenizer


@pytest.fixture(scope="module")
def gated(mute):
    model, tokenizer = mute
    return hap.calibrate(model, "duo", tokenizer=tokenizer, **DUO)


def test_gates_of_heads_without_effect_close_and_the_others_stay_open(gated):
    (keeps, closed), (closed_too, keeps_too) = gated.plan["alphas"]
    assert closed == closed_too == 0.0
    assert min(keeps, keeps_too) > 0.5
    assert full_heads(gated.plan["alphas"], 0.5) == [[True, False], [False, True]]
    assert gated.report["full_heads"] == 2 and gated.report["at_zero"] == 2


def test_the_plan_is_gates_and_a_head_set_and_patches_the_model(mute, gated, tmp_path):
    model, tokenizer = mute
    file = gated.save(tmp_path / "plan.json")
    ids = passkey_sample(tokenizer, 560, 1, 3, 5).ids[None]
    with hap.patched(model, "duo", **gated.options), torch.no_grad():
        expected = model(ids).logits
    with hap.patched(model, "duo", alphas=str(file), sparsity=0.5, sinks=2, window=8), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    found = head_sets.read(json.loads(file.read_text()), "test").top(2, "test")
    assert {(h.layer, h.head, h.kind) for h in found.heads} == {(0, 0, "kv"), (1, 1, "kv")}
    # these heads stream without any effect, so the plan costs nothing here
    with torch.no_grad():
        torch.testing.assert_close(expected, model(ids).logits)


def test_calibration_leaves_the_model_as_it_was(mute, gated):
    model, _ = mute
    assert not hap.active(model) and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_interrupted_search_goes_on_and_ends_the_same(mute, gated, tmp_path):
    model, tokenizer = mute

    def stop(step, done, total):
        if done == 13:
            raise KeyboardInterrupt

    out = tmp_path / "plan.json"
    with pytest.raises(KeyboardInterrupt):
        hap.calibrate(model, "duo", tokenizer=tokenizer, out=out, progress=stop, **DUO)
    assert not hap.active(model) and not out.exists()
    steps = []
    again = hap.calibrate(
        model,
        "duo",
        tokenizer=tokenizer,
        out=out,
        progress=lambda name, done, total: steps.append(done),
        **DUO,
    )
    assert min(s for s in steps if s) == 13, "the pieces of steps 1 to 12 are read, not computed"
    assert again.plan == gated.plan == json.loads(out.read_text())


@pytest.mark.parametrize("lr", [0.02, 0.9])
def test_training_in_pieces_is_training_in_one_go_and_gates_stay_between_0_and_1(lr):
    model, tokenizer = language_model()
    model.requires_grad_(False)
    job = DuoCalibrator(**{**DUO, "lr": lr, "l1": 0.0, "steps": 8})
    texts = job._samples(model, tokenizer, None)
    silent = lambda *done: None
    begin = {"losses": torch.zeros(0, 2)}
    # gates that start at 1 have nothing to learn without the L1 term
    begin |= {"alphas": torch.full((4,), 0.5), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    once = job._train(model, texts, begin, 1, 8, silent)
    twice = job._train(model, texts, job._train(model, texts, begin, 1, 4, silent), 4, 8, silent)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
    assert bool(((once["alphas"] >= 0) & (once["alphas"] <= 1)).all())
    assert bool((once["alphas"] == 1).any()) == (lr == 0.9), "only large steps end at the border"


def test_the_loss_is_the_one_of_the_original():
    tensors, config = read("duo__mix")
    mask = tensors["in.label_mask"]
    flat = lambda name: tensors[name].flatten(2)[mask]
    distance = distillation(flat("out.teacher"), flat("out.student"))
    torch.testing.assert_close(distance, tensors["out.distill_loss"])
    penalty = tensors["param.alpha"].abs().mean().float()
    torch.testing.assert_close(penalty, tensors["out.reg_loss"])
    torch.testing.assert_close(distance + config["reg_weight"] * penalty, tensors["out.total_loss"])
    relative = distillation(3 * flat("out.teacher"), 3 * flat("out.student"), relative=True)
    torch.testing.assert_close(
        relative, distillation(flat("out.teacher"), flat("out.student"), relative=True)
    )


def test_the_learning_rate_warms_up_and_cools_down():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[19] == rates[50] == rates[80] == 1.0 and rates[99] == 0.1
    assert rates[10] == pytest.approx(0.55) and rates[90] == pytest.approx(0.5)
    assert all(0.1 <= schedule(step, 3) <= 1.0 for step in range(3))


def test_a_passkey_sample_says_every_key_once_and_asks_for_it(small):
    _, tokenizer = small
    for seed in range(5):
        sample = passkey_sample(tokenizer, 1500, 3, 4, seed)
        text = tokenizer.decode(sample.ids)
        prompt, asked = (
            tokenizer.decode(sample.ids[: sample.start]),
            tokenizer.decode(sample.ids[sample.start :]),
        )
        assert 1200 < len(sample) <= 1500
        said = "".join(text[c] for c in sample.columns).strip(" .").split(".")
        assert len(said) == 3 and all(len(key.split()) == 4 for key in said)
        for key, name in zip(sorted(said, key=asked.find), ("first", "second", "third")):
            assert prompt.count(f"the {name} key to the vault is{' ' + key.strip()}.") == 1
            assert f"the {name} key to the vault? {key.strip()}." in asked
    assert passkey_sample(tokenizer, 1500, 3, 4, 1).ids.equal(passkey_sample(tokenizer, 1500, 3, 4, 1).ids)


def test_own_data_with_answers_can_train_the_gates(small):
    model, tokenizer = small
    rows = [
        {"prompt": "abc " * 150, "answer": "what was said"},
        {"prompt": "hello " * 100, "answer": "again"},
    ]
    found = hap.calibrate(model, "duo", tokenizer=tokenizer, data=rows, **{**DUO, "steps": 2})
    assert len(found.plan["alphas"]) == 2
    with pytest.raises(CalibrationError, match="no answer"):
        hap.calibrate(model, "duo", tokenizer=tokenizer, data=[{"prompt": "a " * 400}], **DUO)


@pytest.mark.parametrize("options, words", [
    ({"window": 4000}, "reads everything, so there is nothing to learn"),
    ({"sparsity": 2.0}, "sparsity=2.0"), ({"steps": 0}, "steps=0"), ({"lr": 0.0}, "lr=0.0"),
    ({"passkeys": 11}, "passkeys=11"), ({"words": 60}, "leave .* tokens to the prose"), ({"lengths": ()}, "lengths"),
], ids=str)  # fmt: skip
def test_a_search_that_cannot_work_is_refused(small, options, words):
    model, tokenizer = small
    with pytest.raises(CalibrationError, match=words):
        hap.calibrate(model, "duo", tokenizer=tokenizer, **{**DUO, **options})


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    model, tokenizer = language_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="loss of step 0 is nan"):
        hap.calibrate(model, "duo", tokenizer=tokenizer, **DUO)
    assert not hap.active(model)


# -- vertical_slash ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(small):
    model, tokenizer = small
    return hap.calibrate(model, "vertical_slash", tokenizer=tokenizer, **LINES)


def test_every_head_gets_the_pair_with_the_best_recall(small, lines):
    report = lines.report
    uniform = report["recall_of_one_pair_for_all_heads"]
    assert report["recall"] > max(uniform.values()) - 1e-6 and sum(report["heads_per_pair"].values()) == 8
    assert all(v + s == 60 for v, s in VerticalSlashCalibrator(**LINES).pairs())
    model, tokenizer = small
    ids = passkey_sample(tokenizer, 300, 1, 1, 0).ids[None]
    with hap.patched(model, "vertical_slash", **lines.options) as handle, torch.no_grad():
        model(ids)
        assert 0.1 < handle.report().sites[0].block_density < 0.6


def test_recall_is_the_mass_that_the_patch_would_keep(small, monkeypatch):
    """Against the probabilities of the unpatched model, and the lines that the patch chooses."""
    from hf_attn_patch.kernels import reference

    model, tokenizer = small
    ids = passkey_sample(tokenizer, 200, 1, 1, 3).ids
    found = VerticalSlashCalibrator(**LINES)._measure(model, ids, [(20, 40)])
    programs = []
    original = stack.attention
    options = {k: LINES[k] for k in ("sinks", "recent", "last")}
    with hap.patched(model, "vertical_slash", vertical=20, slash=40, layers=0, **options), torch.no_grad():
        monkeypatch.setattr(stack, "attention", lambda p, impl: (programs.append(p), original(p, impl))[1])
        model(ids[None])
    (program,) = programs
    rows = torch.arange(len(ids))
    seen = reference.visible(program, rows, rows)
    program.rules = []
    probs = reference.run(program)[1]
    kept = (probs * seen)[0, :, len(ids) // 4 :].sum(-1).mean(-1)
    torch.testing.assert_close(found["recall-0"][0].float(), kept)
    assert 0.05 < float(found["share-0"].mean()) < float(found["recall-0"].mean()) < 1.0


def test_published_and_own_candidates():
    assert VerticalSlashCalibrator(candidates="published").pairs() == sorted(PUBLISHED, key=sum)
    assert VerticalSlashCalibrator(candidates=((9, 9), (1, 2))).pairs() == [(1, 2), (9, 9)]


@pytest.mark.parametrize("options, words", [
    ({"budget": 10}, "sinks \\+ recent"), ({"length": 100}, "length=100"), ({"candidates": "mine"}, "'published'"),
    ({"candidates": ((1, -1),)}, "no pair"), ({"samples": 0}, "samples=0"),
], ids=str)  # fmt: skip
def test_a_search_of_lines_that_cannot_work_is_refused(small, options, words):
    model, tokenizer = small
    with pytest.raises(CalibrationError, match=words):
        hap.calibrate(model, "vertical_slash", tokenizer=tokenizer, **{**LINES, **options})
