"""Linear attention and the LoLCATs hybrid on Triton: formulas, states, padding, gradients, the originals' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hf_attn_patch.kernels import linear as api
from hf_attn_patch.kernels.triton import configs, linear, window_linear
from hf_attn_patch.kernels.triton.configs import Config
from tests.kernels.budget import check_budget
from tests.triton.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
GOLDEN = Path(__file__).parents[1] / "golden"


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def transposed(x: Tensor) -> Tensor:
    """The same numbers, laid out [B, L, H, D] as transformers' projections are."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def features(
    L: int, S: int | None = None, H: int = 2, Hf: int = 1, Hkv: int = 1, F: int = 16, DV: int = 16, B: int = 1
) -> list[Tensor]:
    """Positive features as a feature map gives them, values; float64 numbers that fp16 represents."""
    g = torch.Generator().manual_seed(L)
    S = L if S is None else S
    made = [uniform(g, B, H, L, F), uniform(g, B, Hf, S, F), normal(g, B, Hkv, S, DV)]
    return [transposed(x.half().double()) for x in made]


def left_padding(B: int, S: int, *counts: int) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.bool)
    for b, count in enumerate(counts):
        mask[b, :count] = False
    return mask


def results(
    call: Any, tensors: list[Tensor], dtype: torch.dtype, device: str, gradients: bool
) -> list[Tensor]:
    """Outputs of `call(*tensors)` and gradients of all tensors for a fixed cotangent of all outputs.

    Factors and states (not 4-dimensional heads x tokens) keep fp32.
    """
    leaves = []
    for i, x in enumerate(tensors):
        kind = dtype if i < 5 and x.ndim == 4 else torch.promote_types(dtype, torch.float32)
        leaves.append(x.to(device, kind).requires_grad_(gradients))
    outputs = call(*leaves)
    if not gradients:
        return [o.cpu() for o in outputs]
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).half().to(o.device) for o in outputs]
    # linear in the outputs: the cotangents are the (rounded) weights themselves
    grads = torch.autograd.grad(list(outputs), leaves, [w.to(o.dtype) for w, o in zip(weights, outputs)])
    return [x.detach().cpu() for x in (*outputs, *grads)]


def assert_matches(
    call: Any, tensors: list[Tensor], names: tuple[str, ...], dtype: torch.dtype, device: str, gradients: bool
) -> None:
    """`call(impl, *tensors)` on Triton in `dtype` is within the budget of the float64 reference."""
    run = lambda impl, kind, where: results(lambda *x: call(impl, *x), tensors, kind, where, gradients)
    truth = run("reference", torch.float64, "cpu")
    baseline = run("reference", dtype, "cpu")
    got = run("triton", dtype, device)
    assert len(truth) == len(names) if gradients else len(truth) <= len(names)
    check_budget(names, truth, baseline, got, dtype)


# -- linear attention ----------------------------------------------------------------------------------------

LINEAR = ("output", "state", "sum", "dfq", "dfk", "dv")


def attend(impl: str, *tensors: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    fq, fk, value, *state = tensors
    out, (kv, k_sum) = api.linear_attention(
        fq,
        fk,
        value,
        key_mask=None if mask is None else mask.to(fq.device),
        initial_state=(state[0], state[1]) if state else None,
        impl=impl,
        **options,
    )
    return out, kv, k_sum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 63, 65, 111, 257])
def test_causal_output_and_state_at_odd_lengths(length, dtype, device):
    call = lambda impl, *x: attend(impl, *x, causal=True)
    assert_matches(call, features(length), LINEAR, dtype, device, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [(2, 1, 1), (4, 2, 1), (4, 2, 2), (4, 4, 2), (2, 2, 2)], ids=str)
def test_gradients_with_head_groups_and_padding(heads, causal, dtype, device):
    H, Hf, Hkv = heads
    tensors = features(35, None if causal else 50, H, Hf, Hkv)
    mask = left_padding(1, tensors[1].shape[2], 5)
    call = lambda impl, *x: attend(impl, *x, causal=causal, mask=mask)
    assert_matches(call, tensors, LINEAR, dtype, device, gradients=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_flow_through_initial_and_final_state(causal, device):
    tensors = features(40, H=4, Hf=2)
    g = torch.Generator().manual_seed(1)
    tensors += [normal(g, 1, 2, 16, 16), uniform(g, 1, 2, 16)]
    call = lambda impl, *x: attend(impl, *x, causal=causal)
    assert_matches(call, tensors, (*LINEAR, "dkv", "dk_sum"), torch.float32, device, gradients=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dims", [(24, 40), (80, 16), (48, 96)], ids=str)
def test_dimensions_that_are_no_powers_of_two(dims, causal, device):
    tensors = features(37, F=dims[0], DV=dims[1])
    call = lambda impl, *x: attend(impl, *x, causal=causal)
    assert_matches(call, tensors, LINEAR, torch.float32, device, gradients=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_plain_sums_without_a_normaliser(causal, device):
    call = lambda impl, *x: attend(impl, *x, causal=causal, normalise=False)
    assert_matches(call, features(50), LINEAR, torch.float32, device, gradients=True)


def test_eps_is_added_to_the_normaliser(device):
    call = lambda impl, *x: attend(impl, *x, causal=False, eps=5.0)
    assert_matches(call, features(9), LINEAR, torch.float32, device, gradients=True)


def test_features_beyond_the_range_of_half_products(device):
    fq, fk, value = features(100)
    fq, fk = 200 * fq, 200 * fk  # products reach 6e5, sums 6e7; fp16 ends at 65504
    tensors = [x.half().to(device) for x in (fq, fk, value)]
    out, kv, _ = attend("triton", *tensors, causal=True)
    truth, true_kv, _ = attend("reference", *(x.cpu().double() for x in tensors), causal=True)
    check_budget(
        ("output", "state"), (truth, true_kv), (truth.half(), true_kv), (out.cpu(), kv.cpu()), torch.float16
    )


@pytest.mark.parametrize("chunk", [16, 64])
def test_chunk_size_does_not_matter(chunk, device):
    tensors = features(111, H=2, Hf=2)
    call = lambda impl, *x: attend(impl, *x, causal=True)
    with (
        configs.forced("linear_forward", Config(chunk, 16, 1, 1)),
        configs.forced("linear_state", Config(0, 16, 1, 1)),
    ):
        assert_matches(call, tensors, LINEAR, torch.float32, device, gradients=True)


def test_two_halves_with_the_state_between_are_one_pass(device):
    fq, fk, value = (x.to(device, torch.float32) for x in features(75, H=4, Hf=2, Hkv=1))
    whole, kv, k_sum = attend("triton", fq, fk, value, causal=True)
    cut = 41
    first, *state = attend("triton", *(x[:, :, :cut] for x in (fq, fk, value)), causal=True)
    second, *state = attend("triton", *(x[:, :, cut:] for x in (fq, fk, value)), *state, causal=True)
    truth = [x.cpu() for x in attend("reference", *(x.double() for x in (fq, fk, value)), causal=True)]
    names = ("output", "state", "sum")
    check_budget(names, truth, [whole, kv, k_sum], [torch.cat([first, second], 2), *state], torch.float32)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (24, 40)], ids=str)
def test_causal_is_step_by_step_from_an_empty_state(dims, dtype, normalise, device):
    F, DV = dims
    tensors = features(9, H=4, Hf=2, F=F, DV=DV)
    fq, fk, value = (x.to(device, dtype) for x in tensors)
    state = (torch.zeros(1, 2, F, DV, device=device), torch.zeros(1, 2, F, device=device))
    steps = []
    for t in range(9):
        token = [x[:, :, t : t + 1] for x in (fq, fk, value)]
        out, after = api.linear_step(*token, state, normalise=normalise, impl="triton")
        assert after[0] is state[0] and after[1] is state[1], "the state is updated in place"
        steps.append(out)
    options: dict[str, Any] = dict(causal=True, normalise=normalise)
    truth = attend("reference", *tensors, **options)
    baseline = attend("reference", *(x.to(dtype) for x in tensors), **options)
    check_budget(
        ("output", "state", "sum"),
        truth,
        baseline,
        [torch.cat(steps, 2).cpu(), *map(Tensor.cpu, state)],
        dtype,
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_left_padding_does_not_change_real_rows(causal, device):
    fq, fk, value = (x.to(device, torch.float32) for x in features(40))
    alone = attend("triton", fq, fk, value, causal=causal)
    padded = [torch.cat([torch.full_like(x[:, :, :21], 77.0), x], 2) for x in (fq, fk, value)]
    got = attend("triton", *padded, causal=causal, mask=left_padding(1, 61, 21))
    truth = attend("reference", *(x.double().cpu() for x in (fq, fk, value)), causal=causal)
    check_budget(("output", "state", "sum"), truth, alone, [got[0][:, :, 21:], *got[1:]], torch.float32)
    if causal:
        assert (got[0][:, :, :21] == 0).all(), "a row that sees no key is 0"


def test_a_row_of_masked_keys_has_zero_output_and_gradient(device):
    leaves = [x.to(device, torch.float32).requires_grad_() for x in features(33, B=2)]
    out, *_ = attend("triton", *leaves, causal=True, mask=left_padding(2, 33, 33))
    assert (out[0] == 0).all() and (out[1] != 0).any()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad[0] == 0).all() and torch.isfinite(grad).all()


def test_integer_and_bool_masks_mean_the_same(device):
    fq, fk, value = (x.to(device, torch.float32) for x in features(20))
    mask = left_padding(1, 20, 3)
    a, b = (attend("triton", fq, fk, value, causal=True, mask=m) for m in (mask, mask.to(torch.uint8)))
    assert torch.equal(a[0], b[0])


# -- window + linear -----------------------------------------------------------------------------------------

HYBRID = ("output", "dq", "dk", "dv", "dfq", "dfk", "dg", "dl")


def hybrid_inputs(
    L: int,
    S: int | None = None,
    H: int = 2,
    Hf: int = 1,
    Hkv: int = 1,
    D: int = 16,
    F: int = 16,
    DV: int = 16,
) -> list[Tensor]:
    """query, key, value, fq, fk, window factor, linear factor."""
    g = torch.Generator().manual_seed(L)
    S = L if S is None else S
    made = [normal(g, 1, H, L, D), normal(g, 1, Hkv, S, D), normal(g, 1, Hkv, S, DV)]
    made += [uniform(g, 1, H, L, F), uniform(g, 1, Hf, S, F)]
    return [*(transposed(x.half().double()) for x in made), uniform(g, H), uniform(g, H)]


def hybrid(impl: str, *tensors: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor]:
    options = dict(scale=0.25, window=16) | options
    mask = None if mask is None else mask.to(tensors[0].device)
    *tensors_, g, l = tensors
    out = api.window_linear_attention(
        *tensors_, window_factor=g, linear_factor=l, key_mask=mask, impl=impl, **options
    )
    return (out,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sliding", "terrace"])
@pytest.mark.parametrize("length", [1, 2, 15, 63, 65, 111])
def test_hybrid_at_odd_lengths(length, mode, dtype, device):
    call = lambda impl, *x: hybrid(impl, *x, mode=mode)
    assert_matches(call, hybrid_inputs(length), HYBRID, dtype, device, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mode, window, align",
    [("sliding", 8, "start"), ("sliding", 45, "start"), ("terrace", 16, "start"), ("terrace", 13, "end")],
)
def test_hybrid_gradients_of_every_input(mode, window, align, dtype, device):
    call = lambda impl, *x: hybrid(impl, *x, mode=mode, window=window, align=align)
    assert_matches(call, hybrid_inputs(70), HYBRID, dtype, device, gradients=True)


@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 2, 2), (4, 4, 2)], ids=str)
@pytest.mark.parametrize("mode", ["sliding", "terrace"])
def test_hybrid_gradients_with_head_groups_and_padding(mode, heads, device):
    H, Hf, Hkv = heads
    tensors = hybrid_inputs(44, None, H, Hf, Hkv)
    call = lambda impl, *x: hybrid(impl, *x, mode=mode, window=6, mask=left_padding(1, 44, 9))
    assert_matches(call, tensors, HYBRID, torch.float32, device, gradients=True)


@pytest.mark.parametrize("mode", ["sliding", "terrace"])
def test_hybrid_rows_at_the_end_of_longer_keys(mode, device):
    call = lambda impl, *x: hybrid(impl, *x, mode=mode, window=10)
    assert_matches(call, hybrid_inputs(21, 85), HYBRID, torch.float32, device, gradients=True)


def test_hybrid_dimensions_that_are_no_powers_of_two(device):
    call = lambda impl, *x: hybrid(impl, *x, mode="sliding", window=7)
    tensors = hybrid_inputs(35, D=24, F=40, DV=48)
    assert_matches(call, tensors, HYBRID, torch.float32, device, gradients=True)


def test_hybrid_with_a_window_of_everything_is_softmax(device):
    query, key, value, fq, fk, g, l = (x.to(device, torch.float32) for x in hybrid_inputs(50, Hkv=2, Hf=2))
    (out,) = hybrid("triton", query, key, value, fq, fk, g, l, window=50, mode="sliding")
    dense = lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, scale=0.25)
    truth = dense(*(x.double() for x in (query, key, value)))
    check_budget(("output",), (truth.cpu(),), (dense(query, key, value).cpu(),), (out.cpu(),), torch.float32)


def test_hybrid_left_padding_does_not_change_real_rows(device):
    tensors = hybrid_inputs(30)
    single = [x.to(device, torch.float32) for x in tensors]
    (alone,) = hybrid("triton", *single, mode="sliding", window=8)
    padded = [torch.cat([torch.full_like(x[:, :, :21], 77.0), x], 2) for x in single[:5]]
    (got,) = hybrid("triton", *padded, *single[5:], mode="sliding", window=8, mask=left_padding(1, 51, 21))
    (truth,) = hybrid("reference", *tensors, mode="sliding", window=8)
    check_budget(("output",), (truth,), (alone.cpu(),), (got[:, :, 21:].cpu(),), torch.float32)
    assert (got[:, :, :21] == 0).all()


@pytest.mark.parametrize("chunk", [16, 64])
def test_hybrid_chunk_size_does_not_matter(chunk, device):
    call = lambda impl, *x: hybrid(impl, *x, mode="sliding", window=20)
    with configs.forced("window_linear", Config(chunk, 16, 1, 1)):
        assert_matches(call, hybrid_inputs(75), HYBRID, torch.float32, device, gradients=True)


# -- the torch implementation --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 63, 65, 130])  # with one key every gradient cancels to rounding noise
def test_chunked_torch_is_the_formula(length):
    tensors = features(length, H=4, Hf=2)
    run = lambda impl: results(lambda *x: attend(impl, *x, causal=True), tensors, torch.float64, "cpu", True)
    check_budget(LINEAR, run("reference"), run("reference"), run("torch"), torch.float64)
    for mode in ("sliding", "terrace"):
        call = lambda impl, mode=mode: results(
            lambda *x: hybrid(impl, *x, mode=mode),
            hybrid_inputs(length, H=4, Hf=2),
            torch.float64,
            "cpu",
            True,
        )
        check_budget(HYBRID, call("reference"), call("reference"), call("torch"), torch.float64)


# -- numbers of the original code ----------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """(tensors, config, tolerance) of a golden file."""
    with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        meta = file.metadata()
    return tensors, json.loads(meta["config"]), float(meta["tolerance"])


def split_softmax(x: Tensor, weight: Tensor) -> Tensor:
    """LoLCATs' feature map; weight [H, D, d]."""
    u = x.repeat_interleave(weight.shape[0] // x.shape[1], 1) @ weight
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp(min=1e-12)


def assert_golden(call: Any, expected: tuple[Tensor, ...], tolerance: float, device: str) -> None:
    """`call(impl, dtype, device)` gives `expected`: formula and torch to the file's tolerance, Triton to the budget."""
    for impl in ("reference", "torch"):
        for got, want in zip(call(impl, torch.float64, "cpu"), expected):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    names = [f"part {i}" for i in range(len(expected))]
    baseline = call("reference", torch.float32, "cpu")
    got = [x.cpu() for x in call("triton", torch.float32, device)]
    check_budget(names, expected, baseline, got, torch.float32)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_hedgehog_linear_attention_is_the_original(causal, device):
    t, _, tolerance = golden("hedgehog__linear_attention")

    def call(impl, dtype, where):
        fq, fk, value = (t[n].to(where, dtype) for n in ("out.phi_q", "out.phi_k", "in.v"))
        return attend(impl, fq, fk, value, causal=causal)

    expected = (t["out.y" if causal else "out.y_noncausal"], t["out.state_S"], t["out.state_z"])
    assert_golden(call, expected, tolerance, device)


def test_hedgehog_prefill_and_decode_are_the_original(device):
    t, config, tolerance = golden("hedgehog__decode")
    mask, cut = t["in.attention_mask"].bool(), config["prefill"]

    def call(impl, dtype, where):
        fq, fk = split_softmax(t["in.q"], t["param.Wq"]), split_softmax(t["in.k"], t["param.Wk"])
        fq, fk, value = (x.to(where, dtype) for x in (fq, fk, t["in.v"]))
        prefill = (x[:, :, :cut] for x in (fq, fk, value))
        out, *state = attend(impl, *prefill, causal=True, mask=mask[:, :cut])
        parts = [out]
        for i in range(cut, fq.shape[2]):
            token = (x[:, :, i : i + 1] for x in (fq, fk, value))
            parts.append(api.linear_step(*token, tuple(state), impl=impl)[0])
        return torch.cat(parts, 2), state[0], state[1]

    assert_golden(call, (t["out.head_out"], t["out.S"], t["out.z"][:, :, 0]), tolerance, device)


@pytest.mark.parametrize("case", ["hybrid_sw", "hybrid_tk", "hybrid_tk_ragged"])
def test_lolcats_hybrid_is_the_original(case, device):
    t, config, tolerance = golden(f"lolcats__{case}")
    g = torch.sigmoid(t["param.window_factor_raw"])
    l = 1 - g if config["affine_attention_factors"] else torch.ones_like(g)

    def call(impl, dtype, where):
        tensors = (t[n].to(where, dtype) for n in ("in.q", "in.k", "in.v", "out.phi_q", "out.phi_k"))
        return hybrid(
            impl,
            *tensors,
            g.to(where),
            l.to(where),
            scale=config["D"] ** -0.5,
            window=config["window"],
            mode="sliding" if config["kind"] == "sw" else "terrace",
            align=config["align"] or "start",
        )

    assert_golden(call, (t["out.y"],), tolerance, device)


def test_lolcats_decode_is_the_original(device):
    t, config, tolerance = golden("lolcats__decode")
    g, w, cut, scale = (
        t["param.window_factor_raw"].sigmoid(),
        config["window"],
        config["prefill"],
        config["D"] ** -0.5,
    )

    def call(impl, dtype, where):
        fq, fk = split_softmax(t["in.q"], t["param.Wq"]), split_softmax(t["in.k"], t["param.Wk"])
        q, k, v, fq, fk = (x.to(where, dtype) for x in (t["in.q"], t["in.k"], t["in.v"], fq, fk))
        (out,) = hybrid(
            impl,
            *(x[:, :, :cut] for x in (q, k, v, fq, fk)),
            g,
            torch.ones(1),
            scale=scale,
            window=w,
            mode="sliding",
        )
        parts, state = [out], api.linear_state(fk[:, :, : cut - w], v[:, :, : cut - w])
        prefill = state
        for n in range(cut, q.shape[2]):
            left, here, now = slice(n - w, n - w + 1), slice(n - w + 1, n + 1), slice(n, n + 1)
            state = api.linear_state(fk[:, :, left], v[:, :, left], initial_state=state)
            parts.append(
                api.window_linear_step(
                    q[:, :, now],
                    k[:, :, here],
                    v[:, :, here],
                    fq[:, :, now],
                    state,
                    scale=scale,
                    window_factor=g,
                )
            )
        return torch.cat(parts, 2), *state, *prefill

    assert_golden(call, (t["out.head_out"], t["out.S"], t["out.z"].squeeze(2)), tolerance, device)
    # the state after the prefill is the original's own, in fp32
    recorded = (t["out.S_after_prefill"], t["out.z_after_prefill"].squeeze(2))
    ours = call("reference", torch.float64, "cpu")[3:]
    check_budget(("S", "z"), ours, call("reference", torch.float32, "cpu")[3:], recorded, torch.float32)


@pytest.mark.parametrize("case", ["self_attention", "identity_projection"])
def test_linfusion_heads_are_the_original(case, device):
    t, _, tolerance = golden(f"linfusion__{case}")
    N = t["out.q"].shape[2]

    def call(impl, dtype, where):
        q, k, v = (t[f"out.{n}"].to(where, dtype) for n in "qkv")
        elu = torch.nn.functional.elu
        # the original divides by N: mean of k . q + 1e-4
        return attend(impl, elu(q) + 1, elu(k) + 1, v, causal=False, eps=1e-4 * N)[:1]

    assert_golden(call, (t["out.head_out"],), tolerance, device)


# -- contracts -----------------------------------------------------------------------------------------------


def test_the_operators_keep_torchs_contracts(device):
    fq, fk, value = (x.to(device, torch.float32).requires_grad_() for x in features(5, H=2))
    linear_args = (fq, fk, value, None, None, None, True, True, 1e-12)
    torch.library.opcheck(linear._linear_attention, linear_args)
    state = (torch.rand(1, 1, 16, 16, device=device), torch.rand(1, 1, 16, device=device))
    token = [x[:, :, :1].detach() for x in (fq, fk, value)]
    torch.library.opcheck(linear.linear_step, (*token, *state, True, 1e-12))
    tensors = [x.to(device, torch.float32).requires_grad_() for x in hybrid_inputs(5)]
    mask = torch.ones(1, 5, dtype=torch.uint8, device=device)
    args = (*tensors, mask, 0.25, 4, True, 0)
    torch.library.opcheck(window_linear._window_linear_attention, args)


def test_shapes_that_do_not_fit_are_named():
    fq, fk, value = features(4, 6)
    with pytest.raises(ValueError, match="initial_state"):
        api.linear_attention(fq, fk, value, causal=True)
    with pytest.raises(ValueError, match="Hkv dividing Hf"):
        api.linear_attention(fq, fk, value[:, :, :5], causal=False)
    with pytest.raises(ValueError, match="key_mask"):
        api.linear_attention(fq, fk, value, causal=False, key_mask=torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="float64"):
        api.linear_attention(fq, fk, value, causal=False, impl="triton")
    with pytest.raises(ValueError, match="window=0"):
        api.window_linear_attention(fq, fk, value, fq, fk, scale=1.0, window=0)
