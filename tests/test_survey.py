"""What a loaded model is: wrappers, several models in one, parts, devices, and patches found through any object."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_attn_patch as hap
from hf_attn_patch.errors import CompositionError, ModelMismatchError
from hf_attn_patch.install.dispatch import registered
from hf_attn_patch.install.plan import restricts
from hf_attn_patch.model import mesh
from hf_attn_patch.model import sites as site_module
from hf_attn_patch.model.sites import find_sites
from hf_attn_patch.model.survey import Survey
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

from .small import model_of, refused

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


def test_two_independent_models_in_one_wrapper_are_refused_by_name():
    pair = Wrapper(policy=tiny_model("llama"), reference=tiny_model("llama", seed=1))
    with refused(ModelMismatchError, "2 independent", "policy", "reference", "wrapper.policy"):
        hap.patch(pair, "streaming", **STREAMING)
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


# -- names on configs ------------------------------------------------------------------------------------------------


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


# -- parts -----------------------------------------------------------------------------------------------------------

# family -> [(piece of the path, part, first layer, merged)]
PARTS = {
    "idefics2": [("perceiver_resampler", "bridge", 0), ("text_model", "text", 0), ("vision_model", "vision", 0)],
    "granite_speech": [("qformer", "bridge", 0), ("language_model", "text", 0)],
    "blip-2": [("qformer", "bridge", 0), ("language_model", "text", 0), ("vision_model", "vision", 0)],
    "instructblip": [("qformer", "bridge", 0), ("language_model", "text", 0)],
    "blip_2_qformer": [("attention", "bridge", 0)],
    "kosmos-2": [("x_attn", "bridge", 0), ("text_model", "text", 0)],
    "pix2struct": [("encoder_decoder_attention", "cross", 0), ("self_attention", "decoder", 0)],
    "qwen2_5_omni": [("talker", "bridge", 0), ("token2wav", "bridge", 2), ("language_model", "text", 0)],
    "evolla": [("protein_encoder", "encoder", 0), ("model.layers", "text", 0)],
    "csm": [("backbone_model", "text", 0), ("depth_decoder", "bridge", 0), ("codec_model", "audio", 0)],
    "molmo2": [("multi_modal_projector", "bridge", 0), ("language_model", "text", 0)],
    "pi0": [("dit", "bridge", 0), ("language_model", "text", 0)],
    "florence2": [("language_model.decoder", ("decoder", "cross"), 0), ("language_model.encoder", "encoder", 0)],
    "t5gemma2": [("model.decoder", "decoder", 0), ("text_model", "encoder", 0), ("vision_tower", "vision", 0)],
    "rt_detr": [("decoder.layers", "decoder", 0)],
    "speech_to_text": [("model.encoder", "encoder", 0)],
    "xclip": [("mit", "vision", 4), ("text_model", "text", 0)],
    "mllama_vision_model": [("transformer", "vision", 0)],
    "sam": [("final_attn_token_to_image", "cross", 4)],
}  # fmt: skip


@pytest.mark.parametrize("family", list(PARTS))
def test_text_is_the_language_model_and_nothing_beside_it(family):
    sites = find_sites(model_of(family))
    for piece, part, first in PARTS[family]:
        own = [s for s in sites if piece in s.path]
        assert own and {s.part for s in own} <= ({part} if isinstance(part, str) else set(part)), piece
        assert min(s.layer for s in own) == first, piece
    text = [s for s in sites if s.part == "text"]
    assert [s.layer for s in text] == list(range(len(text)))


def test_detectors_decode_no_text_and_speech_encoders_read_none():
    assert {s.parts for s in find_sites(model_of("rt_detr"))} == {
        frozenset({"encoder", "vision"}), frozenset({"decoder", "vision"})
    }  # fmt: skip
    encoder = [s for s in find_sites(model_of("speech_to_text")) if s.part == "encoder"]
    assert {s.parts for s in encoder} == {frozenset({"encoder", "audio"})}


def test_a_bridge_is_edited_only_where_it_is_asked_for():
    model = model_of("blip-2")
    bridge = {s.path for s in find_sites(model) if "bridge" in s.parts}
    assert bridge and not bridge & {s.path for s in hap.plan(model, "head_gate", gate=0.5).sites}
    assert {s.path for s in hap.plan(model, "head_gate", part="bridge", gate=0.5).sites} == bridge
    with refused(ModelMismatchError, "streaming", "bridge"):
        hap.plan(model, "streaming", part="bridge")
    with hap.patched(model, "head_gate", part="bridge", gate=0.5) as handle:
        logits(model)
        assert {s.executor for s in handle.report().sites} != {""}


def test_merged_attention_is_its_own_kind():
    model = model_of("t5gemma2")
    merged = [s for s in find_sites(model) if s.merged]
    assert merged and {s.part for s in merged} == {"decoder"} and "merged" in str(merged[0])
    with refused(ModelMismatchError, "streaming", merged[0].path, "encoder"):
        hap.plan(model, "streaming", part="decoder", window=4)
    assert hap.plan(model, "head_gate", part="decoder", gate=0.5).sites == merged
    assert not any(s.merged for family in ("t5gemma", "bart", "llama") for s in find_sites(model_of(family)))


def test_methods_with_rules_are_told_from_those_without():
    build = hap.registry.build
    assert restricts(build("streaming", {})) and restricts(build("block_topk", {}))
    assert not restricts(build("head_gate", {})) and not restricts(build("pasta", {"marked": [[0, 1]]}))


# -- where tensors live ------------------------------------------------------------------------------------------------


def offloaded(kind: str, model, folder):
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    return accelerate.dispatch_model(
        model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatched"])
@pytest.mark.parametrize(
    "name, options", [("head_gate", {"gate": 0.5}), ("streaming", STREAMING), ("moh", {})]
)
def test_tensors_of_a_patch_live_where_the_queries_do(kind, name, options, tmp_path):
    model = tiny_model("llama")
    dense = logits(model)
    torch.manual_seed(0)
    with hap.patched(model, name, **options):
        want = logits(model)
    model = offloaded(kind, model, tmp_path)
    assert {p.device.type for p in model.model.layers[1].self_attn.parameters()} == {"meta"}
    torch.manual_seed(0)
    with hap.patched(model, name, **options) as handle:
        held = [t for s in handle.sites for t in s.module.attn_patch.state_dict().values()]
        assert {t.device.type for t in held} <= {"cpu"}
        torch.testing.assert_close(logits(model), want)
    torch.testing.assert_close(logits(model), dense)


def test_a_model_that_is_only_a_shape_keeps_its_patches_there():
    like = tiny_model("llama")
    with torch.device("meta"):
        model = type(like)(like.config)
    handle = hap.patch(model, "head_gate", gate=0.5)
    assert {t.device.type for s in handle.sites for t in s.module.attn_patch.state_dict().values()} == {
        "meta"
    }


# -- many processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_trainable_patch_comes_before_ddp(alone):
    model = tiny_model("llama")
    wrapped = DistributedDataParallel(model)
    names = [n for n, _ in model.named_modules()]
    with refused(ModelMismatchError, "gate", "DistributedDataParallel", "Patch first"):
        hap.patch(wrapped, "head_gate", gate=0.5, trainable_gate=True)
    assert [n for n, _ in model.named_modules()] == names
    with hap.patched(wrapped, "head_gate", gate=0.5):  # nothing to train
        pass
    hap.patch(tiny_model("llama"), "head_gate", gate=0.5, trainable_gate=True)


def test_a_trainable_patch_comes_before_fully_shard(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("llama")
    device_mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=device_mesh)
    assert mesh.tensor_parallel_size(model) == 1 and all(s.slice is None for s in find_sites(model))
    with refused(ModelMismatchError, "gate", "FSDP", "Patch first"):
        hap.patch(model, "head_gate", gate=0.5, trainable_gate=True)
    with hap.patched(model, "head_gate", gate=0.5):
        pass


@pytest.mark.parametrize("told, word", [({"ep_size": 2}, "expert"), ({"pp_size": 2}, "pipeline")])
def test_other_kinds_of_parallelism_are_refused(told, word):
    from types import SimpleNamespace

    model = tiny_model("llama")
    model.config.__dict__["distributed_config"] = SimpleNamespace(**told)
    with refused(ModelMismatchError, "streaming", word):
        hap.patch(model, "streaming")


def test_tensor_parallel_equals_one_process_or_is_refused(tmp_path):
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=64)
    model.save_pretrained(tmp_path)
    root = Path(__file__).parents[1]
    run = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.tp_worker"]
    command = [sys.executable, "-m", *run, tmp_path]  # not as a file: tests/triton would hide triton
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=280
    )
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("> ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    assert "8 heads / 4 KV, 0-3 here" in lines[0]
    assert all(line.endswith("equal") for line in lines[1:-4]) and len(lines) > 20
    expected = (("moh", "refused"), ("s2", "refused"), ("head_gate", "trained apart"), ("0 to 7",))
    for line, words in zip(lines[-4:], expected):
        assert all(word in line for word in words), line
