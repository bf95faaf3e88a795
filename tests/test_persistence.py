"""Patch adapters on disk: what comes back, and what a damaged or foreign folder says."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_attn_patch as hap
from hf_attn_patch.errors import AdapterError, ConfigError, ModelMismatchError, PatchError, UnknownPatchError

from .small import close, differ, inputs_of, model_of, output, refused, untouched

CONFIG, TENSORS = "attn_patch_config.json", "attn_patch.safetensors"


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture
def gates(tmp_path):
    """A folder with a saved head_gate adapter."""
    with hap.patched(model_of("llama"), "head_gate", gate=[1.0, 0.5, 0.0, 1.0]) as handle:
        return handle.save(tmp_path / "gates")


def edit(folder, **changes):
    """Change keys of the JSON of an adapter (None of a dotted path is not supported: one level only)."""
    file = folder / CONFIG
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps(data))


def test_folder_holds_json_and_safetensors_and_no_pickle(gates, llama, tmp_path):
    assert sorted(p.name for p in gates.iterdir()) == [TENSORS, CONFIG]
    data = json.loads((gates / CONFIG).read_text())
    assert (
        data["format"] == 1 and data["package_version"] == hap.__version__ and data["method"] == "head_gate"
    )
    assert data["base_model"]["model_type"] == "llama"
    assert data["sites"][1] == {"path": "model.layers.1.self_attn", "heads": 4, "kv_heads": 2}
    tensors = load_file(gates / TENSORS)
    assert list(tensors) == list(data["tensors"])
    raw = (gates / TENSORS).read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"]["format"] == "pt"
    with hap.patched(llama, "streaming") as handle:
        handle.save(tmp_path / "no_tensors")
    assert [p.name for p in (tmp_path / "no_tensors").iterdir()] == [CONFIG]


def test_gates_that_were_changed_after_patching_come_back(llama, tmp_path):
    inputs = inputs_of(llama)
    for trainable in (False, True):
        with hap.patched(llama, "head_gate", trainable_gate=trainable) as handle:
            for site in handle.sites:
                with torch.no_grad():
                    site.module.attn_patch.patches["head_gate"].gate.uniform_(0.0, 1.0)
            expected = output(llama, inputs)
            handle.save(tmp_path)
        loaded = hap.load(llama, tmp_path)
        assert torch.equal(output(llama, inputs), expected)
        loaded.remove()


@pytest.mark.parametrize("trainable", [False, True])
def test_changed_gates_of_chosen_heads_count_and_come_back(llama, tmp_path, trainable):
    inputs = inputs_of(llama)
    heads = {"0-1": {"gate": 0.5}, 3: {"gate": 0.25}}
    with hap.patched(llama, "head_gate", heads=heads, trainable_gate=trainable) as handle:
        before = output(llama, inputs)
        for module in llama.modules():
            if isinstance(getattr(module, "gate", None), torch.Tensor):
                with torch.no_grad():
                    module.gate.mul_(0.5)
        expected = output(llama, inputs)
        assert differ(expected, before)
        handle.save(tmp_path)
    with hap.patched(llama, "head_gate", gate=[0.25, 0.25, 1.0, 0.125]):
        close(output(llama, inputs), expected)
    loaded = hap.load(llama, tmp_path)
    assert torch.equal(output(llama, inputs), expected)
    loaded.remove()


def test_saving_over_an_adapter_leaves_nothing_of_it(gates, llama):
    inputs = inputs_of(llama)
    with hap.patched(llama, "streaming", window=2) as handle:
        expected = output(llama, inputs)
        handle.save(gates)
    assert [p.name for p in gates.iterdir()] == [CONFIG]
    with hap.load(llama, gates) as loaded:
        assert loaded.name == "streaming" and torch.equal(output(llama, inputs), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": slice(1, None)},
        {"layers": {(0,): {"window": 2}, "1": {"window": 5}}},
        {"heads": "0,2"},
        {"heads": {0: {"window": 2}, (1, 2): {"window": 5, "sinks": 0}}},
        {"layers": (i for i in (0,)), "heads": range(2)},
        {"part": "text", "impl": "reference", "cache": "keep"},
    ],
    ids=lambda a: ",".join(a),
)
def test_selection_and_settings_survive(llama, tmp_path, arguments):
    inputs = inputs_of(llama)
    with hap.patched(llama, "streaming", sinks=1, window=3, **arguments) as handle:
        expected, sites = output(llama, inputs), [s.path for s in handle.sites]
        handle.save(tmp_path)
        first = (tmp_path / CONFIG).read_text()
    with hap.load(llama, tmp_path) as loaded:
        assert torch.equal(output(llama, inputs), expected)
        assert [s.path for s in loaded.sites] == sites
        loaded.save(tmp_path)
    assert (tmp_path / CONFIG).read_text() == first


def test_impl_can_be_chosen_anew_when_loading(llama, tmp_path):
    with hap.patched(llama, "streaming", impl="torch") as handle:
        handle.save(tmp_path)
    with hap.load(llama, tmp_path, impl="reference") as loaded:
        output(llama, inputs_of(llama))
        assert loaded.report().sites[0].executor == "reference"
    with untouched(llama), refused(PatchError, "'cuda'"):
        hap.load(llama, tmp_path, impl="cuda")


def test_moa_plan_file_is_not_needed_after_saving(llama, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"alphas": [[4, 5, 6, 7]] * 2, "betas": [[0.0] * 4] * 2}))
    options = {"sinks": 2, "block": 1, "smallest": 3}
    inputs = inputs_of(llama)
    with hap.patched(llama, "moa", plan=str(plan), **options) as handle:
        expected = output(llama, inputs)
        handle.save(tmp_path / "adapter")
    plan.unlink()
    with hap.load(llama, tmp_path / "adapter"):
        assert torch.equal(output(llama, inputs), expected)


def test_two_patches_are_saved_one_by_one(llama, tmp_path):
    inputs = inputs_of(llama)
    with hap.patched(llama, "streaming", window=3) as a, hap.patched(llama, "head_gate", gate=0.5) as b:
        expected = output(llama, inputs)
        a.save(tmp_path / "a"), b.save(tmp_path / "b")
    with hap.load(llama, tmp_path / "a"), hap.load(llama, str(tmp_path / "b")):
        assert torch.equal(output(llama, inputs), expected)


# -- damaged, foreign and newer folders -----------------------------------------------------------


def test_missing_folder_and_folder_without_adapter(llama, tmp_path):
    with untouched(llama):
        with refused(AdapterError, "./nowhere", "does not exist"):
            hap.load(llama, "./nowhere")
        (tmp_path / "other.txt").write_text("x")
        with refused(AdapterError, CONFIG, "other.txt", "handle.save()"):
            hap.load(llama, tmp_path)
        with refused(AdapterError, "somebody/adapter", "hub"):
            hap.load(llama, "somebody/adapter")


@pytest.mark.parametrize("keep", [0, 1, 40, 200, -3])
def test_truncated_json(gates, llama, keep):
    file = gates / CONFIG
    file.write_text(file.read_text()[:keep])
    with untouched(llama), refused(AdapterError, CONFIG, "truncated"):
        hap.load(llama, gates)


@pytest.mark.parametrize("text", ["[]", "3", "null", "\x00\x01"])
def test_json_that_is_no_adapter(gates, llama, text):
    (gates / CONFIG).write_text(text)
    with untouched(llama), refused(AdapterError, CONFIG):
        hap.load(llama, gates)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors(gates, llama, keep):
    file = gates / TENSORS
    file.write_bytes(file.read_bytes()[:keep])
    with untouched(llama), refused(AdapterError, TENSORS, "bytes", "corrupted or truncated"):
        hap.load(llama, gates)


def test_missing_tensors(gates, llama):
    (gates / TENSORS).unlink()
    with untouched(llama), refused(AdapterError, TENSORS, "missing", "2 tensors"):
        hap.load(llama, gates)


def test_tensors_that_do_not_match_the_json(gates, llama):
    tensors = load_file(gates / TENSORS)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.ones(7)}, gates / TENSORS)
    with untouched(llama), refused(AdapterError, name, "[7]", "[4]"):
        hap.load(llama, gates)
    save_file({"stranger": torch.ones(1), **tensors}, gates / TENSORS)
    with untouched(llama), refused(AdapterError, "stranger"):
        hap.load(llama, gates)
    # both agree, but it is not what the method needs
    save_file({"stranger": torch.ones(1), **tensors}, gates / TENSORS)
    edit(gates, tensors={"stranger": [1], **{k: list(v.shape) for k, v in tensors.items()}})
    with untouched(llama), refused(AdapterError, "stranger", "not patched"):
        hap.load(llama, gates)
    save_file({name: tensors[name]}, gates / TENSORS)
    edit(gates, tensors={name: [4]})
    with untouched(llama), refused(AdapterError, "lacks", "gate"):
        hap.load(llama, gates)


def test_newer_version_is_refused_with_the_names_of_its_keys(gates, llama):
    edit(gates, package_version="9.1", rotation="left", zeta=1)
    with untouched(llama), refused(AdapterError, "9.1", "rotation, zeta", hap.__version__, "Upgrade"):
        hap.load(llama, gates)


def test_newer_format_is_refused(gates, llama):
    edit(gates, format=2)
    with untouched(llama), refused(AdapterError, "format 2", "Upgrade"):
        hap.load(llama, gates)


def test_option_of_a_newer_version_is_refused_by_name(gates, llama):
    edit(gates, config={"gate": 1.0, "temperature": 2})
    with untouched(llama), refused(ConfigError, "head_gate", "'temperature'"):
        hap.load(llama, gates)


def test_method_that_is_not_installed_is_named(gates, llama):
    edit(gates, method="paint_2027")
    with untouched(llama), refused(UnknownPatchError, "'paint_2027'", "Available"):
        hap.load(llama, gates)


def test_keys_that_are_missing_are_named(gates, llama):
    data = json.loads((gates / CONFIG).read_text())
    del data["sites"], data["impl"]
    (gates / CONFIG).write_text(json.dumps(data))
    with untouched(llama), refused(AdapterError, "lacks impl, sites"):
        hap.load(llama, gates)


@pytest.mark.parametrize(
    "key", ["method", "config", "part", "layers", "heads", "impl", "cache", "base_model", "sites"]
)
@pytest.mark.parametrize("value", [3.5, "what", [None], {"a": 1}, [{}], True], ids=repr)
def test_no_value_in_the_json_leads_to_a_foreign_error(gates, llama, key, value):
    edit(gates, **{key: value})
    with untouched(llama):
        try:
            hap.load(llama, gates).remove()
        except PatchError as refusal:
            assert str(refusal)


@pytest.mark.parametrize("value", [3.5, "what", [None], {"a": 1}, {"a": "b"}], ids=repr)
def test_no_value_of_tensors_leads_to_a_foreign_error(gates, llama, value):
    edit(gates, tensors=value)
    with untouched(llama), pytest.raises(PatchError):
        hap.load(llama, gates)


def test_adapter_for_another_family(gates):
    model = model_of("gpt2")
    with untouched(model), refused(ModelMismatchError, "made for a llama model", "this is gpt2"):
        hap.load(model, gates)


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"num_hidden_layers": 1}, ["2 sites", "1 of which this model lacks", "model.layers.1.self_attn"]),
        ({"num_hidden_layers": 3}, ["2 sites", "3", "model.layers.2.self_attn was no site"]),
        ({"num_attention_heads": 8}, ["model.layers.0.self_attn", "4 heads / 2 KV heads", "8 heads"]),
        ({"num_key_value_heads": 4}, ["4 heads / 2 KV heads", "4 heads / 4 KV heads"]),
    ],
    ids=str,
)
def test_adapter_for_another_shape_of_the_family(tmp_path, shape, words):
    with hap.patched(model_of("llama"), "streaming", window=2) as handle:
        handle.save(tmp_path)
    model = model_of("llama", **shape)
    with untouched(model), refused(ModelMismatchError, *words):
        hap.load(model, tmp_path)
