"""An adapter is data of a stranger: what it names, how much of it there is, and where its files lead."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import AdapterError, ConfigError, PatchError, SelectionError
from hf_attn_patch.install import adapter_data, adapters
from hf_attn_patch.model import selection
from hf_attn_patch.options import from_a_stranger, option_fields, option_file, takes_path

from .small import inputs_of, model_of, output, refused, untouched
from .test_adapter_fuzz import model_of as shared_model
from .test_adapter_fuzz import saved

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG, TENSORS = adapters.CONFIG_NAME, adapters.TENSORS_NAME
_opened: list[str] | None = None


def _audit(event, arguments):
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # sees every way to open a file, also those of C


@contextmanager
def opened():
    """Paths that are opened in the block."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture
def streaming(llama, tmp_path):
    with hap.patched(llama, "streaming", sinks=1, window=4) as handle:
        return handle.save(tmp_path / "streaming")


@pytest.fixture
def gates(llama, tmp_path):
    with hap.patched(llama, "head_gate", gate=[1.0, 0.5, 0.0, 1.0]) as handle:
        return handle.save(tmp_path / "gates")


def edit(folder, change):
    data = json.loads((folder / CONFIG).read_text())
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))


# -- options that are paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(hap.available()))
@pytest.mark.parametrize("where", ["config", "layers"])
def test_no_option_of_any_method_opens_a_file_while_an_adapter_loads(name, where, tmp_path):
    canary = tmp_path / "canary.json"
    canary.write_text('{"secret": "THE-SECRET"}')
    family, files = saved(name)[0]
    model, _ = shared_model(family)
    values = [str(canary), [str(canary)], {"path": str(canary)}, {"0": [str(canary)]}, {"dims": str(canary)}]
    for field in option_fields(registry.get(name)):
        for value in values if where == "config" else values[:1]:
            for file, content in files.items():
                (tmp_path / file).write_bytes(content)

            def change(data, field=field, value=value):
                if where == "config":
                    data["config"][field.name] = value
                else:
                    data["layers"] = {"0": {field.name: value}, "all": {}}

            edit(tmp_path, change)
            with opened() as paths, pytest.raises(PatchError) as refusal:
                hap.load(model, tmp_path)
            assert not [p for p in paths if "canary" in p], f"{name}.{field.name}"
            assert "THE-SECRET" not in str(refusal.value)
            assert not hap.active(model)


@pytest.mark.parametrize("name", list(hap.available()))
def test_every_option_that_takes_text_beside_data_is_known_to_be_a_path(name):
    cls = registry.get(name)
    hints = typing.get_type_hints(cls)
    for field in option_fields(cls):
        kinds = typing.get_args(hints[field.name])
        if str in kinds and {dict, list} & set(kinds):
            assert takes_path(field, hints[field.name]), f"{name}.{field.name}"


def test_option_of_a_plugin_that_nobody_marked_is_refused_by_its_type(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(hap.available()))

    @registry.register_patch("reader")
    @dataclass
    class Reader(registry.Patch):
        """Reads what it is given."""

        table: dict | str = registry.option(default_factory=dict, help="data, or a path to it")

        def edit(self, program, call):
            pass

    with hap.patched(llama, "reader") as handle:
        handle.save(tmp_path)
    edit(tmp_path, lambda d: d["config"].update(table="/etc/hostname"))
    with untouched(llama), refused(AdapterError, "reader", "'table'", "handle.save()", "table=PATH"):
        hap.load(llama, tmp_path)


def test_option_files_open_for_the_user_and_not_for_an_adapter(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("{}")
    assert option_file("moa", "plan", str(file)) == "{}"
    with from_a_stranger(), opened() as paths, refused(AdapterError, "moa", "'plan'", "nothing was opened"):
        option_file("moa", "plan", str(file))
    assert not [p for p in paths if str(file) in p]
    file.write_bytes(b"\xff\xfe")
    with refused(ConfigError, "moa", "cannot be read as text"):
        option_file("moa", "plan", str(file))


def test_a_name_of_a_table_is_no_path():
    cls = registry.get("var")
    with from_a_stranger():
        assert cls.from_dict({"dims": "llama-2-7b"}).dims == "llama-2-7b"
        with refused(AdapterError, "var", "'dims'"):
            cls.from_dict({"dims": "llama-2-7b.json"})


# -- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('"window": 4', '"window": 4, "window": 1', ["'window'", "twice"]),
        ('"window": 4', '"window": ' + "9" * 5000, ["5000 digits"]),
        ('"window": 4', '"window": 2147483648', ["10 digits", "2,147,483,647"]),
        ('"window": 4', '"window": 1e400', ["1e400"]),
        ('"window": 4', '"window": NaN', ["NaN"]),
        ('"window": 4', '"window": -Infinity', ["-Infinity"]),
        ('"window": 4', '"window": ' + "[" * 300 + "]" * 300, ["nests"]),
        ('"window": 4', '"window": "' + "x" * (1 << 21) + '"', ["characters"]),
        ('"window": 4', '"window": "\\ud800"', ["Unicode"]),
        ('"window": 4', '"window": [' + "0," * 260_000 + "0]", ["250,000 values"]),
        ('"window": 4', '"window": "' + " " * (17 << 20) + '"', ["bytes long"]),
        ('"layers": null', '"layers": "' + "0," * 9_000 + '0"', ["'layers'", "bytes"]),
        ('"layers": null', '"layers": "' + "0," * 5_000 + '0"', ["5001 terms"]),
        ('"layers": null', '"layers": "' + "9" * 5000 + '"', ["cannot read"]),
        ('"heads": null', '"heads": true', ["'heads'"]),
        ('"path": "model.layers.0.self_attn"', '"path": ["a"]', ["'sites'"]),
        ('"model_type": "llama"', '"model_type": 3', ["'base_model'"]),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)  # fmt: skip
def test_what_no_save_writes_is_refused_at_once(streaming, llama, old, new, words):
    text = (streaming / CONFIG).read_text()
    assert old in text
    (streaming / CONFIG).write_text(text.replace(old, new, 1))
    start = time.monotonic()
    with untouched(llama), pytest.raises(PatchError) as refusal:
        hap.load(llama, streaming)
    assert isinstance(refusal.value, AdapterError | SelectionError)
    assert all(w in str(refusal.value) for w in words) and len(str(refusal.value)) < 600
    assert time.monotonic() - start < 5


def test_a_site_that_stands_twice_is_refused(streaming, llama):
    edit(streaming, lambda d: d.update(sites=d["sites"] * 2))
    with untouched(llama), refused(AdapterError, "'sites'", "twice"):
        hap.load(llama, streaming)


def test_the_bounds_hold_a_plan_far_larger_than_any_model():
    plan = {k: [[0.123456789] * 128 for _ in range(128)] for k in ("alphas", "betas")}
    raw = json.dumps(plan, indent=2).encode()
    assert len(raw) < adapter_data.FILE_BYTES / 10 and adapter_data.parse(raw, "plan") == plan


def test_terminal_codes_of_an_adapter_are_not_printed(streaming, llama):
    edit(streaming, lambda d: d["base_model"].update(model_type="\x1b[2J", id="\x1b]0;x\x07"))
    with pytest.raises(PatchError) as refusal:
        hap.load(llama, streaming)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("selector", [",".join("0" * 5000), "9" * 20, "0-" + "9" * 20])
def test_selectors_are_bounded_for_everybody(selector):
    with pytest.raises(SelectionError) as refusal:
        selection.indices(selector, 4, "layer")
    assert len(str(refusal.value)) < 300


def test_a_selector_nested_without_end_is_refused():
    endless: list = []
    endless.append(endless)
    with refused(SelectionError, "nested too deep"):
        selection.indices(endless, 4, "layer")


# -- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t * float("nan"), ["NaN or infinity"]),
        (lambda t: t + float("inf"), ["NaN or infinity"]),
        (lambda t: (t + 1).double() * 1e300, ["at most"]),
        (lambda t: t.long(), ["I64", "float32"]),
        (lambda t: t.bool(), ["BOOL", "float32"]),
        (lambda t: t.to(torch.complex64), ["C64", "float32"]),
        (lambda t: t.to(torch.float8_e4m3fn), ["F8_E4M3", "float32"]),
        (lambda t: t * 0, ["is not what", CONFIG, "do not belong together"]),
    ],
    ids=["nan", "inf", "huge", "int", "bool", "complex", "fp8", "contradicts"],
)
def test_values_that_cannot_be_meant_are_refused(gates, llama, change, words):
    save_file({k: change(v) for k, v in load_file(gates / TENSORS).items()}, gates / TENSORS)
    with untouched(llama), refused(AdapterError, *words):
        hap.load(llama, gates)


def test_half_precision_of_the_same_values_is_fine(gates, llama):
    save_file({k: v.half() for k, v in load_file(gates / TENSORS).items()}, gates / TENSORS)
    with hap.load(llama, gates):
        pass


def test_a_header_of_any_length_is_refused_before_it_is_read(gates, llama):
    raw = (gates / TENSORS).read_bytes()
    for length in (2**63, 1 << 40, len(raw)):
        (gates / TENSORS).write_bytes(struct.pack("<Q", length) + raw[8:])
        with untouched(llama), refused(AdapterError, TENSORS, "corrupted", f"{length:,}"):
            hap.load(llama, gates)


def test_shapes_are_compared_with_the_model_before_any_data_is_read(gates, llama, monkeypatch):
    huge = [1 << 20, 1 << 20]
    name = "model.layers.0.self_attn.gate"
    header = json.dumps({name: {"dtype": "F32", "shape": huge, "data_offsets": [0, 4 << 40]}}).encode()
    with open(gates / TENSORS, "wb") as file:  # sparse: four tebibytes that take no room
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + (4 << 40))
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
    edit(gates, lambda d: d.update(tensors={name: huge}, layers=0, sites=d["sites"][:1]))
    monkeypatch.setattr(adapters, "read_tensors", lambda *_: pytest.fail("data was read"))
    with untouched(llama), refused(PatchError, name, str(huge), "[4]"):
        hap.load(llama, gates)


def test_learned_values_may_differ_from_the_config(llama, tmp_path):
    inputs = inputs_of(llama)
    with hap.patched(llama, "head_gate", gate=0.5, trainable_gate=True) as handle:
        with torch.no_grad():
            handle.sites[0].module.attn_patch.patches["head_gate"].gate.fill_(0.25)
        expected = output(llama, inputs)
        handle.save(tmp_path)
    assert "changed" not in json.loads((tmp_path / CONFIG).read_text())
    with hap.load(llama, tmp_path):
        assert torch.equal(output(llama, inputs), expected)


def test_buffers_that_were_written_to_are_named_in_the_config(llama, tmp_path):
    with hap.patched(llama, "head_gate", gate=0.5) as handle:
        with torch.no_grad():
            handle.sites[1].module.attn_patch.patches["head_gate"].gate.fill_(0.25)
        handle.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["changed"] == ["model.layers.1.self_attn.gate"]
    edit(tmp_path, lambda d: d.pop("changed"))
    with untouched(llama), refused(AdapterError, "model.layers.1.self_attn.gate"):
        hap.load(llama, tmp_path)


# -- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_link_out_of_the_folder_is_not_followed(gates, llama, tmp_path, name):
    outside = tmp_path / "outside"
    (gates / name).rename(outside)
    (gates / name).symlink_to(outside)
    with untouched(llama), opened() as paths, refused(AdapterError, name, "link", "leaves the folder"):
        hap.load(llama, gates)
    assert str(outside) not in paths


def hub_snapshot(folder, root):
    """`folder` as the hub cache keeps it: links into blobs."""
    snapshot, blobs = root / "models--a--b" / "snapshots" / "0123abc", root / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    return snapshot


def test_a_hub_snapshot_loads_through_its_links_and_is_never_written(gates, llama, tmp_path):
    snapshot = hub_snapshot(gates, tmp_path / "hub")
    with hap.load(llama, snapshot) as handle:
        before = {p: (os.readlink(p), p.read_bytes()) for p in snapshot.iterdir()}
        with refused(AdapterError, "hub cache", "folder of your own"):
            handle.save(snapshot)
        assert {p: (os.readlink(p), p.read_bytes()) for p in snapshot.iterdir()} == before


def test_hub_ids_are_fetched_by_huggingface_hub_with_the_revision(gates, llama, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: (asked.append((name, more)), gates)[1]
    )
    adapters.load(llama, "somebody/adapter", revision="0123abc").remove()
    assert asked == [("somebody/adapter", {"revision": "0123abc", "allow_patterns": [CONFIG, TENSORS]})]
    with untouched(llama):
        for name in ("https://evil/x", "a/b/c", "a/../b", "~/b", "file:/x", "-x/y"):
            with refused(AdapterError, "not a hub id"):
                adapters.load(llama, name)
        with refused(AdapterError, "revision='main'", "local folder"):
            adapters.load(llama, gates, revision="main")
    assert len(asked) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_is_no_file_and_nobody_waits_for_it(gates, llama, name):
    (gates / name).unlink()
    os.mkfifo(gates / name)
    with untouched(llama), refused(AdapterError, name):
        hap.load(llama, gates)


def test_folders_of_a_training_adapter_stay_inside(llama, tmp_path):
    from hf_attn_patch import training

    with hap.patched(llama, "streaming"):
        training.save(llama, tmp_path / "a")
    index = tmp_path / "a" / "adapters.json"
    for name in ("../outside", "/etc", "patch-0-streaming/../../outside", "."):
        index.write_text(json.dumps({"format": 1, "patches": [name], "peft": None}))
        with untouched(llama), refused(AdapterError, "adapters.json", "does not write"):
            training.load(llama, tmp_path / "a")
    index.write_text(json.dumps({"format": 1, "patches": [], "peft": "../peft"}))
    with untouched(llama), refused(AdapterError, "does not write"):
        training.load(llama, tmp_path / "a")
    (tmp_path / "a" / "patch-0-streaming").rename(tmp_path / "b")
    (tmp_path / "a" / "patch-0-streaming").symlink_to(tmp_path / "b")
    index.write_text(json.dumps({"format": 1, "patches": ["patch-0-streaming"], "peft": None}))
    with untouched(llama), refused(AdapterError, "link"):
        training.load(llama, tmp_path / "a")


def test_peft_weights_that_are_pickles_are_refused(llama, tmp_path):
    pytest.importorskip("peft")
    from hf_attn_patch import training

    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "adapters.json").write_text(json.dumps({"format": 1, "patches": [], "peft": "peft"}))
    with untouched(llama), refused(AdapterError, "adapter_model.safetensors", "pickles"):
        training.load(llama, tmp_path)
