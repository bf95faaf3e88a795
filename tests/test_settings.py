"""A part of the table of `scripts/settings.py`: no cell may be WRONG, and the judge itself must see what is."""

from __future__ import annotations

import pytest
import torch

import hf_attn_patch as hap

from .settings import QUICK, SETTINGS, base, judge
from .settings.base import Bench, Setting, cases_for

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_patched_model_is_right_or_refuses(name, method):
    cases = cases_for(name, method, 1)
    if not cases:
        pytest.skip("no family of this method can do it")
    for case in cases:
        found = judge(name, case)
        assert found.state != "WRONG", found.why
        if found.state == "n.a.":
            pytest.skip(found.why)


def judged(monkeypatch, run) -> base.Outcome:
    """What `judge` says to a setting of its own on streaming."""
    monkeypatch.setitem(SETTINGS, "own", Setting("own", "", run))
    base.control.cache_clear()
    return judge("own", cases_for("threads", "streaming", 1)[0])


def forward(bench: Bench) -> torch.Tensor:
    with bench.patched(bench.model):
        return bench.forward(bench.model, bench.inputs())


def dense(bench: Bench) -> torch.Tensor:
    return bench.forward(bench.model, bench.inputs())


def test_a_patch_that_is_lost_is_seen(monkeypatch):
    def loses(bench):
        yield "outputs", dense(bench), forward(bench)

    assert judged(monkeypatch, loses).state == "WRONG"


def test_a_raw_exception_is_wrong_unless_the_model_alone_raises_it(monkeypatch):
    def breaks(bench):
        if not bench.dense:
            raise RuntimeError("device")
        yield "outputs", forward(bench), forward(bench)

    def always(bench):
        raise RuntimeError("no such cache")
        yield

    assert judged(monkeypatch, breaks).state == "WRONG"
    found = judged(monkeypatch, always)
    assert found.state == "n.a." and "no such cache" in found.why


def test_a_setting_that_shows_nothing_is_not_called_right(monkeypatch):
    def idle(bench):
        yield "outputs", dense(bench), dense(bench)

    def fine(bench):
        yield "outputs", forward(bench), forward(bench)

    assert judged(monkeypatch, idle).state == "n.a."
    assert judged(monkeypatch, fine).state == "right"


def test_a_refusal_is_one_only_in_the_words_of_the_package(monkeypatch):
    def refuses(bench):
        if not bench.dense:
            raise hap.PatchError("say how long the prompt is")
        yield "outputs", forward(bench), forward(bench)

    assert judged(monkeypatch, refuses) == base.Outcome("refused", "say how long the prompt is")


def test_a_patch_left_behind_is_wrong(monkeypatch):
    def leaves(bench):
        want = forward(bench)
        bench.patch(bench.model)
        yield "outputs", want, want

    assert judged(monkeypatch, leaves).state == "WRONG"
    assert not hap.active(Bench(cases_for("threads", "streaming", 1)[0]).model)
