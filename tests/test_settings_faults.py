"""What the settings table found, one small program each."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap

from .small import close, differ, inputs_of, model_of, output, refused

pytestmark = pytest.mark.filterwarnings("ignore")


def test_another_implementation_chosen_meanwhile_keeps_the_patch_and_the_choice():
    model = model_of("llama")
    inputs = inputs_of(model)
    dense = output(model, inputs)
    with hap.patched(model, "streaming", sinks=1, window=3) as handle:
        want = output(model, inputs)
        model.set_attn_implementation("eager")
        got = output(model, inputs)
        assert float((got - want).abs().max()) < 1e-4 and differ(got, dense)  # eager has a softmax in float32
        with handle.disabled():
            eager = output(model, inputs)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(output(model, inputs), eager)


def test_dense_weights_load_strictly_and_half_a_patch_is_still_reported():
    model = model_of("llama")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with hap.patched(model, "head_gate", gate=0.5):
        assert not model.load_state_dict(weights).missing_keys
        everything = model.state_dict()
        assert not model.load_state_dict(everything).missing_keys
        first = next(k for k in everything if ".attn_patch." in k)
        with pytest.raises(RuntimeError, match="attn_patch"):
            model.load_state_dict({k: v for k, v in everything.items() if k != first})
    assert not model._load_state_dict_post_hooks


def test_generators_that_hold_a_prompt_open_together_are_refused():
    model = model_of("llama")

    def talk(length):
        with hap.prompt(model, length=length):
            for _ in range(2):
                yield output(model, inputs_of(model))

    with hap.patched(model, "quest"):
        assert len(list(talk(9))) == 2 and len(list(talk(5))) == 2  # one after the other
        first, second = talk(9), talk(5)
        next(first), next(second)
        next(second)
        with refused(hap.PatchError, "generators", "every forward"):
            next(first)
        second.close()


def test_a_part_of_a_prompt_that_ends_on_an_image_token_is_refused_where_it_would_be_read_again():
    model = model_of("llava")
    inputs = inputs_of(model, batch=1)
    ids = inputs["input_ids"]
    end = int((ids == model.config.image_token_id).nonzero()[-1, 1]) + 1
    with hap.patched(model, "pai", alpha=0.5, first_layer=0), torch.no_grad():
        for cut, wrong in ((end, True), (end + 1, False)):
            cache = DynamicCache(config=model.config)
            model(ids[:, :cut], pixel_values=inputs["pixel_values"], past_key_values=cache)
            if wrong:
                with refused(hap.PatchError, "image", "hap.prompt"):
                    model(ids[:, cut:], past_key_values=cache)
            else:
                got = model(ids[:, cut:], past_key_values=cache)[0]
                close(got, model(ids, pixel_values=inputs["pixel_values"])[0][:, cut:])


def test_packed_rows_are_refused_by_edits_of_a_prompt():
    model = model_of("llava")
    inputs = inputs_of(model, batch=1)
    length = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
    given = {
        "input_ids": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"],
        "position_ids": positions,
    }
    with hap.patched(model, "pai", alpha=0.5, first_layer=0), refused(hap.PatchError, "packs"):
        output(model, given, use_cache=False)
