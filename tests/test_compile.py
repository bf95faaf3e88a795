"""torch.compile and torch.export of patched models with the torch executor, static caches, continuous batching."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_attn_patch as hap
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model


def _script(name):
    """A script as a module; its folder on the path would hide the `kernels` and `coverage` libraries."""
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parent.parent / "scripts" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_table = _script("compile_table")
WRONG, compiled, exported = _table.WRONG, _table.compiled, _table.exported

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def llama():
    return tiny_model("llama").eval()


def ids_of(rows=2, length=24, seed=1):
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


METHODS = ("streaming", "s2", "moh", "entropy_scale", "quest", "neighborhood", "pai")


@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_is_one_graph(method):
    assert compiled(method) == "fullgraph"


@pytest.mark.parametrize("method", ["streaming", "head_gate"])
def test_a_prefill_without_mask_is_one_graph(method):
    assert compiled(method, padded=False, backend="aot_eager") == "fullgraph"


def test_what_looks_at_values_breaks_the_graph_and_is_right():
    assert compiled("sparsifiner") == "breaks"


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same():
    llama = tiny_model("llama", num_hidden_layers=1).eval()
    ids = ids_of()
    with hap.patched(llama, "streaming", window=6, sinks=2), torch.no_grad():
        wanted = llama(ids, use_cache=False).logits
        got = torch.compile(llama, fullgraph=True)(ids, use_cache=False).logits
    assert (got - wanted).abs().max() < WRONG


def test_other_lengths_and_dynamic_shapes(llama):
    with hap.patched(llama, "streaming", window=6, sinks=2), torch.no_grad():
        fast = torch.compile(llama, dynamic=True, backend="eager")
        for length in (24, 17, 31):
            ids = ids_of(length=length)
            got = fast(ids, use_cache=False).logits
            assert (got - llama(ids, use_cache=False).logits).abs().max() < WRONG


def test_padding_inside_rows_is_counted(llama):
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, 9:13] = 0
    with hap.patched(llama, "streaming", window=6, sinks=2), torch.no_grad():
        wanted = llama(ids, attention_mask=mask, use_cache=False).logits
        got = torch.compile(llama, fullgraph=True, backend="eager")(ids, attention_mask=mask, use_cache=False)
    assert (got.logits - wanted)[mask.bool()].abs().max() < WRONG


@pytest.mark.parametrize("what", ["packed", "holes"])
def test_what_cannot_be_followed_fails_when_it_runs(llama, what):
    ids = ids_of()
    mask, positions = torch.ones_like(ids), torch.arange(24).expand(2, -1)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    method = {"streaming": {"window": 6, "sinks": 2}} if what == "packed" else {"entropy_scale": {}}
    ((name, options),) = method.items()
    with hap.patched(llama, name, **options), torch.no_grad():
        fast = torch.compile(llama, fullgraph=True, backend="eager")
        wanted = llama(ids, **given).logits
        assert (fast(ids, **given).logits - wanted).abs().max() < WRONG
        if what == "packed":
            given["position_ids"] = torch.arange(12).repeat(2).expand(2, -1)
        else:
            given["attention_mask"] = mask.index_fill(1, torch.tensor([9, 10]), 0)
        with pytest.raises(RuntimeError, match="hf_attn_patch"):
            fast(ids, **given)


def test_an_error_inside_a_compiled_forward_leaves_no_facts_behind():
    model = tiny_model("llava").eval()
    inputs = dict(tiny_inputs(model, batch=2, length=40), use_cache=False)
    without = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    without["input_ids"] = torch.full_like(without["input_ids"], 5)
    with hap.patched(model, "pai", alpha=0.5, first_layer=0), torch.no_grad():
        wanted = model(**inputs).logits
        fast = torch.compile(model, backend="eager")
        with pytest.raises(RuntimeError, match="no image token"):
            fast(**without, use_cache=False)
        assert (fast(**inputs).logits - wanted).abs().max() < WRONG
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("method", ["head_gate", "streaming", "neighborhood", "pai"])
def test_export_is_right(method):
    assert exported(method) == "right"


@pytest.mark.parametrize("method", ["quest", "paro"])
def test_export_is_refused_where_values_decide(method):
    assert exported(method) == "refused"


def steps(model, call, cache, ids, parts):
    """Logits of a prompt, a chunk and decoded tokens; the prompt is read uncompiled, as `generate` does."""
    found, begin = [], 0
    for end in parts:
        forward = call if begin else model
        with torch.no_grad():
            found.append(forward(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
        begin = end
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "backend, disabled",
    [(None, False), (None, True), ("eager", False), ("eager", True), ("aot_eager", False)],
)
def test_static_cache_of_a_partly_patched_model(llama, backend, disabled):
    ids, parts = ids_of(length=27), [22, 25, 26, 27]
    with (
        hap.patched(llama, "streaming", window=6, sinks=2, layers=[0]) as handle,
        handle.disabled() if disabled else contextlib.nullcontext(),
    ):
        wanted = steps(llama, llama, DynamicCache(config=llama.config), ids, parts)
        call = llama if backend is None else torch.compile(llama.forward, backend=backend)
        got = steps(llama, call, StaticCache(config=llama.config, max_cache_len=40), ids, parts)
    assert (got - wanted).abs().max() < WRONG


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["streaming", "head_gate"])
def test_generate_with_a_static_cache(family, method):
    model = tiny_model(family).eval()
    inputs = tiny_inputs(model, batch=2, length=24, left_pad=[0, 5])
    options = {"window": 6, "sinks": 2} if method == "streaming" else {"gate": 0.5}
    more = dict(max_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True,
                pad_token_id=0, eos_token_id=None)  # fmt: skip
    with hap.patched(model, method, **options):
        wanted = model.generate(**inputs, **more)
        got = model.generate(**inputs, **more, cache_implementation="static")
    assert torch.equal(got.sequences, wanted.sequences)
    assert (torch.stack(got.scores) - torch.stack(wanted.scores)).abs().max() < WRONG


def test_continuous_batching_is_refused_at_the_call(llama):
    with hap.patched(llama, "head_gate", gate=0.5):
        for model in (llama, copy.deepcopy(llama)):
            with pytest.raises(hap.PatchError, match="continuous batching"):
                model.generate_batch(inputs=[[5, 6, 7]])
            with pytest.raises(hap.PatchError, match="continuous batching"):
                model.init_continuous_batching()
    assert "generate_batch" not in llama.__dict__
