"""Random calls: the torch and Triton executors against float64, the span cache against all keys."""

from __future__ import annotations

import random

import pytest
import torch

from hf_attn_patch.cache import SpanLayer
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.kernels import attention, reference, why_not

from .budget import assert_within_budget, cast, check_budget, device_of, outputs
from .fuzz import random_program, seeds
from .test_hidden_keys import as_kernels_hide, poisoned

pytestmark = [
    pytest.mark.usefixtures("fresh_buffers_hold_nan"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
KEEPS_ALL = 1 << 30


@pytest.mark.parametrize("seed", seeds(60))
def test_fuzz_torch_executor(seed):
    """In float64, where a wrong key shows and rounding does not; what no query reads holds NaN."""
    program = random_program(seed)
    bad, hidden = poisoned(program) if seed % 2 else (program, 0)
    mask = program.mask
    some = reference.visible(program, mask.query_columns, mask.key_columns).any()  # else there is no graph
    gradients = seed % 3 == 0 and bool(some)
    truth = outputs(program, "reference", gradients)
    for impl in ("torch", "reference") if hidden else ("torch",):
        for name, t, got in zip(("output", "dq", "dk", "dv"), truth, outputs(bad, impl, gradients)):
            error = (got - t).abs().max()
            # of O(1) numbers: a gradient may be 0 by cancellation, and its rounding is not
            assert error <= 1e-11 * (1 + t.abs().max()), (
                f"{impl}: {name} is off by {error:.3g}, seed {seed}\n{program}"
            )


@pytest.mark.parametrize("seed", seeds(15, 0.2))
def test_fuzz_torch_executor_in_float32(seed):
    program = random_program(100_000 + seed)
    program.mass_edits = []  # those with a threshold are not continuous
    assert_within_budget(program)


@pytest.mark.parametrize("seed", seeds(6, 0.02))
def test_fuzz_triton_executor(seed):
    pytest.importorskip("triton")
    program = random_program(200_000 + seed)
    program.mass_edits = []
    reason = why_not("triton", cast(program, torch.float32, device_of("triton")))
    if reason is not None:
        pytest.skip(reason)
    clean, (bad, _) = program, poisoned(as_kernels_hide(program))
    bad.mask, bad.rules = program.mask, program.rules
    names = ("output", "dq", "dk", "dv")
    found = [outputs(cast(p, d, device_of(i)), i, False) for p, d, i in [
        (cast(clean, torch.float32), torch.float64, "reference"), (clean, torch.float32, "reference"),
        (bad, torch.float32, "triton")]]  # fmt: skip
    check_budget(names, *found, torch.float32, f"triton, seed {seed}\n{program}")


@pytest.mark.parametrize("seed", seeds(60))
def test_fuzz_span_cache(seed):
    """Prompts, chunks and tokens in random pieces, with padding, reordered and repeated rows, against all keys."""
    r = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    Hkv, group, B, D = r.choice((1, 2, 4)), r.choice((1, 2)), r.choice((1, 2, 3)), 8
    spans = [r.choice([(0, 0), (r.randint(0, 6), r.randint(1, 40)), (4, 16)]) for _ in range(Hkv)]
    pieces = [r.choice((1, 1, 1, 2, 7, r.randint(1, 50))) for _ in range(r.randint(1, 14))]
    total = sum(pieces)
    # a row may have seen nothing but padding for a while
    start = torch.tensor([r.choice((0, r.randint(0, total - 1))) for _ in range(B)])
    layer = SpanLayer(spans, start.clone())
    keys, values = rand(B, Hkv, 0, D), rand(B, Hkv, 0, D)
    seen = 0
    for step, L in enumerate(pieces):
        if step and r.random() < 0.15:
            rows = torch.tensor([r.randrange(B) for _ in range(B)])
            change = r.choice(("reorder_cache", "batch_select_indices"))
            getattr(layer, change)(rows)
            keys, values, start = keys[rows], values[rows], start[rows]
        if step and B < 5 and r.random() < 0.05:
            layer.batch_repeat_interleave(2)
            keys, values, start = (x.repeat_interleave(2, 0) for x in (keys, values, start))
            B *= 2
        q, k, v = rand(B, Hkv * group, L, D), rand(B, Hkv, L, D), rand(B, Hkv, L, D)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        padding = torch.arange(seen + L) >= start[:, None]
        mask = Mask(B, L, seen + L, q_offset=seen, causal=True, padding=padding)
        rule = SinkWindow(tuple(s for s, _ in spans), tuple(w or KEEPS_ALL for _, w in spans))
        k, v = layer.update(k, v)
        ours, whole = Program(q, k, v, mask, D**-0.5), Program(q, keys, values, mask, D**-0.5)
        ours.restrict(rule), whole.restrict(rule)
        truth = attention(whole, "reference").output
        assert layer.get_seq_length() == seen + L
        where = f"seed {seed} step {step} spans {spans} pieces {pieces} start {start.tolist()}"
        for impl in ("torch", "reference"):
            error = (attention(ours, impl).output - truth).abs().max()
            assert error <= 1e-12, f"{impl} is off by {error:.3g}, {where}"
        seen += L
