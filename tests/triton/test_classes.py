"""Key classes: mass edits, parts of the output per class, and statistics without an attention map."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.call.program import MassEdit, MassTransfer
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention, reference, why_not
from hf_attn_patch.kernels.triton import geometry
from hf_attn_patch.kernels.triton.classes import class_attention, class_statistics
from hf_attn_patch.kernels.triton.configs import config
from hf_attn_patch.patches.grounding.var import transfer
from tests.kernels import budget
from tests.kernels.budget import assert_within_budget, check_budget
from tests.kernels.cases import all_edits, all_masks, classes, edit, make, shift_mass, some_rows

from .conftest import DEVICE, HALVES

MASKS, EDITS = all_masks(), all_edits()
pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")
VAR = transfer(rho=0.6, min_mass=0.3, move=0.4)


def cast(program, dtype):
    """The program in `dtype`, where kernels run."""
    return budget.cast(program, dtype, DEVICE)


def classed(program, count=4):
    program.classify(classes(program, count))
    return program


def var(program, **where):
    return edit(program, mass_edits=[MassEdit(VAR, 4, **where)])


@pytest.mark.parametrize("where", ["causal", "left padding", "right padding, bidirectional", "chunk with cache",
                                   "a row of padding only", "sliding window", "decode, padded"])  # fmt: skip
@pytest.mark.parametrize("kind", ["transfer", "callable"])
def test_mass_edits_under_every_kind_of_mask(where, kind):
    program = classed(MASKS[where](), 4 if kind == "transfer" else 3)
    program = var(program) if kind == "transfer" else EDITS["mass"](program)
    assert_within_budget(program, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_transfer_applies_to_its_rows_and_heads_only(dtype):
    program = var(classed(make(L=70)), rows=some_rows(make(L=70)), heads=(0, 3))
    assert_within_budget(program, "triton", dtype)


def test_some_rows_qualify_and_some_do_not():
    """The case above would also pass if the condition were ignored on both sides."""
    program = cast(classed(make(L=70)), torch.float32)
    plain = attention(program, "reference").output
    changed = (attention(var(program), "triton").output - plain).abs().amax(-1) > 1e-5
    assert 0.1 < changed.float().mean() < 0.9


@pytest.mark.parametrize("other", ["add tensor on heads", "softcap", "query scale", "sink logits", "head gate",
                                   "blend mean value", "position bias"])  # fmt: skip
def test_mass_edits_combine_with(other):
    program = EDITS[other](var(classed(make(B=1, L=66))))
    program.restrict(SinkWindow((4, 1), (20, 50)))
    assert_within_budget(program, "triton")


def test_two_mass_edits_see_each_others_masses():
    program = classed(make(B=1))
    program.mass_edits = [MassEdit(shift_mass, 4), MassEdit(VAR, 4, heads=(1, 2)), MassEdit(shift_mass, 4)]
    assert_within_budget(program, "triton")


@pytest.mark.parametrize("L", [1, 2, 15, 63, 65, 111])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
def test_odd_lengths_and_kv_heads(L, Hkv):
    assert_within_budget(var(classed(make(L=L, Hkv=Hkv, pads=[(0, 0), (L // 3, 0)]))), "triton")


@pytest.mark.parametrize("D, Dv", [(40, 24), (80, 80), (128, 64)])
def test_head_dims(D, Dv):
    assert_within_budget(var(classed(make(B=1, H=2, Hkv=1, L=40, D=D, Dv=Dv))), "triton")


def test_blocks_of_one_class_and_blocks_of_all_agree():
    program = make(B=1, L=130)
    image = torch.zeros(1, 130, dtype=torch.int8)
    image[:, 32:96] = 1
    image[:, 40] = 2
    image[:, 0] = 3
    program.classify(image)
    assert_within_budget(var(program), "triton")


def expected(program, count):
    """Masses, counts, log-sum-exp, entropy and top of a program, from the attention map itself."""
    rows, cols = program.mask.query_columns, program.mask.key_columns
    seen = reference.visible(program, rows, cols).expand(-1, program.num_heads, -1, -1)
    _, p = reference.run(program)
    onehot = torch.stack([(program.key_class == c) for c in range(count)], -1)[:, None, None]
    mass = (p[..., None] * onehot).sum(3)
    number = (seen[..., None] & onehot).sum(3)
    scores = program.query @ program.key.repeat_interleave(program.num_heads // program.num_kv_heads, 1).mT
    lse = (scores * program.scale).masked_fill(~seen, float("-inf")).logsumexp(-1)
    return mass, number, lse, torch.special.entr(p).sum(-1), p.amax(-1)


@pytest.mark.parametrize("where", ["causal", "left padding", "chunk with cache, padded", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_statistics_are_those_of_the_attention_map(where, dtype):
    exact = cast(cast(classed(MASKS[where]()), dtype), torch.float64)
    program = cast(exact, dtype)
    chosen = config("classes", torch.device(DEVICE), 16, dtype)
    layout, padding = geometry.resolve(program, chosen.block_q, chosen.block_k)
    got = class_statistics(
        program.query, program.key, layout, program.key_class, 4, scale=program.scale, padding=padding
    )
    truth, plain = expected(exact, 4), expected(program, 4)
    assert torch.equal(got.count.long(), truth[1])
    alive = truth[2] > float("-inf")
    assert torch.equal(alive, got.lse > float("-inf"))
    pick = lambda x: [x[0], x[2].where(alive, 0.0), x[3], x[4]]
    values = (got.mass, None, got.lse, got.entropy, got.top)
    check_budget(("mass", "lse", "entropy", "top"), pick(truth), pick(plain), pick(values), dtype)


def test_the_parts_of_the_classes_sum_to_plain_attention():
    program = cast(classed(make(L=70)), torch.float32)
    chosen = config("classes", torch.device(DEVICE), 16, torch.float32)
    layout, padding = geometry.resolve(program, chosen.block_q, chosen.block_k)
    parts, mass, _, _ = class_attention(
        program.query,
        program.key,
        program.value,
        layout,
        program.key_class,
        4,
        scale=program.scale,
        padding=padding,
    )
    torch.testing.assert_close(parts.sum(0), attention(program, "reference").output)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_the_map_of_32_heads_is_never_made():
    """Statistics hold O(L) numbers: the largest tensor is a few times the queries."""
    from tests.kernels.test_layout import LargestTensor

    program = cast(make(B=1, H=2, Hkv=1, L=600, D=16), torch.float32)
    layout, padding = geometry.resolve(program, 32, 32)
    key_class = classes(program, 4).to(DEVICE)
    with LargestTensor() as watch:
        class_statistics(program.query, program.key, layout, key_class, 4, scale=0.25, padding=padding)
    assert watch.numel <= 600 * 4 * 8


def test_gradients_through_mass_edits_are_refused():
    program = cast(var(classed(make(B=1))), torch.float32)
    program.query.requires_grad_(True)
    assert "gradients through mass edits" in why_not("triton", program)
    with torch.no_grad():
        assert why_not("triton", program) is None


def test_ops_pass_opcheck():
    program = cast(classed(make(B=1, H=2, Hkv=1, L=34)), torch.float32)
    layout, _ = geometry.resolve(program, 32, 32)
    tensors = (
        layout.row_ptr,
        layout.full_count,
        layout.index,
        layout.tile,
        layout.bits,
        None,
        None,
        None,
        None,
    )
    sizes = [34, 34, 32, 32, 1, 1]
    take = [0.0, 0.0, 0.4, 0.4, 0.5, 0.2, 0.0, 1.0, 6.0, 4.0]
    for numbers in ([], take):
        torch.library.opcheck(
            torch.ops.hf_attn_patch.class_attention,
            (program.query, program.key, program.value, *tensors, program.key_class, 4, None, None, None, None, None,
             sizes, 0, 0, 0.0, 0.25, numbers),
        )  # fmt: skip
    torch.library.opcheck(
        torch.ops.hf_attn_patch.class_statistics,
        (
            program.query,
            program.key,
            *tensors,
            program.key_class,
            4,
            None,
            None,
            None,
            None,
            sizes,
            0,
            0,
            0.0,
            0.25,
        ),
    )


def test_a_transfer_is_the_same_thing_as_a_callable():
    masses = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    masses = masses / masses.sum(-1, keepdim=True)
    counts = torch.full((2, 1, 5, 4), 3.0)
    plan = MassTransfer(take=(0.0, 0.0, 1.0, 0.5), give=1)
    factors = plan(masses, counts, torch.arange(5))
    torch.testing.assert_close((factors * masses).sum(-1), torch.ones(2, 3, 5))
    assert (factors[..., 2] == 0).all() and (factors[..., 3] == 0.5).all() and (factors[..., 1] > 1).all()
