"""int8 quantisation: half a step of error per element, whatever the block, and nothing lost outside it."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.kernels.triton.int8 import quantise

from .conftest import DEVICE

pytestmark = pytest.mark.usefixtures("fresh_buffers_hold_nan")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random(seed: int, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, D] as transformers gives it: a transposed view of [B, N, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, dim, generator=generator) * 3
    return x.to(DEVICE, dtype).transpose(1, 2)


def per_token(scales: torch.Tensor, block: int, tokens: int) -> torch.Tensor:
    """[B, H, n] -> [B, H, N, 1]."""
    return scales.repeat_interleave(block, 2)[:, :, :tokens, None]


def check(x: torch.Tensor, block: int, mean: torch.Tensor | None = None, scale: float = 1.0) -> None:
    """Every promise of `quantise` on one input; the truth is float64."""
    values, scales = quantise(x, block, mean, scale)
    batch, heads, tokens, _ = x.shape
    assert values.dtype == torch.int8 and values.is_contiguous() and values.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (batch, heads, -(-tokens // block))
    assert torch.isfinite(scales).all()
    truth = (x.double() - (0 if mean is None else mean.double())) * scale
    step = per_token(scales, block, tokens).double()
    # fp32 roundings of x - mean, 127 / largest, their product and largest / 127, each of a number of up to 127 steps;
    # cancellation in x - mean rounds at the size of x
    rounding = 4 * 127 * 2.0**-24 * step + 2.0**-24 * scale * x.double().abs()
    assert ((truth - step * values).abs() <= step / 2 + rounding).all()
    for n in range(scales.shape[2]):
        piece = slice(n * block, (n + 1) * block)
        largest = truth[:, :, piece].abs().amax((2, 3))
        torch.testing.assert_close(scales[:, :, n].double() * 127, largest, rtol=1e-6, atol=1e-7)
        assert (values[:, :, piece].int().abs().amax((2, 3)) == 127).all()  # the range is used to its end


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 65, 111, 257])
@pytest.mark.parametrize("block", [5, 32, 64, 128])
def test_an_element_is_off_by_half_a_step_at_most(tokens, block, dtype):
    check(random(1, 1 if tokens > 200 else 2, 2, tokens, 16, dtype), block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96])
def test_a_mean_is_subtracted_and_a_factor_folded_in(dim, dtype):
    x = random(2, 2, 3, 65, dim, dtype)
    x[..., 3] += 50  # an outlier channel, which smoothing is for
    mean = x.float().mean(2, keepdim=True)
    check(x, 32, mean)
    check(x, 32, mean, 0.37)
    check(x, 64, None, 11.0)


def test_smoothing_makes_the_steps_of_an_outlier_channel_small():
    x = random(3, 1, 1, 64, 16, torch.float32)
    x[..., 3] += 500
    rough = quantise(x, 64)[1]
    smooth = quantise(x, 64, x.mean(2, keepdim=True))[1]
    assert (smooth < rough / 20).all()


def test_a_zero_block_has_scale_zero_and_a_tiny_one_counts_as_zero():
    x = random(4, 1, 2, 96, 16, torch.float32)
    x[:, 0, 32:64] = 0.0
    x[:, 1, 32:64] = 1e-31
    values, scales = quantise(x, 32)
    assert (scales[:, :, 1] == 0).all() and (values[:, :, 32:64] == 0).all()
    assert (scales[:, :, 0] > 0).all() and (scales[:, :, 2] > 0).all()
    same = torch.full((1, 1, 4, 16), 2.5, device=DEVICE)
    values, scales = quantise(same, 4, same.mean(2, keepdim=True))
    assert (values == 0).all() and (scales == 0).all()


def test_small_magnitudes_keep_their_relative_precision():
    check(random(5, 1, 1, 33, 16, torch.float32) * 1e-25, 16)


def test_ties_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], device=DEVICE).repeat(2)
    values, scales = quantise(x.reshape(1, 1, 1, 16), 1)
    assert float(scales) == 1.0
    assert values.flatten()[:8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_every_layout_in_memory_gives_the_same_values():
    x = random(6, 2, 3, 37, 32, torch.float32)
    views = (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x], 4)[..., 0])
    wanted = quantise(x, 16)
    for view in views:
        for found, expected in zip(quantise(view, 16), wanted):
            assert torch.equal(found, expected)


def test_a_wrong_mean_or_block_is_refused():
    x = random(7, 1, 2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"expected \[1, 2, 1, 16\]"):
        quantise(x, 4, torch.zeros(1, 1, 1, 16, device=DEVICE))
    with pytest.raises(ValueError, match="must be positive"):
        quantise(x, 0)


def test_operation_passes_opcheck():
    x = random(8, 1, 2, 19, 16, torch.float32)
    torch.library.opcheck(quantise, (x, 8))
    torch.library.opcheck(quantise, (x, 8, x.mean(2, keepdim=True).contiguous(), 0.5))
