"""What a loaded model is, read once; patches found and undone through any object that holds it or is in it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import hf_attn_patch as hap
from hf_attn_patch.errors import AdapterError, CompositionError, ModelMismatchError
from hf_attn_patch.install.dispatch import registered
from hf_attn_patch.model import sites as site_module
from hf_attn_patch.model.sites import find_sites
from hf_attn_patch.model.survey import Survey
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

from .small import differ, refused

STREAMING = {"sinks": 1, "window": 3}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model, batch=1, length=12))).logits


class Holder:
    """An object that is no module, as ``pipeline()`` and trainers are."""

    def __init__(self, model):
        self.name, self.model, self.again = "holder", model, model


class Wrapper(nn.Module):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


# -- wrappers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Holder, lambda m: Wrapper(inner=Wrapper(m=m)), lambda m: m, torch.compile])
def test_a_model_is_found_in_what_holds_it(wrap):
    model = tiny_model("llama")
    thing = wrap(model)
    survey = Survey.of(thing)
    assert survey.base is model and [s.path for s in survey.sites] == [s.path for s in find_sites(model)]
    handle = hap.patch(thing, "streaming", **STREAMING)
    assert [h.name for h in hap.active(model)] == ["streaming"] == [h.name for h in hap.active(thing)]
    assert hap.unpatch(thing) == 1 and not handle.is_active and hap.unpatch(model) == 0


def test_the_wrappers_are_known_outermost_first():
    model = tiny_model("llama")
    inner = Wrapper(m=model)
    outer = Wrapper(w=inner)
    assert Survey.of(outer).wrappers == (outer, inner) and Survey.of(model).wrappers == ()


def test_every_model_of_a_wrapper_is_patched_and_undone():
    pair = Wrapper(policy=tiny_model("llama"), reference=tiny_model("llama", seed=1))
    x = tiny_inputs(pair.policy, batch=1, length=12)
    dense = [one(**x).logits for one in (pair.policy, pair.reference)]
    with refused(ModelMismatchError, "2 independent", "policy", "reference", "wrapper.policy"):
        hap.plan(pair, "streaming", **STREAMING)  # a plan is of one model
    handle = hap.patch(pair, "streaming", **STREAMING)
    alone = [hap.active(one)[0] for one in (pair.policy, pair.reference)]
    assert len(handle.sites) == sum(len(h.sites) for h in alone) == 4 and handle.is_active
    assert len(handle.report().sites) == 4 and "2 models" in repr(handle)
    patched = [one(**x).logits for one in (pair.policy, pair.reference)]
    assert all(differ(a, b) for a, b in zip(patched, dense))
    with handle.disabled():
        assert all(torch.equal(one(**x).logits, a) for one, a in zip((pair.policy, pair.reference), dense))
    with refused(AdapterError, "2 models", "handle.handles[0]"):
        handle.save("nowhere")
    handle.remove()
    assert not handle.is_active and hap.active(pair) == []
    assert all(torch.equal(one(**x).logits, a) for one, a in zip((pair.policy, pair.reference), dense))


def test_a_wrapper_of_which_one_model_cannot_be_patched_is_left_alone():
    pair = Wrapper(policy=tiny_model("llama"), reference=tiny_model("llama", num_hidden_layers=3))
    plan = {"alphas": [[2.0] * 4] * 2, "betas": [[0.1] * 4] * 2}
    with refused(ModelMismatchError, "2 layers", "3"):
        hap.patch(pair, "moa", plan=plan)
    assert hap.active(pair) == []


def test_patches_on_the_models_of_a_wrapper_are_seen_through_it():
    pair = Wrapper(policy=tiny_model("llama"), reference=tiny_model("llama", seed=1))
    hap.patch(pair.policy, "streaming", **STREAMING)
    hap.patch(pair.reference, "head_gate", gate=0.5)
    assert sorted(h.name for h in hap.active(pair)) == ["head_gate", "streaming"]
    assert hap.unpatch(pair) == 2 and hap.active(pair.policy) == hap.active(pair.reference) == []


def test_one_model_held_twice_is_one_model():
    model = tiny_model("llama")
    assert Survey.of(Wrapper(policy=model, reference=model)).base is model


def test_nothing_of_transformers_is_said_to_be_so():
    for thing in (nn.Linear(1, 1), Holder(nn.Linear(1, 1)), "llama", None):
        for call in (hap.active, hap.unpatch, lambda t: hap.patch(t, "streaming")):
            with refused(ModelMismatchError, type(thing).__name__, "from_pretrained"):
                call(thing)


def test_a_model_is_read_once_per_call(monkeypatch):
    model = tiny_model("llama")
    walks = []
    read = site_module.read_sites
    for module in (site_module, sys.modules[Survey.__module__]):
        monkeypatch.setattr(module, "read_sites", lambda m: walks.append(m) or read(m))
    plan = {"alphas": [[1.0] * 4] * 2, "betas": [[0.0] * 4] * 2}
    for name, options in (("streaming", STREAMING), ("moa", {"plan": plan}), ("s2", {}), ("head_gate", {})):
        walks.clear()
        hap.plan(model, name, **options)
        assert len(walks) == 1, name
    walks.clear()
    hap.patch(model, "streaming", **STREAMING)
    assert len(walks) == 1


# -- inside and outside --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undo", ["outer", "inner", "handle", "layer", "from outside"])
@pytest.mark.parametrize("patched", ["outer", "inner"])
def test_a_patch_is_undone_through_any_object(patched, undo):
    model = tiny_model("llama")
    things = {
        "outer": model,
        "inner": model.model,
        "layer": model.model.layers[0],
        "from outside": Holder(model),
    }
    dense, names = logits(model), [n for n, _ in model.named_modules()]
    handle = hap.patch(things[patched], "streaming", **STREAMING)
    assert not torch.equal(logits(model), dense)
    if undo == "handle":
        hap.active(things["from outside"])[0].remove()
    else:
        assert [h.name for h in hap.active(things[undo])] == ["streaming"]
        assert hap.unpatch(things[undo]) == 1
    assert not handle.is_active and hap.active(model) == []
    assert torch.equal(logits(model), dense) and [n for n, _ in model.named_modules()] == names
    assert model.config._attn_implementation == "sdpa"


def test_patches_of_an_inner_and_an_outer_model_do_not_undo_each_other():
    model = tiny_model("llava")
    dense = logits(model)
    outer = hap.patch(model, "head_gate", part="text", gate=0.5)
    only_text = logits(model)
    inner = hap.patch(model.model.vision_tower, "head_gate", gate=0.5)
    both = logits(model)
    outer.remove()
    assert inner.is_active and not torch.equal(logits(model), dense) and not torch.equal(logits(model), both)
    outer = hap.patch(model.model.language_model, "head_gate", gate=0.5)
    assert torch.equal(logits(model), both)
    inner.remove()
    assert torch.equal(logits(model), only_text) and hap.unpatch(model) == 1
    assert torch.equal(logits(model), dense)


def test_a_wrapper_made_later_by_peft_undoes_what_was_patched_before():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    handle = hap.patch(model, "streaming", **STREAMING)
    want = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits(wrapped, **tiny_inputs(model, batch=1, length=12)), want)
    assert [h.name for h in hap.active(wrapped)] == ["streaming"]
    merged = wrapped.merge_and_unload()
    assert (
        hap.unpatch(merged) == 1
        and not handle.is_active
        and not any("attn_patch" in n for n in merged.state_dict())
    )


def test_models_that_share_one_config_object_are_patched_and_undone_apart():
    first = tiny_model("llama")
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    dense = logits(first)
    a = hap.patch(first, "streaming", **STREAMING)
    want = logits(first)
    b = hap.patch(second, "streaming", **STREAMING)
    a.remove()
    assert torch.equal(logits(first), dense) and torch.equal(logits(second), want)
    b.remove()
    assert first.config._attn_implementation == "sdpa" and torch.equal(logits(second), dense)


# -- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["patched", "handle"])
def test_a_block_undoes_what_was_made_inside_it_and_the_users_error_comes_out(style):
    model = tiny_model("llama")
    dense = logits(model)
    first = hap.patch(model, "head_gate", gate=0.9)
    with pytest.raises(ValueError, match="the user's"):
        with (
            hap.patched(model, "streaming", **STREAMING)
            if style == "patched"
            else hap.patch(model, "streaming")
        ):
            hap.patch(model, "head_gate", gate=0.5)
            with hap.patched(model, "streaming", window=9):
                hap.patch(model, "head_gate", gate=0.25)
                raise ValueError("the user's error")
    assert [h.name for h in hap.active(model)] == ["head_gate"] and first.is_active
    first.remove()
    assert torch.equal(logits(model), dense)


def test_an_explicit_removal_out_of_order_is_still_refused():
    model = tiny_model("llama")
    first, _ = hap.patch(model, "streaming", **STREAMING), hap.patch(model, "head_gate", gate=0.5)
    with refused(CompositionError, "streaming", "head_gate", "reverse order"):
        first.remove()
    assert hap.unpatch(model) == 2


class Interrupt(KeyboardInterrupt):
    pass


def interrupted(action, at: int) -> tuple[int, bool]:
    """(lines of this package that `action` ran, whether line number `at` of them was interrupted)."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                raise Interrupt
        return line

    def call(frame, event, arg):
        return line if "/hf_attn_patch/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        action()
        return count, False
    except Interrupt:
        return count, True
    finally:
        sys.settrace(before)


def test_an_interrupt_anywhere_leaves_the_model_as_before():
    model = tiny_model("llama")

    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        names = tuple(n for n, _ in model.named_modules())
        return (
            names,
            model.config._attn_implementation,
            hooks,
            "_attn_patch_state" in vars(model),
            registered(),
        )

    def block():
        with hap.patched(model, "streaming", **STREAMING):
            pass

    clean = state()
    block()  # imports
    lines, _ = interrupted(block, -1)
    for at in range(1, lines, 61):  # 61: about a hundred places, in other lines of each function
        interrupted(block, at)
        assert state() == clean, f"after an interrupt in line {at} of {lines}"
