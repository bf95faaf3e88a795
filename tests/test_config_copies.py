"""The implementation name on a config: no copy holds it, and no model made from it is silently dense."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

STREAMING = {"sinks": 1, "window": 3}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model, batch=1, length=12))).logits


def test_no_copy_of_a_config_holds_our_name(tmp_path):
    model = tiny_model("llama")
    said, printed = model.config.to_dict(), repr(model.config)
    handle = hap.patch(model, "streaming", **STREAMING)
    assert model.config.to_dict() == said and repr(model.config) == printed
    model.config.save_pretrained(tmp_path)
    assert "hf_attn_patch" not in (tmp_path / "config.json").read_text()
    with pytest.warns(UserWarning, match=r"copied from a patched model(.|\n)*hap\.load"):
        twin = copy.deepcopy(model.config)
    assert twin._attn_implementation == "sdpa" and type(twin._attn_implementation) is str
    llava = tiny_model("llava")
    with hap.patched(llava, "head_gate", gate=0.5), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "hf_attn_patch" not in llava.config.to_json_string() + repr(llava.config)
    handle.remove()
    assert type(model)(twin).config._attn_implementation == "sdpa"


def test_copies_and_pickles_of_a_patched_model_stay_patched():
    model = tiny_model("llama")
    dense, handle = logits(model), hap.patch(model, "streaming", **STREAMING)
    want = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert torch.equal(copy.deepcopy(model.model)(torch.ones(1, 5, dtype=torch.int)).last_hidden_state,
                           model.model(torch.ones(1, 5, dtype=torch.int)).last_hidden_state)  # fmt: skip
    handle.remove()
    for twin in twins:
        assert torch.equal(logits(twin), want) and hap.unpatch(twin) == 1
        assert torch.equal(logits(twin), dense) and twin.config._attn_implementation == "sdpa"


def reference_by_name(policy):
    config = type(policy.config)(**policy.config.to_dict())
    return type(policy)._from_config(config, attn_implementation=policy.config._attn_implementation)


def reference_by_config(policy):
    return type(policy)(policy.config)


def reference_by_pickle(policy):
    return type(policy)(pickle.loads(pickle.dumps(policy.config)))


@pytest.mark.parametrize("make", [reference_by_name, reference_by_config, reference_by_pickle])
def test_a_model_made_from_a_patched_one_says_once_that_it_is_dense(make):
    policy = tiny_model("llama")
    dense = logits(policy)
    with hap.patched(policy, "streaming", **STREAMING):
        want = logits(policy)
        reference = make(policy).eval()
        reference.load_state_dict({k: v for k, v in policy.state_dict().items() if "attn_patch" not in k})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.equal(logits(reference), dense)
            logits(reference)
        assert len([w for w in said if "hap.load" in str(w.message)]) == 1
        with hap.patched(reference, "streaming", **STREAMING):
            assert torch.equal(logits(reference), want)
        assert torch.equal(logits(policy), want)
    assert policy.config._attn_implementation == "sdpa"


def test_what_the_user_chooses_while_patched_stays():
    model = tiny_model("llama")
    handle = hap.patch(model, "streaming", **STREAMING)
    model.set_attn_implementation("eager")
    handle.remove()
    assert model.config._attn_implementation == "eager"
    hap.patch(model, "streaming", **STREAMING)
    model.set_attn_implementation("sdpa")
    hap.patch(model, "head_gate", gate=0.5)  # routes it to us again, with the new choice behind it
    assert hap.unpatch(model) == 2 and model.config._attn_implementation == "sdpa"
