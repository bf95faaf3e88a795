"""Where models live: offloaded layers, DDP, FSDP, tensor parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import hf_attn_patch as hap
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.model import mesh
from hf_attn_patch.model.sites import find_sites
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

from .small import refused

STREAMING = {"sinks": 1, "window": 3}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model, batch=1, length=12))).logits


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
    with refused(ModelMismatchError, "gate", "DistributedDataParallel", "Patch first"):
        hap.patch(model, "head_gate", gate=0.5, trainable_gate=True)  # the inner model, which does not know
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
    assert all(line.endswith("equal") for line in lines[1:-6]) and len(lines) > 20
    expected = (
        ("moh", "refused"),
        ("s2", "refused"),
        ("head_gate", "trained apart"),
        ("save", "heads of one rank"),
        ("0 to 7",),
        ("sequence parallel",),
    )
    for line, words in zip(lines[-6:], expected):
        assert all(word in line for word in words), line
