"""Mixture of heads: numbers of the original code, and what must hold for any weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.errors import ConfigError, ModelMismatchError
from hf_attn_patch.install import stack
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.heads.moh import Split, balance, best

from .small import close, differ, inputs_of, model_of, output, refused
from .test_golden import IMPLS, read

DIT = ("dit_all_shared", "dit_no_shared", "dit_shared_routed")


def at_site(x=None, weights=None, training=False, before=None):
    """A call whose router weights are `weights` (names of the original code) and whose layer got `x`."""
    held, losses = nn.Module(), {}
    for name, weight in (weights or {}).items():
        held.register_parameter(name, nn.Parameter(weight))
    context = SimpleNamespace(
        attention_input=lambda path: x, query_before_norm=lambda path, heads, length: before
    )
    return SimpleNamespace(
        path="site", heads=None, tensors=held, context=context, training=training, losses=losses,
        add_loss=lambda name, value, weight: losses.update({name: value}),
    )  # fmt: skip


def routers(tensors, hs):
    """Weights under our names: W_r, W_s (the only router of a site whose heads are all shared), W_h."""
    names = {"wg.weight": "routed", "wg_1.weight": "shared", "wg_0.weight": "stage"}
    return {ours: tensors[f"param.{name}"] for name, ours in names.items() if f"param.{name}" in tensors}


def moh(**options):
    return registry.build("moh", options)


def golden_program(tensors, c):
    x, heads, D = tensors["in.x"], c["H"], c.get("head_dim")
    B, N, _ = x.shape
    if (
        D is None
    ):  # the file gives the outputs of the heads: attention over one's own token alone returns its value
        value = tensors["in.head_out"].transpose(1, 2)
        return Program(value, value, value, Mask(B, N, N, causal=True, window=1), 1.0)
    qkv = nn.functional.linear(x, tensors["param.qkv.weight"], tensors["param.qkv.bias"])
    q, k, v = qkv.view(B, N, 3, heads, D).permute(2, 0, 3, 1, 4)
    return Program(q, k, v, Mask(B, N, N), D**-0.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [*DIT, "vit_shared_routed"])
def test_learned_router_is_the_original(case, impl):
    tensors, c = read(f"moh__{case}")
    patch = moh(router="learned", shared=c["shared"], active=c["shared"] + c["routed_active"])
    program, call = golden_program(tensors, c), at_site(tensors["in.x"], routers(tensors, c["shared"]), True)
    patch.edit(program, call)
    torch.testing.assert_close(program.head_gate, tensors["out.gate"], rtol=0, atol=1e-12)
    out = attention(program, impl).output.transpose(1, 2).flatten(2)
    y = nn.functional.linear(out, tensors["param.proj.weight"], tensors["param.proj.bias"])
    torch.testing.assert_close(y, tensors["out.y"], rtol=0, atol=1e-9)
    assert ("out.l_aux" in tensors) == bool(call.losses)
    if call.losses:
        torch.testing.assert_close(call.losses["balance"], tensors["out.l_aux"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_router_is_the_original(impl):
    t, c = read("moh__llama_norm_router")
    q, k, v = (t[f"in.{n}"] for n in ("q_rope", "k_rope", "v"))
    program = Program(q, k, v, Mask(c["B"], c["L"], c["L"], causal=True), c["D"] ** -0.5)
    moh().edit(program, at_site())  # the published shares are the defaults
    assert torch.equal(program.head_gate.bool(), t["out.gate"])
    out = attention(program, impl).output.transpose(1, 2).flatten(2)
    y = nn.functional.linear(out, t["param.o_proj.weight"])
    torch.testing.assert_close(y, t["out.y"], rtol=0, atol=2e-6 * float(t["out.y"].abs().max()))


def test_norm_scores_are_the_original():
    from hf_attn_patch.patches.heads.moh import norm_scores

    t, c = read("moh__llama_norm_router")
    norms = t["in.q_rope"].transpose(1, 2)[:, :, c["shared"] :].norm(dim=-1)
    torch.testing.assert_close(norm_scores(norms), t["out.router_score"], rtol=0, atol=2e-6)


# -- invariants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 0.5, 1.0])
def test_all_heads_active_is_exactly_dense(shared):
    model = model_of("llama")
    inputs = inputs_of(model, left_pad=[3, 0])
    real, dense = inputs["attention_mask"].bool(), output(model, inputs)
    for router in ("norm", "learned"):
        for mode in (model.eval, model.train):
            mode()
            with hap.patched(model, "moh", router=router, active=1.0, shared=shared):
                close(output(model, inputs)[real], dense[real], f"{router}, {shared}")


def test_neutral_norm_router_touches_no_bit():
    model = model_of("llama")
    inputs = inputs_of(model)
    with hap.patched(model, "head_gate", gate=1.0):
        dense = output(model, inputs)  # the same executor
    with hap.patched(model, "moh", active=1.0):
        assert torch.equal(output(model, inputs), dense)


def weights_for(split, heads, width, seed=0):
    torch.manual_seed(seed)
    rows = {"routed": split.routed, "shared": split.shared * split.size, "stage": 2}
    return {name: torch.randn(n, width, dtype=torch.float64) for name, n in rows.items()}


def gates(patch, heads=8, kv_heads=4, x=None, training=False):
    torch.manual_seed(1)
    x = torch.randn(2, 5, 6, dtype=torch.float64) if x is None else x
    q, k = (torch.randn(2, h, 5, 4, dtype=torch.float64) for h in (heads, kv_heads))
    program = Program(q, k, k, Mask(2, 5, 5, causal=True), 0.5)
    patch.edit(program, at_site(x, weights_for(patch.split(heads, kv_heads), heads, 6), training))
    return program.head_gate


def test_learned_gates_keep_the_scale_and_the_count():
    gate = gates(moh(router="learned", shared=3, active=5))
    total = gate[..., :3].sum(-1) / 3 + gate[..., 3:].sum(-1) / 2
    torch.testing.assert_close(total, torch.full_like(total, 2.0), rtol=0, atol=1e-12)
    assert bool(((gate != 0).sum(-1) == 5).all())


@pytest.mark.parametrize("router", ["norm", "learned"])
def test_groups_are_open_or_closed_as_a_whole(router):
    gate = gates(moh(router=router, shared=2, active=6, align="group")).unflatten(-1, (4, 2))
    assert torch.equal(gate[..., 0] != 0, gate[..., 1] != 0)
    assert bool(((gate[..., 0] != 0).sum(-1) == 3).all()) and bool((gate[..., 0, :] != 0).all())
    if router == "learned":
        torch.testing.assert_close(gate[..., 1:, 0], gate[..., 1:, 1])


def test_equal_scores_go_to_the_first_head_in_every_batch():
    for shape in ((1, 1, 40), (7, 9, 40)):
        assert (
            bool(best(torch.ones(shape), 3)[..., :3].all())
            and int(best(torch.ones(shape), 3).sum(-1).max()) == 3
        )


@pytest.mark.parametrize("router", ["norm", "learned"])
def test_a_token_is_routed_alone_so_cached_decoding_equals_one_forward(router):
    model = model_of("qwen3")
    inputs = inputs_of(model, batch=3, length=12)
    with hap.patched(model, "moh", router=router, active=0.5, shared=0.25):
        randomise(model)
        whole = output(model, inputs)
        part = {k: v[1:2] for k, v in inputs.items()}
        close(output(model, part), whole[1:2])
        ids = part["input_ids"]
        with torch.no_grad():
            cache = model(input_ids=ids[:, :7]).past_key_values
            for i in range(7, 12):
                step = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
                close(step[:, 0], whole[1:2, i])


def randomise(model, seed=3):
    """Router weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "attn_patch" in name and "original_module" not in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_balance_is_k_when_even_and_ignores_order_and_padding():
    p = torch.full((2, 6, 8), 1 / 8)
    even = torch.zeros(2, 6, 8, dtype=torch.bool)
    even[..., :4], even[1] = True, False
    even[1, :, 4:] = True
    assert float(balance(p, even)) == pytest.approx(4.0)
    p = torch.rand(2, 6, 8).softmax(-1)
    chosen, order = best(p, 4), torch.randperm(8)
    value = balance(p, chosen)
    torch.testing.assert_close(balance(p[..., order], chosen[..., order]), value)
    assert float(value) > 4.0  # the best are chosen
    padded, mask = torch.cat([torch.rand(2, 3, 8), p], 1), torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    torch.testing.assert_close(balance(padded, best(padded, 4), mask), value)


def test_straight_through_keeps_the_hard_gate_and_reaches_the_query_projection():
    model = model_of("llama").requires_grad_(True)
    inputs = inputs_of(model)
    programs, original = [], stack.attention
    options = {"active": 0.5, "shared": 0.25, "balance": 0.0}

    def grads(train):
        model.train(train).zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    with hap.patched(model, "moh", **options), pytest.MonkeyPatch.context() as patching:
        patching.setattr(stack, "attention", lambda p, impl: (programs.append(p), original(p, impl))[1])
        hard, soft = grads(False), grads(True)
    for a, b in zip(programs[:2], programs[2:]):
        assert torch.equal(a.head_gate, b.head_gate) and set(b.head_gate.unique().tolist()) == {0.0, 1.0}
        assert b.head_gate.requires_grad and not a.head_gate.requires_grad
        assert a.gate_is_sparse and not b.gate_is_sparse
    name = "model.layers.1.self_attn.q_proj.weight"
    closed = lambda g: g[name].unflatten(0, (4, -1))[1:]
    assert differ(closed(soft), closed(hard))
    close(soft[name].unflatten(0, (4, -1))[0], hard[name].unflatten(0, (4, -1))[0], "the shared head")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "llama"])
@pytest.mark.parametrize("length", [4, 9])  # 4 heads: with 4 tokens only strides tell heads from tokens
def test_models_that_normalise_queries_are_routed_by_the_norms_before(family, length):
    model = model_of(family)
    inputs = inputs_of(model, length=length)
    module = hap.find_sites(model)[0].module
    wide, gates = [], []
    hook = module.q_proj.register_forward_hook(lambda m, a, out: wide.append(out))
    original = stack.attention
    with (
        hap.patched(model, "moh", active=0.5, shared=0.25, layers=0),
        pytest.MonkeyPatch.context() as patching,
    ):
        patching.setattr(stack, "attention", lambda p, i: (gates.append(p.head_gate), original(p, i))[1])
        output(model, inputs)
    hook.remove()
    norms = wide[0].unflatten(-1, (4, -1)).norm(dim=-1)
    assert torch.equal(gates[0][..., 1:].bool(), best(norms[..., 1:], 1))


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, heads, kv, expected",
    [
        ({}, 32, 8, Split(1, 16, 16, 8)),
        ({}, 9, 3, Split(1, 4, 5, 3)),
        ({"active": 6, "shared": 0}, 8, 2, Split(1, 0, 8, 6)),
        ({"align": "group"}, 32, 8, Split(4, 4, 4, 2)),
        ({"align": "group"}, 9, 3, Split(3, 1, 2, 1)),
        ({"active": 1.0, "shared": 1.0}, 4, 4, Split(1, 4, 0, 0)),
    ],
)
def test_shares_and_numbers_of_heads(options, heads, kv, expected):
    assert moh(**options).split(heads, kv) == expected


def test_wrong_numbers_are_refused():
    model = model_of("llama")  # 4 heads, 2 KV heads
    for options, error, words in (
        ({"active": 0}, ConfigError, ("active=0", ">= 1")),
        ({"active": 1.5}, ConfigError, ("active=1.5", "1.0")),
        ({"shared": -0.1}, ConfigError, ("shared=-0.1",)),
        ({"balance": -1.0}, ConfigError, ("balance",)),
        ({"active": 5}, ModelMismatchError, ("active=5", "there are 4")),
        (
            {"active": 3, "shared": 2, "align": "group"},
            ModelMismatchError,
            ("active=3", "groups of 2", "multiple"),
        ),
        ({"active": 0.25}, ModelMismatchError, ("fewer than the 2", "Lower shared")),
    ):
        with refused(error, *words):
            hap.plan(model, "moh", **options)
    one = {"router": "learned", "active": 0.5, "shared": 0.25}
    assert "no gradient" in hap.plan(model, "moh", **one).warnings[0]
    assert not hap.plan(model, "moh", **{**one, "active": 0.75}).warnings
    assert "nothing is routed" in hap.plan(model, "moh", active=0.5).warnings[0]


def test_learned_router_needs_a_token_per_hidden_state():
    patch, call = moh(router="learned", shared=1, active=2), at_site(torch.zeros(10, 6))
    program = Program(*(torch.zeros(2, 4, 5, 4) for _ in range(3)), Mask(2, 5, 5), 0.5)
    with refused(ModelMismatchError, "[10, 6]", "router='norm'"):
        patch.edit(program, call)


def test_routers_are_made_only_where_they_are_used():
    model = model_of("llama")
    for options, names in (
        ({"shared": 2, "active": 3}, {"routed", "shared", "stage"}),
        ({"shared": 1, "active": 2}, {"routed", "stage"}),
        ({"shared": 0, "active": 2}, {"routed"}),
        ({"shared": 2, "active": 2}, {"shared"}),
        ({"shared": 4, "active": 4}, {"shared"}),
    ):
        with pytest.warns(UserWarning) if options["shared"] == options["active"] == 2 else nothing():
            handle = hap.patch(model, "moh", router="learned", **options)
        site = handle.sites[0].module.attn_patch.patches["moh"]
        assert {n for n, _ in site.named_parameters()} == names
        model.requires_grad_(False)
        assert torch.isfinite(output(copy.deepcopy(model), inputs_of(model))).all()
        handle.remove()


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_router_computes_in_float32_under_autocast():
    patch = moh(router="learned", shared=0, active=1)
    x = torch.tensor([[[1.0, 1.0]]])
    # equal after rounding to bfloat16, and then the first would win
    weights = {"routed": torch.tensor([[1.0, 1.0], [1.0, 1.0005]])}
    program = Program(*(torch.ones(1, 2, 1, 4) for _ in range(3)), Mask(1, 1, 1), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patch.edit(program, at_site(x, weights))
    assert program.head_gate.tolist() == [[[0.0, 1.0]]]
