"""Patches and PEFT adapters on one model, in both orders: train, save, load, merge, undo."""

from __future__ import annotations

import warnings

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.install import dispatch
from hf_attn_patch.install.stack import SitePatch

from .small import close, differ, inputs_of, model_of, output

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # a method that transformers renames in v6
STREAMING = {"sinks": 1, "window": 3}


def lora(model, **more):
    """`model` wrapped with LoRA on q and v whose B matrices are not zero, so that it changes something."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).double().eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return wrapped


def gates_of(model):
    """Gates that are used: PEFT keeps the original beside its trainable copy."""
    return {n: p for n, p in model.named_parameters() if n.endswith("gate") and "original_module" not in n}


def train(model, inputs, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()


def test_the_order_of_patch_and_lora_does_not_matter():
    inputs = inputs_of(model_of("llama"), left_pad=[3, 0])
    real = inputs["attention_mask"].bool()
    first, second = model_of("llama"), model_of("llama")
    hap.patch(first, "streaming", **STREAMING)
    wrapped_after, wrapped_before = lora(first), lora(second)
    dense = output(wrapped_before, inputs)
    hap.patch(wrapped_before, "streaming", **STREAMING)
    assert torch.equal(output(wrapped_after, inputs)[real], output(wrapped_before, inputs)[real])
    assert differ(output(wrapped_before, inputs)[real], dense[real])
    for wrapped in (wrapped_after, wrapped_before):
        assert [h.name for h in hap.active(wrapped)] == ["streaming"]
        assert hap.unpatch(wrapped) == 1
        assert torch.equal(output(wrapped, inputs), dense)
    assert not dispatch.registered()


def test_heads_are_counted_behind_lora_layers():
    for site in hap.find_sites(lora(model_of("llama"))):
        assert (site.num_heads, site.num_kv_heads, site.head_dim) == (4, 2, 16)
        assert site.path.startswith("model.layers.")


@pytest.mark.parametrize("patch_first", [True, False])
def test_undo_in_both_orders_gives_the_model_back(patch_first):
    model = model_of("llama")
    inputs = inputs_of(model)
    dense = output(model, inputs)
    if patch_first:
        handle = hap.patch(model, "streaming", **STREAMING)
        wrapped = lora(model)
        handle.remove()
        base = wrapped.unload()
    else:
        wrapped = lora(model)
        handle = hap.patch(wrapped, "streaming", **STREAMING)
        base = wrapped.unload()
        edited = output(base, inputs)
        assert differ(edited, dense)
        handle.remove()
    assert torch.equal(output(base, inputs), dense)
    assert not any("attn_patch" in n for n, _ in base.named_modules()) and not dispatch.registered()


def test_merge_and_unload_keeps_the_patch():
    model = model_of("llama")
    inputs = inputs_of(model)
    hap.patch(model, "streaming", **STREAMING)
    wrapped = lora(model)
    expected = output(wrapped, inputs)
    merged = wrapped.merge_and_unload()
    close(output(merged, inputs), expected)
    (handle,) = hap.active(merged)
    with handle.disabled():
        assert differ(output(merged, inputs), expected)
    handle.remove()
    assert not dispatch.registered()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_modules_to_save_trains_saves_and_loads_the_gates(tmp_path, checkpointing):
    model = model_of("llama")
    inputs = inputs_of(model)
    hap.patch(model, "head_gate", gate=0.9, trainable_gate=True)
    wrapped = lora(model, modules_to_save=["attn_patch"])
    if checkpointing:
        wrapped.enable_input_require_grads()
        wrapped.gradient_checkpointing_enable()
    gates = gates_of(wrapped)
    assert len(gates) == 2 and all(p.requires_grad for p in gates.values())
    before = {n: p.clone() for n, p in gates.items()}
    train(wrapped, inputs)
    for name, gate in gates.items():
        assert bool((gate != before[name]).all()), f"{name} was not trained"
    expected = output(wrapped, inputs)
    wrapped.save_pretrained(tmp_path)

    again = model_of("llama")
    hap.patch(again, "head_gate", gate=0.9, trainable_gate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    torch.testing.assert_close(
        output(loaded, inputs), expected, rtol=1e-4, atol=1e-4
    )  # gates are float32 again


def test_copies_that_peft_makes_obey_the_handle():
    model = model_of("llama")
    inputs = inputs_of(model)
    dense = output(model, inputs)
    handle = hap.patch(model, "head_gate", gate=0.5, trainable_gate=True)
    edited = output(model, inputs)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_patch"])
    )
    wrapped.eval()
    close(output(wrapped, inputs), edited)
    assert {s.executor for s in handle.report().sites} == {"torch"}
    with handle.disabled():
        close(output(wrapped, inputs), dense)
    handle.remove()
    assert not [m for m in wrapped.modules() if isinstance(m, SitePatch)]
    close(output(wrapped, inputs), dense)
    assert not dispatch.registered()


def test_copies_that_peft_makes_see_the_running_forward():
    model = model_of("llava")
    inputs = inputs_of(model)
    options = {"dims": [0, 3], "tau": 1.2, "rho": 0.9, "min_mass": 0.01, "first_layer": 0, "move": 1.0}
    hap.patch(model, "var", **options)
    hap.patch(model, "head_gate", gate=0.9, trainable_gate=True)
    edited = output(model, inputs)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["attn_patch"])
    )
    wrapped.eval()
    close(output(wrapped, inputs), edited)


def test_gates_trained_by_peft_are_saved_by_the_handle(tmp_path):
    model = model_of("llama")
    inputs = inputs_of(model)
    handle = hap.patch(model, "head_gate", gate=0.9, trainable_gate=True)
    wrapped = lora(model, modules_to_save=["attn_patch"])
    train(wrapped, inputs)
    handle.save(tmp_path)
    trained = {
        n.split(".attn_patch")[0].removeprefix("base_model.model."): p for n, p in gates_of(wrapped).items()
    }
    again = model_of("llama")
    hap.load(again, tmp_path)
    for site in hap.find_sites(again):
        assert torch.equal(site.module.attn_patch.patches["head_gate"].gate, trained[site.path].float())


def test_a_second_patch_on_top_of_modules_to_save_reaches_the_copies():
    model = model_of("llama")
    inputs = inputs_of(model)
    hap.patch(model, "head_gate", gate=0.5, trainable_gate=True)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["attn_patch"])
    )
    wrapped.eval()
    gated = output(wrapped, inputs)
    with hap.patched(wrapped, "streaming", **STREAMING):
        both = output(wrapped, inputs)
        assert differ(both, gated)
    close(output(wrapped, inputs), gated)
    other = model_of("llama")
    with hap.patched(other, "head_gate", gate=0.5), hap.patched(other, "streaming", **STREAMING):
        close(output(other, inputs), both)


def test_generate_frees_the_cache_behind_peft():
    model = model_of("llama")
    wrapped = lora(model)
    inputs = inputs_of(model, batch=1, length=20)
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with hap.patched(wrapped, "streaming", sinks=2, window=6):
        done = wrapped.generate(**inputs, **settings, return_dict_in_generate=True)
        assert "2+6" in repr(done.past_key_values.layers[0])
        assert torch.equal(done.sequences, wrapped.generate(**inputs, **settings, use_cache=False))
