"""A patched model compiles as one graph: the kernels are custom ops, layouts are constants of the graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attn_patch as hap

from .conftest import DEVICE

ROOT = Path(__file__).parents[2]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=100)  # fmt: skip
    return LlamaForCausalLM(config).eval().to(DEVICE)


def batch(padded):
    ids = torch.randint(0, 100, (2, 50), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(heads="0,3")], ids=["all", "heads"])
def test_streaming_has_no_graph_break(padded, options):
    model = tiny()
    ids, mask = batch(padded)
    with (
        hap.patched(model, "streaming", window=20, sinks=2, impl="triton", **options) as handle,
        torch.no_grad(),
    ):
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert "triton" in str(handle.report())
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
    assert (plain - expected)[mask.bool()].abs().max() > 1e-3, "the window must have an effect"


def test_a_training_step_has_no_graph_break():
    model = tiny().train()
    ids, mask = batch(padded=True)
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    with hap.patched(model, "streaming", window=20, sinks=2, impl="triton"):
        torch._dynamo.reset()
        for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            forward(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def compile_with_holes():
    """Padding with a hole, which layouts do not know: the compiled graph asserts that there is none."""
    model = tiny()
    ids, mask = batch(padded=True)
    mask[0, 20] = 0
    with hap.patched(model, "streaming", window=20, sinks=2, impl="triton"), torch.no_grad():
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, attention_mask=mask, use_cache=False)
        if DEVICE == "cuda":  # the assertion is asynchronous there
            torch.cuda.synchronize()


def test_padding_with_holes_is_not_computed_silently():
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="holes"):
            compile_with_holes()
        return
    # on a GPU a failed assertion ends the use of the device by this process, and with it every test that follows
    code = f"from {__name__} import compile_with_holes; compile_with_holes()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "assert" in done.stdout + done.stderr, done.stderr[-2000:]
