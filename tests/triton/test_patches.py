"""Every registered patch runs on `impl="triton"` with the same results as `reference`, model by model.

Truth is the patched model in float64 on the reference executor, the baseline the same in float32; the kernels in
float32 may be off by twice the baseline plus a rounding band (tests/kernels/budget.py).
"""

from __future__ import annotations

import warnings

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.kernels import UnsupportedProgram
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model
from tests.conformance.families import as_double
from tests.kernels.budget import check_budget

from .conftest import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore")
NO_KERNEL = {
    "block_topk",
    "moba",
    "quest",
    "xattention",  # their examples choose per query; tests/test_block_topk.py has blocks of queries
    "vertical_slash",  # refused, and says why: tests/test_vertical_slash.py
    "biformer",
    "vmoba",
    "sparsifiner",
    "paro",  # cells of the grid chosen for a call: refused, and says why (tests/test_chosen_cells.py)
    "tcpa",  # a key class per prompt, more than the four the kernel keeps: refused, and says so
    "hgai",  # the mean over heads needs every head's scores at once: refused in kernels/triton/__init__.py
}
FAMILIES = ("llama", "gemma3_text", "gpt_oss", "dinov2", "llava")


def built(family, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = tiny_model(family).to(dtype).requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matmul of experts has no float64
    return model


def placed(model, inputs):
    """Model and inputs where kernels run; inputs are made beside the model, which is on a CPU until then."""
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return model.to(DEVICE), inputs


def cases():
    for family in FAMILIES:
        model = built(family, torch.float32)
        for name in sorted(set(hap.available()) - NO_KERNEL):
            for number, options in enumerate(registry.get(name).examples(model)):
                try:
                    hap.plan(model, name, **options)
                except hap.PatchError:
                    continue
                yield pytest.param(family, name, options, id=f"{name}-{number}-{family}")


CASES = list(cases())
SEEDS = (0, 1, 2, 3)


def test_every_patch_has_a_case():
    assert {case.values[1] for case in CASES} | NO_KERNEL == set(hap.available())


@pytest.mark.parametrize("family, name, options", CASES)
def test_forward_of_a_padded_batch(family, name, options):
    """Several inputs say how far off plain torch is: the largest error of one run of a whole model is a matter of luck.
    The kernel runs on the first of them (the interpreter is slow)."""

    def run(dtype, impl, seed):
        model = built(family, dtype)
        pad = 3 if family != "dinov2" else 0
        inputs = tiny_inputs(model, batch=2, length=37, left_pad=[0, pad], seed=seed)
        model, inputs = placed(model, as_double(inputs) if dtype == torch.float64 else inputs)
        with hap.patched(model, name, impl=impl, **options) as handle, torch.no_grad():
            out = model(**inputs)[0]
            executor = str(handle.report())
        if "attention_mask" in inputs and out.ndim == 3 and out.shape[1] == inputs["attention_mask"].shape[1]:
            out = out[inputs["attention_mask"].bool()]
        return out.cpu(), executor

    truth = [run(torch.float64, "reference", seed)[0] for seed in SEEDS]
    plain = [run(torch.float32, "reference", seed)[0] for seed in SEEDS]
    got, executor = run(torch.float32, "triton", SEEDS[0])
    assert "triton (forced)" in executor
    whole = [[torch.cat(parts)] for parts in (truth, plain, [got, *plain[1:]])]
    check_budget(("output",), *whole, torch.float32, f"{name} {options} on {family}")


@pytest.mark.parametrize("name, options", [
    ("streaming", dict(sinks=2, window=9)), ("moa", None), ("head_gate", None), ("var", None),
    ("pai", None), ("vaf", None), ("vhr", None), ("attnreal", dict(move=0.8)),
])  # fmt: skip
def test_generation_reads_the_cache_as_the_reference_does(name, options):
    family = "llava" if registry.get(name).__module__.split(".")[-2] == "grounding" else "llama"
    answers = []
    for impl in ("reference", "triton"):
        model = built(family, torch.float32)
        model, inputs = placed(model, tiny_inputs(model, batch=2, length=37, left_pad=[0, 3], seed=0))
        chosen = options or registry.get(name).examples(model)[0]
        with hap.patched(model, name, impl=impl, **chosen) as handle:
            answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True,
                                          return_dict_in_generate=True))  # fmt: skip
            report = str(handle.report())
    assert "triton (forced)" in report
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for a, b in zip(answers[0].logits, answers[1].logits):
        torch.testing.assert_close(a, b)


def test_a_model_with_a_mask_of_its_own_takes_the_torch_executor_and_says_so():
    """gemma3 lets the tokens of an image see each other: no arithmetic of positions."""
    model = built("gemma3", torch.float32)
    model, inputs = placed(model, tiny_inputs(model, batch=1, length=37, seed=0))
    with pytest.raises(UnsupportedProgram, match="mask of its own") as refusal:
        with hap.patched(model, "streaming", sinks=2, window=9, impl="triton"), torch.no_grad():
            model(**inputs)
    assert "impl='triton'" in str(refusal.value)
