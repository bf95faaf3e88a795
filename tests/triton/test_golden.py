"""The kernels against numbers of the original implementations (tests/golden), within the budget of float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import BlockSinkWindow
from hf_attn_patch.kernels import attention
from tests.kernels.budget import cast, check_budget
from tests.test_golden import NATTEN, heads_first, natten_rule, read

from .conftest import DEVICE


def check(program, expected):
    """`expected` is the truth (float64, from the original); plain torch in float32 sets the budget."""
    single = cast(program, torch.float32)
    plain = attention(single, "reference").output
    single = replace(single, **{n: getattr(single, n).to(DEVICE) for n in ("query", "key", "value")})
    single.mask.device = DEVICE
    result = attention(single, "triton")
    assert result.executor == "triton"
    check_budget(("output",), [expected], [plain], [result.output.cpu()], torch.float32)


@pytest.mark.parametrize("case", NATTEN)
def test_neighborhood(case):
    tensors, config = read(case)
    rule = natten_rule(config)
    n = rule.required_len()
    q, k, v = (heads_first(tensors[f"in.{name}"], config["na_dim"]) for name in "qkv")
    program = Program(q, k, v, Mask(q.shape[0], n, n), scale=config["scale"], rules=[rule])
    check(program, heads_first(tensors["out.out"], config["na_dim"]).double())


def test_moa_block_prefill():
    tensors, config = read("moa__runtime_prefill")
    block, length = config["block"], config["L"]
    rule = BlockSinkWindow(
        tuple(s // block for s in config["sink_size"]), tuple(w // block for w in config["local_size"]), block
    )
    q, k, v = (tensors[f"in.{n}"].double() for n in "qkv")
    program = Program(q, k, v, Mask(1, length, length, causal=True), scale=config["D"] ** -0.5, rules=[rule])
    check(program, tensors["out.o_fp64"])
