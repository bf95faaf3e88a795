"""The public calls: what they accept, what they refuse, and that a refusal or an undo leaves nothing behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import (
    CompositionError,
    ConfigError,
    ModelMismatchError,
    PatchError,
    SelectionError,
    UnknownPatchError,
)
from hf_attn_patch.forward.running import current
from hf_attn_patch.install import attach, dispatch, stack
from hf_attn_patch.patches.heads.head_gate import HeadGate
from hf_attn_patch.patches.sparse.streaming import Streaming

from .conformance.families import snapshot
from .small import close, differ, inputs_of, model_of, output, refused, untouched

STREAMING = {"sinks": 1, "window": 3}


@pytest.fixture
def llama():
    return model_of("llama", num_hidden_layers=4)


def layers_of(handle):
    return [s.layer for s in handle.sites]


# -- naming layers and heads -----------------------------------------------------------


@pytest.mark.parametrize(
    "layers, expected",
    [
        (None, [0, 1, 2, 3]),
        (1, [1]),
        (slice(1, 3), [1, 2]),
        ("0-1,-1:", [0, 1, 3]),
        ([0, -1], [0, 3]),
        (range(2), [0, 1]),
        ((i for i in (1, 2)), [1, 2]),
        ({"0-1": {"window": 2}, 3: {}}, [0, 1, 3]),
    ],
    ids=lambda value: "generator" if hasattr(value, "gi_frame") else str(value),  # no address in the id
)
def test_layers_in_every_notation(llama, layers, expected):
    with hap.patched(llama, "streaming", **STREAMING, layers=layers) as handle:
        assert layers_of(handle) == expected


def test_a_mapping_gives_layers_their_own_options(llama):
    inputs = inputs_of(llama)
    with hap.patched(llama, "streaming", sinks=1, layers={"0-1": {"window": 2}, "2-3": {"window": 5}}):
        together = output(llama, inputs)
    with hap.patched(llama, "streaming", sinks=1, window=2, layers="0-1"):
        with hap.patched(llama, "streaming", sinks=1, window=5, layers="2:"):
            assert torch.equal(output(llama, inputs), together)


def test_a_mapping_gives_heads_their_own_options(llama):
    inputs = inputs_of(llama)
    heads = {"0-1": {"window": 2}, 3: {"window": 5}}
    with hap.patched(llama, "streaming", sinks=1, heads=heads) as handle:
        assert "[2 head variants]" in str(hap.plan(llama, "streaming", sinks=1, heads=heads))
        together = output(llama, inputs)
        assert handle.report().sites[0].executor
    with hap.patched(llama, "streaming", sinks=1, window=2, heads=[0, 1]):
        with hap.patched(llama, "streaming", sinks=1, window=5, heads=3):
            close(output(llama, inputs), together)


@pytest.mark.parametrize("trainable", [False, True])
def test_head_gates_of_a_mapping_are_the_gates_of_one_table(llama, trainable):
    inputs = inputs_of(llama)
    with hap.patched(llama, "head_gate", gate=[0.5, 0.25, 1.0, 0.0]):
        table = output(llama, inputs)
    heads = {0: {"gate": 0.5}, 1: {"gate": 0.25}, 3: {"gate": 0.0}}
    with hap.patched(llama, "head_gate", heads=heads, trainable_gate=trainable):
        close(output(llama, inputs), table)


def test_config_object_instead_of_a_name(llama):
    inputs = inputs_of(llama)
    with hap.patched(llama, "streaming", **STREAMING):
        named = output(llama, inputs)
    config = Streaming(sinks=1, window=9)
    with hap.patched(llama, config, window=3) as handle:
        assert torch.equal(output(llama, inputs), named)
        assert handle.config == Streaming(1, 3)
    assert config == Streaming(1, 9)


# -- handles -----------------------------------------------------------


def test_with_patch_undoes_at_the_end(llama):
    with untouched(llama):
        with hap.patch(llama, "streaming", **STREAMING) as handle:
            assert handle.is_active and hap.active(llama)[0].name == "streaming"
    assert not handle.is_active and repr(handle) == "<removed patch streaming>"


def test_patched_is_undone_when_the_block_raises(llama):
    with untouched(llama), pytest.raises(KeyboardInterrupt):
        with hap.patched(llama, "streaming"):
            raise KeyboardInterrupt


def test_handle_of_a_removed_patch_is_not_fooled_by_an_equal_one(llama):
    first = hap.patch(llama, "streaming", **STREAMING)
    first.remove()
    second = hap.patch(llama, "streaming", **STREAMING)
    assert not first.is_active and second.is_active
    first.remove()  # does nothing
    assert second.is_active
    for call in (first.report, lambda: first.save("nowhere"), lambda: first.disabled().__enter__()):
        with refused(PatchError, "removed streaming patch", "hap.patch again"):
            call()


def test_disabled_nests(llama):
    inputs = inputs_of(llama)
    dense = output(llama, inputs)
    handle = hap.patch(llama, "streaming", **STREAMING)
    edited = output(llama, inputs)
    with handle.disabled():
        with handle.disabled():
            assert torch.equal(output(llama, inputs), dense)
        assert torch.equal(output(llama, inputs), dense)
        assert "disabled" in repr(handle) and "[disabled]" in str(handle.report())
    assert torch.equal(output(llama, inputs), edited)
    with pytest.raises(ZeroDivisionError):
        with handle.disabled():
            1 / 0  # noqa: B018
    assert torch.equal(output(llama, inputs), edited)


def test_disabling_one_of_two_leaves_the_other(llama):
    inputs = inputs_of(llama)
    with hap.patched(llama, "head_gate", gate=0.5):
        alone = output(llama, inputs)
    with hap.patched(llama, "head_gate", gate=0.5), hap.patched(llama, "streaming", **STREAMING) as second:
        assert differ(output(llama, inputs), alone)
        with second.disabled():
            close(output(llama, inputs), alone)


def test_active_and_unpatch_count(llama):
    with untouched(llama):
        assert hap.active(llama) == [] and hap.unpatch(llama) == 0
        hap.patch(llama, "streaming", window=9)
        hap.patch(llama, "streaming", window=5)
        hap.patch(llama, "head_gate", gate=0.5)
        assert [h.name for h in hap.active(llama)] == ["streaming", "streaming", "head_gate"]
        assert [h.config.to_dict().get("window") for h in hap.active(llama)] == [9, 5, None]
        assert hap.unpatch(llama) == 3 and hap.unpatch(llama) == 0


def test_removing_out_of_order_is_refused_and_names_what_is_on_top(llama):
    first = hap.patch(llama, "streaming", **STREAMING)
    second = hap.patch(llama, "head_gate", gate=0.5)
    third = hap.patch(llama, "streaming", window=9)
    with untouched(llama):
        with refused(
            CompositionError, "streaming cannot be removed before streaming_2, head_gate", "hap.unpatch"
        ):
            first.remove()
    for handle in (third, second, first):
        handle.remove()
    assert not dispatch.registered()


def test_handles_of_a_deepcopy_are_its_own(llama):
    inputs = inputs_of(llama)
    handle = hap.patch(llama, "streaming", **STREAMING)
    edited = output(llama, inputs)
    twin = copy.deepcopy(llama)
    (own,) = hap.active(twin)
    with own.disabled():
        assert differ(output(twin, inputs), edited)
        assert torch.equal(output(llama, inputs), edited)
    handle.remove()
    assert torch.equal(output(twin, inputs), edited) and dispatch.registered()
    assert own.report().sites[0].executor
    own.remove()
    assert not dispatch.registered()


def test_two_models_in_one_process_do_not_meet():
    a, b = model_of("llama"), model_of("gpt2")
    of_b = inputs_of(b)
    dense = output(b, of_b)
    first = hap.patch(a, "streaming", **STREAMING)
    assert torch.equal(output(b, of_b), dense)
    second = hap.patch(b, "streaming", window=2)
    edited = output(b, of_b)
    first.remove()
    assert torch.equal(output(b, of_b), edited) and differ(edited, dense)
    second.remove()
    assert torch.equal(output(b, of_b), dense) and not dispatch.registered()


# -- plan and report -----------------------------------------------------------


def test_plan_changes_nothing_and_says_what_would_happen(llama):
    with untouched(llama):
        made = hap.plan(llama, "streaming", **STREAMING, layers={"0-1": {}, 3: {"window": 8}}, heads="0-1")
    text, data = str(made), made.to_dict()
    assert "Streaming(sinks=1, window=3) on LlamaForCausalLM: 3 sites change, 1 stay" in text
    assert "model.layers.3.self_attn (text layer 3, causal, 4 heads / 2 KV x 16)" in text
    assert "window=8" in text.splitlines()[-1]
    assert data["method"] == "streaming" and data["config"] == STREAMING and data["part"] == "text"
    assert data["untouched_sites"] == 1 and data["warnings"] == []
    assert [s["layer"] for s in data["sites"]] == [0, 1, 3]
    assert data["sites"][2]["variants"] == [{"heads": [0, 1], "config": {"sinks": 1, "window": 8}}]


def test_plan_on_a_patched_model_changes_nothing(llama):
    with hap.patched(llama, "streaming", **STREAMING), untouched(llama):
        hap.plan(llama, "head_gate", gate=0.5)


def test_plan_warns_about_an_edit_that_reaches_no_layer():
    model = model_of("llava")
    made = hap.plan(model, "var", dims=[0], tau=2.0, first_layer=7)
    assert made.warnings == ["first_layer=7, but the model has 2 layers: nothing will be edited"]
    assert "warning: first_layer=7" in str(made)
    with pytest.warns(UserWarning, match="var: first_layer=7"):
        hap.patch(model, "var", dims=[0], tau=2.0, first_layer=7).remove()


def test_report_before_and_after_a_forward(llama):
    inputs = inputs_of(llama, length=16)
    with hap.patched(llama, "streaming", sinks=0, window=4, layers=[0, 1]) as handle:
        before = handle.report()
        assert [s.executor for s in before.sites] == ["", ""] and before.density is None
        assert "not run yet" in str(before)
        output(llama, inputs)
        after = handle.report()
        first = after.sites[0]
        assert (first.executor, first.q_len, first.kv_len) == ("torch", 16, 16)
        assert "triton" in first.reason
        # window 4 over 16 rows reads 1 + 2 + 3 + 13 * 4 of the 136 visible pairs
        assert first.density == pytest.approx(58 / 136) and after.density == first.density
        assert 0 < first.block_density <= 1
        assert "reads 42.6%" in str(after) and "2 layers from 0" in str(after)
        data = after.to_dict()
        assert data["config"] == {"sinks": 0, "window": 4} and data["sites"][0]["path"].endswith("self_attn")
    with hap.patched(llama, "streaming", impl="reference") as handle:
        output(llama, inputs)
        assert {(s.executor, s.reason) for s in handle.report().sites} == {("reference", "forced")}


def test_report_shows_what_each_kv_head_keeps(llama):
    inputs = inputs_of(llama, batch=1, length=20)
    with hap.patched(llama, "streaming", sinks=2, window=8) as handle:
        llama.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert handle.report().sites[0].slots == [((0, 1), 10)]


def test_handle_prints_what_is_patched_where(llama):
    with hap.patched(llama, "streaming", **STREAMING, layers="0-1,3", impl="torch") as handle:
        assert repr(handle) == (
            "<patch Streaming(sinks=1, window=3) on 3 sites of LlamaForCausalLM, layers 0-1,3, impl=torch>"
        )


# -- parts, native implementations -----------------------------------------------------------


def implementations(model):
    return [
        c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)
    ]


def test_patching_the_text_leaves_the_vision_config_alone():
    model = model_of("llava")
    with hap.patched(model, "streaming", **STREAMING, part="text"):
        assert implementations(model) == ["sdpa", "hf_attn_patch", "sdpa"]
    assert implementations(model) == ["sdpa", "sdpa", "sdpa"]


def test_removing_the_second_of_two_parts_gives_its_config_back():
    model = model_of("llava")
    with hap.patched(model, "streaming", **STREAMING):
        with untouched(model):
            with hap.patched(model, "head_gate", part="vision", gate=0.5):
                assert implementations(model) == ["sdpa", "hf_attn_patch", "hf_attn_patch"]
        assert implementations(model) == ["sdpa", "hf_attn_patch", "sdpa"]


@pytest.mark.parametrize("pads", [0, [4, 0]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3_text"])
def test_a_model_with_eager_attention_stays_itself(family, pads):
    # in float32, because eager attention takes its softmax there in any case
    model = model_of(family, attn_implementation="eager").float()
    assert model.config._attn_implementation == "eager"
    inputs = {
        k: v.float() if v.is_floating_point() else v for k, v in inputs_of(model, left_pad=pads).items()
    }
    dense, real = output(model, inputs), inputs["attention_mask"].bool()

    def same_where_real(got):
        torch.testing.assert_close(got[real], dense[real], rtol=1e-4, atol=1e-4)

    with hap.patched(model, "head_gate", gate=1.0, layers=0):
        assert model.config._attn_implementation == "hf_attn_patch_eager"
        same_where_real(output(model, inputs))  # layer 1 runs eager attention, our mask is its guest
    with hap.patched(model, "streaming", window=1 << 20) as handle:
        same_where_real(output(model, inputs))
        with handle.disabled():
            assert torch.equal(output(model, inputs), dense)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(output(model, inputs), dense)


def test_layers_without_a_patch_compute_bit_for_bit_as_before(llama):
    inputs = inputs_of(llama, left_pad=[3, 0])
    with attach.dispatched(llama):
        routed = output(llama, inputs)
    assert torch.equal(routed, output(llama, inputs))


# -- exceptions inside a patched forward -----------------------------------------------------------


@pytest.mark.parametrize("where", ["layer", "attention"])
def test_an_exception_in_a_patched_forward_does_not_spoil_the_next(where, monkeypatch):
    model = model_of("llava")
    inputs = inputs_of(model)
    options = {"dims": [0, 3], "tau": 1.2, "first_layer": 0, "min_mass": 0.01, "rho": 0.9}
    with hap.patched(model, "var", **options), hap.patched(model, "streaming", **STREAMING):
        expected = output(model, inputs)
        broken = model.get_submodule("model.language_model.layers.1.mlp" if where == "layer" else "")
        with monkeypatch.context() as patching:

            def fails(*args, **kwargs):
                raise MemoryError("out of memory")

            if where == "layer":
                patching.setattr(broken, "forward", fails)
            else:
                patching.setattr(stack, "attention", fails)
            for _ in range(3):
                with pytest.raises(MemoryError):
                    output(model, inputs)
        context = model.__dict__["_attn_patch_state"].context
        assert context._depth == 0 and current(context) is None and not context._inputs
        assert torch.equal(output(model, inputs), expected)
        with pytest.raises(TypeError):  # refused by the model itself, before our hooks see anything
            model(no_such_input=1, **inputs, input_ids=None)
        assert torch.equal(output(model, inputs), expected)


def test_forced_triton_is_refused_when_patching_and_the_model_stays_usable(llama, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter would run them on a CPU
    with untouched(llama):
        with refused(PatchError, "streaming", "impl='triton'", "Triton", "impl='auto'"):
            hap.patch(llama, "streaming", impl="triton")
        with refused(PatchError, "impl='triton'"):
            hap.plan(llama, "streaming", impl="triton")


# -- bad input -----------------------------------------------------------


@pytest.mark.parametrize(
    "error, arguments, words",
    [
        (UnknownPatchError, {"name": "steaming"}, ["'steaming'", "'streaming'", "Available"]),
        (ConfigError, {"windw": 3}, ["streaming", "'windw'", "Did you mean 'window'", "sinks, window"]),
        (ConfigError, {"window": 0}, ["streaming", "window=0", ">= 1"]),
        (ConfigError, {"sinks": -1}, ["streaming", "sinks=-1", ">= 0"]),
        (ConfigError, {"window": "8"}, ["streaming", "window='8'", "str", "int"]),
        (ConfigError, {"window": 2.5}, ["streaming", "window=2.5", "float", "int"]),
        (ConfigError, {"impl": "cuda"}, ["'cuda'", "reference, torch, triton"]),
        (ConfigError, {"cache": "drop"}, ["'drop'", "auto, keep"]),
        (ConfigError, {"name": 3}, ["int", "streaming"]),
        (ConfigError, {"layers": {0: {"windw": 3}}}, ["'windw'", "'window'"]),
        (ConfigError, {"heads": {0: {"window": 0}}}, ["window=0"]),
        (SelectionError, {"layers": 4}, ["text layer 4", "there are 4", "0 to 3"]),
        (SelectionError, {"layers": "2-9"}, ["text layer 9", "0 to 3"]),
        (SelectionError, {"layers": "7:"}, ["'7:'", "no layer", "0 to 3"]),
        (SelectionError, {"layers": []}, ["[]", "no layer"]),
        (SelectionError, {"heads": 4}, ["query head 4", "there are 4", "0 to 3"]),
        (SelectionError, {"heads": []}, ["[]", "no query head", "0 to 3"]),
        (SelectionError, {"heads": "9:"}, ["'9:'", "no query head"]),
        (SelectionError, {"part": "brain"}, ["'brain'", "text, vision"]),
        (ModelMismatchError, {"part": "vision"}, ["streaming", "vision", "text"]),
        (ModelMismatchError, {"part": "cross", "name": "head_gate"}, ["head_gate", "cross", "text"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_arguments_are_named_and_change_nothing(llama, error, arguments, words):
    arguments = dict(arguments)
    name = arguments.pop("name", "streaming")
    for call in (hap.plan, hap.patch):
        with untouched(llama), refused(error, *words):
            call(llama, name, **arguments)


def test_a_head_index_of_the_gate_table_says_query_heads_and_kv_heads(llama):
    with untouched(llama), refused(ModelMismatchError, "gate has 2 heads", "4 query heads", "2 KV heads"):
        hap.patch(llama, "head_gate", gate=[1.0, 0.5])
    with untouched(llama), refused(ModelMismatchError, "gate has 1 layers", "layer 1"):
        hap.patch(llama, "head_gate", gate=[[1.0, 1.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    "gate, words",
    [
        (float("nan"), ["NaN"]),
        ([1.0, float("inf")], ["NaN or infinity"]),
        ([], ["shape [0]"]),
        ([[[1.0]]], ["shape [1, 1, 1]"]),
        ([[1.0], [1.0, 2.0]], ["numbers"]),
        (["a"], ["numbers"]),
        ("half", ["gate='half'"]),
    ],
    ids=str,
)
def test_a_gate_that_is_no_table_of_numbers_is_refused(llama, gate, words):
    with untouched(llama), refused(ConfigError, "head_gate", *words):
        hap.patch(llama, "head_gate", gate=gate)


def plan_of(layers: int, heads: int):
    return {"alphas": [[4.0] * heads] * layers, "betas": [[0.0] * heads] * layers}


@pytest.mark.parametrize(
    "error, plan, words",
    [
        (ModelMismatchError, plan_of(3, 4), ["plan has 3 layers", "the model has 4", "Calibrate"]),
        (ModelMismatchError, plan_of(4, 3), ["3 rules", "4 query heads", "2 KV heads"]),
        (ConfigError, {"alphas": [[1.0]]}, ["alphas", "betas"]),
        (ConfigError, {"alphas": [[1.0]] * 4, "betas": [[1.0, 2.0]] * 4}, ["one shape"]),
        (ConfigError, {"alphas": [["a"]] * 4, "betas": [[1.0]] * 4}, ["numbers"]),
        (ConfigError, {"alphas": 3, "betas": 4}, ["lists of lists"]),
        (ConfigError, {"alphas": [], "betas": []}, ["not empty"]),
        (ConfigError, {"alphas": [[float("nan")]] * 4, "betas": [[1.0]] * 4}, ["layer 0 head 0", "finite"]),
        (ConfigError, "no/such/plan.json", ["'no/such/plan.json'", "does not exist"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_plan_for_another_model_is_refused_with_both_shapes(llama, error, plan, words):
    with untouched(llama), refused(error, "moa", *words):
        hap.patch(llama, "moa", plan=plan)


def test_a_plan_in_a_layer_mapping_is_checked_too(llama):
    with untouched(llama), refused(ModelMismatchError, "plan has 3 layers"):
        hap.patch(llama, "moa", plan=plan_of(4, 4), layers={"0-1": {}, 2: {"plan": plan_of(3, 4)}})


def test_moa_says_it_chooses_its_heads_itself(llama):
    with untouched(llama), refused(SelectionError, "moa", "heads"):
        hap.patch(llama, "moa", plan=plan_of(4, 4), heads=0)


@pytest.mark.parametrize(
    "family, attention", [("falcon", "FalconAttention"), ("bloom", "Bloom"), ("mpt", "MptAttention")]
)
def test_a_model_without_sites_is_refused_with_the_classes_found(family, attention):
    model = model_of(family)
    with (
        untouched(model),
        refused(ModelMismatchError, type(model).__name__, attention, "attention interface"),
    ):
        hap.patch(model, "streaming")


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama", None, 3], ids=lambda t: type(t).__name__)
def test_something_that_is_no_transformers_model_is_refused(thing):
    for call in (
        lambda: hap.patch(thing, "streaming"),
        lambda: hap.unpatch(thing),
        lambda: hap.find_sites(thing),
    ):
        with refused(ModelMismatchError, type(thing).__name__, "transformers model", "from_pretrained"):
            call()


def test_var_needs_a_vision_language_model(llama):
    with untouched(llama), refused(ModelMismatchError, "var", "image_token_id", "vision-language"):
        hap.patch(llama, "var", dims=[0])


@pytest.mark.parametrize(
    "error, options, words",
    [
        (ConfigError, {}, ["'dims'", "required"]),
        (ConfigError, {"dims": "gpt-5"}, ["'gpt-5'", "llama-2-7b"]),
        (ConfigError, {"dims": []}, ["dims"]),
        (ConfigError, {"dims": [-1]}, ["dims=(-1,)"]),
        (ConfigError, {"dims": [0], "rho": 1.5}, ["rho=1.5", "0..1"]),
        (ConfigError, {"dims": [0], "tau": float("nan")}, ["tau=nan"]),
        (ModelMismatchError, {"dims": [64]}, ["dimension 64", "hidden states have 64"]),
        (ModelMismatchError, {"dims": [0], "layers": {0: {"dims": [99]}}}, ["dimension 99"]),
    ],
    ids=str,
)
def test_var_options_are_checked_against_the_model(error, options, words):
    model = model_of("llava")
    with untouched(model), refused(error, "var", *words):
        hap.patch(model, "var", **options)


def test_two_neighborhoods_on_one_site_are_refused():
    model = model_of("vit")
    with hap.patched(model, "neighborhood", window=3, layers=0):
        with (
            untouched(model),
            refused(
                CompositionError,
                "neighborhood cannot be combined with neighborhood",
                "token order",
                "layers.0.attention",
            ),
        ):
            hap.patch(model, "neighborhood", window=2)
        with hap.patched(model, "neighborhood", window=2, layers=1):  # other layers are fine
            output(model, inputs_of(model))


def test_two_vars_on_one_site_are_refused():
    model = model_of("llava")
    with hap.patched(model, "var", dims=[0], first_layer=0):
        with (
            untouched(model),
            refused(CompositionError, "var cannot be combined with var", "key classes", "Remove"),
        ):
            hap.patch(model, "var", dims=[1])


def test_two_forced_executors_on_one_site_are_refused(llama):
    with hap.patched(llama, "streaming", impl="torch"):
        with untouched(llama), refused(CompositionError, "'reference'", "'torch'", "one executor"):
            hap.patch(llama, "head_gate", gate=0.5, impl="reference")
        with hap.patched(llama, "head_gate", gate=0.5) as second:  # the forced one wins over auto
            output(llama, inputs_of(llama))
            assert {s.reason for s in second.report().sites} == {"forced"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window": 5}, ["window 5", "exceeds axis 0", "(4, 4)", "at most 4"]),
        ({"window": [3, 5]}, ["window 5", "axis 1"]),
        ({"window": 3, "dilation": 2}, ["3 x dilation 2 = 6", "at most 2"]),
        ({"window": 2, "stride": 3}, ["stride 3 exceeds window 2"]),
        ({"window": [2, 2, 2]}, ["3 axes", "has 2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [True, False], ids=["grid_given", "grid_from_pixels"])
def test_a_window_that_does_not_fit_the_grid_names_the_bound(options, words, known):
    # given or taken from the first image: one message. What is known when patching is refused when patching
    model = model_of("vit")
    inputs = inputs_of(model)
    with untouched(model, inputs), refused(ModelMismatchError, "neighborhood", *words):
        if known:
            hap.patch(model, "neighborhood", grid=[4, 4], **options)
        else:
            with hap.patched(model, "neighborhood", **options):
                output(model, inputs)


def test_head_mask_warns_while_head_gate_is_active(llama):
    inputs = inputs_of(llama)
    with hap.patched(llama, "head_gate", gate=0.5):
        with pytest.warns(UserWarning, match="head_mask=.*head_gate"):
            output(llama, inputs, head_mask=torch.ones(4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output(llama, inputs)


def test_prompt_needs_a_patched_model(llama):
    with untouched(llama), refused(PatchError, "hap.prompt", "patched model"):
        with hap.prompt(llama, length=3):
            pass


def test_undo_after_every_refusal_leaves_hooks_and_registration_as_before():
    model = model_of("llava")
    before = snapshot(model)
    for name in hap.available():
        for arguments in ({"layers": 99}, {"impl": "no"}, {"no_option": 1}, {"part": "audio"}):
            options = (registry.get(name).examples(model) or [{}])[0]
            with pytest.raises(PatchError):
                hap.patch(model, name, **{**options, **arguments})
    assert snapshot(model) == before and not dispatch.registered()


def test_head_gate_config_object_keeps_its_table(llama):
    table = [[1.0, 0.5, 0.0, 1.0]] * 4
    with hap.patched(llama, HeadGate(gate=table)) as handle:
        assert handle.config.to_dict() == {"gate": table, "trainable_gate": False}


def test_a_patched_model_survives_a_pickle(llama, tmp_path):
    inputs = inputs_of(llama)
    dense = output(llama, inputs)
    with hap.patched(llama, "streaming", **STREAMING):
        edited = output(llama, inputs)
        torch.save(llama, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(again, inputs), edited)
    assert hap.unpatch(again) == 1
    assert torch.equal(output(again, inputs), dense) and not dispatch.registered()


def test_patching_through_two_objects_of_one_model_is_refused():
    model = model_of("llava")
    inner = model.model.language_model
    with hap.patched(inner, "streaming", **STREAMING):
        with (
            untouched(model),
            refused(CompositionError, "layers.0.self_attn", "another model object", "one object"),
        ):
            hap.patch(model, "head_gate", gate=0.5)
    with hap.patched(model, "streaming", **STREAMING):
        with untouched(model), refused(CompositionError, "another model object"):
            hap.patch(inner, "head_gate", gate=0.5)


def test_switching_the_implementation_while_patched_is_noted_and_kept(llama):
    # transformers lets the user do that; then nothing of ours runs, and the report must not look as if it did
    handle = hap.patch(llama, "streaming", **STREAMING)
    llama.set_attn_implementation("eager")
    assert "'eager' after patching" in str(handle.report())
    handle.remove()
    assert llama.config._attn_implementation == "eager" and not dispatch.registered()


def test_a_second_patch_that_fails_half_way_leaves_the_first_alone(monkeypatch):
    model = model_of("llava")
    with hap.patched(model, "streaming", **STREAMING):
        original, calls = stack.SitePatch.to, []

        def fails_at_the_second(self, *args, **kwargs):
            calls.append(self)
            if len(calls) == 2:
                raise MemoryError("no room for site 2")
            return original(self, *args, **kwargs)

        with untouched(model):
            with monkeypatch.context() as patching, pytest.raises(MemoryError):
                patching.setattr(stack.SitePatch, "to", fails_at_the_second)
                hap.patch(model, "head_gate", part="vision", gate=0.5)
        assert implementations(model) == ["sdpa", "hf_attn_patch", "sdpa"]
