"""Options that only a recording of the original can judge: each test fails when the option is read wrongly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.eval import amber_figures
from hf_attn_patch.kernels import attention, reference
from hf_attn_patch.patches.vision.sparsifiner import basis, coefficients, kept_coefficients, most_likely

from .test_golden import IMPLS, read


@pytest.mark.parametrize("impl", IMPLS)
def test_moa_prefill_in_blocks_is_the_original_kernel(impl):
    tensors, config = read("moa__runtime_prefill")
    sinks, local, block, length = (config[k] for k in ("sink_size", "local_size", "block", "L"))
    assert len(set(sinks)) == 1
    rules = {"alphas": [[float(s + w) for s, w in zip(sinks, local)]], "betas": [[0.0] * len(sinks)]}
    q, k, v = (tensors[f"in.{n}"].double() for n in "qkv")
    outputs = {}
    for prefill in ("block", "token"):
        patch = registry.build(
            "moa",
            dict(plan=rules, sinks=sinks[0], block=block, smallest=block, length=1 << 20, prefill=prefill),
        )
        program = Program(q, k, v, Mask(1, length, length, causal=True), scale=config["D"] ** -0.5)
        patch.edit(program, SimpleNamespace(layer=0, context=None, heads=None))
        outputs[prefill] = attention(program, impl).output
    torch.testing.assert_close(outputs["block"], tensors["out.o_fp64"], rtol=0, atol=1e-9)
    assert float((outputs["token"] - outputs["block"]).abs().max()) > 1e-3  # else the option says nothing


def predictor_case():
    """(held parameters, program on a grid of 4 x 4, call that records losses)."""
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=draw).double()
    held = {
        f"{n}_{p}": rand(4, 8) if p == "weight" else rand(4)
        for n in ("query", "key")
        for p in ("weight", "bias")
    }
    held |= {n: rand(4, 4, 5) for n in ("down", "up")}
    held = {name: torch.nn.Parameter(value) for name, value in held.items()}
    q, k, v = (rand(2, 4, 16, 8) for _ in range(3))
    losses: list = []
    call = SimpleNamespace(
        path="site", heads=None, context=SimpleNamespace(grid=(4, 4)), training=True,
        tensors=SimpleNamespace(
            named_parameters=lambda recurse: held.items(), parameters=lambda recurse: held.values()
        ),
        add_loss=lambda *said: losses.append(said),
    )  # fmt: skip
    return held, Program(q, k, v, Mask(2, 16, 16), 0.3), call, losses


def test_sparsifiner_weighs_its_reconstruction_as_the_original_does():
    tensors, _ = read("sparsifiner__recon_stage1")
    scores = tensors["out.approx_attn"]
    teachers = [tensors["in.teacher_attn_0"], tensors["out.attn_dense"]]
    plain = torch.stack([(scores - t[:, :, 1:]).square().sum() for t in teachers]).mean()
    original = float(tensors["out.recon_loss_two_layers"] / plain)

    held, program, call, losses = predictor_case()
    registry.build("sparsifiner", dict(coefs=3)).edit(program, call)
    ((name, value, weight),) = losses
    assert name == "reconstruction" and weight == pytest.approx(original, rel=1e-6)
    coefs = coefficients(program.query, program.key, held, held["down"].flatten(0, 1), 4**-0.5)
    wanted = (coefs @ held["up"].flatten(0, 1).mT - reference.dense_probabilities(program)).square().sum()
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=0)
    assert not program.rules  # the output is left alone


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_sparsifiner_cuts_its_basis_at_the_threshold(threshold):
    held, program, call, _ = predictor_case()
    call.training = False
    options = dict(coefs=3, keep=0.3, basis_threshold=threshold)
    registry.build("sparsifiner", options).edit(program, call)
    coefs = kept_coefficients(
        coefficients(program.query, program.key, held, held["down"].flatten(0, 1), 4**-0.5), 3, 0.0
    )
    choices = {t: most_likely(coefs @ basis(held["up"].flatten(0, 1), t), 0.3, None) for t in (0.0, 0.5, 1.0)}
    assert torch.equal(program.rules[0].chosen, choices[threshold])
    assert all(not torch.equal(choices[t], choices[threshold]) for t in choices if t != threshold)


@pytest.mark.parametrize(
    "kind, there, said, found, f1",
    [
        ("state", 2, 3, 2, 79.9),  # without epsilon 80.0
        ("state", 2, 3, 1, 40.0),  # with that of existence 39.9
        ("existence", 2, 3, 1, 39.9),  # with that of the others 40.0
        ("relation", 7, 8, 5, 66.6),  # without epsilon 66.7
    ],
)
def test_amber_adds_its_epsilon_to_p_plus_r(kind, there, said, found, f1):
    truths = ["no"] * there + ["yes"] * (said - found)
    answers = ["No"] * found + ["Yes"] * (there - found) + ["No"] * (said - found)
    figures = amber_figures.discriminative([kind] * len(truths), truths, answers)
    assert figures[kind]["f1"] == f1
