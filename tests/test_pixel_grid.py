"""Which token grid a forward works on, and forwards that have none: each is refused with its reason and a way out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model


def windowed(family: str, **options):
    """(model in float64 with `swin_window`, its inputs, made before it was patched)."""
    model = tiny_model(family).eval().double()
    inputs = tiny_inputs(model, batch=2)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window saves no time on 16 tokens
        hap.patch(model, "swin_window", window=2, **options)
    return model, inputs


def refusal(model, inputs) -> str:
    with torch.no_grad(), pytest.raises(ModelMismatchError) as refused:
        model(**inputs)
    return str(refused.value)


def test_a_grid_that_the_pixels_contradict_is_refused():
    model, inputs = windowed("vit", grid=[3, 5])  # 15 patches would leave two prefix tokens instead of one
    assert "grid=(3, 5) was given" in (said := refusal(model, inputs)) and "(4, 4)" in said
    same, inputs = windowed("vit", grid=[4, 4])
    same(**inputs)


def naflex(model, shapes):
    inputs = tiny_inputs(model, batch=2)
    return {**inputs, "pixel_values": inputs["pixel_values"].double(), "spatial_shapes": torch.tensor(shapes)}


def test_images_of_one_resolution_in_flattened_patches_have_a_grid():
    model, _ = windowed("siglip2_vision_model")
    inputs = naflex(model, [[4, 4], [4, 4]])
    with torch.no_grad():
        seen = model(**inputs).last_hidden_state
        far = inputs["pixel_values"].clone()
        far[:, 3] += 1  # the patch in the upper right corner: another window than that of patch 0
        moved = model(**{**inputs, "pixel_values": far}).last_hidden_state
    assert torch.equal(seen[:, 0], moved[:, 0]) and not torch.equal(seen[:, 2], moved[:, 2])


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([[4, 4], [2, 8]], ["different grids", "(2, 8)", "one resolution"]),
        ([[3, 5], [3, 5]], ["padded to 16", "max_num_patches=15"]),
    ],
)
def test_mixed_and_padded_resolutions_are_refused(shapes, words):
    model, _ = windowed("siglip2_vision_model")
    said = refusal(model, naflex(model, shapes))
    assert all(word in said for word in words)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_packed_images_are_refused_even_if_a_grid_is_named(family):
    model, inputs = windowed(family, grid=[4, 4])
    assert "no row-major grid" in refusal(model, inputs)
    assert "no row-major grid" in refusal(
        lambda **x: model.get_image_features(x["pixel_values"], x["image_grid_thw"]), inputs
    )


def test_several_images_in_one_sequence_are_refused():
    model, inputs = windowed("pixtral")
    assert "the 2 images of this forward are 1 sequence(s)" in refusal(model, inputs)
    model(**{k: v[:1] for k, v in inputs.items()})


def test_patches_in_random_order_are_refused_and_patches_in_order_are_not():
    model, inputs = windowed("vit_mae")
    assert "random order" in refusal(model, inputs)
    model.config.mask_ratio = 0.0
    assert "random order" in refusal(model, inputs)
    noise = torch.arange(16.0, dtype=torch.float64).expand(2, 16)
    assert "random order" in refusal(model, {**inputs, "noise": noise.flip(1)})
    with torch.no_grad():
        model(**inputs, noise=noise)


def test_channel_attention_is_refused_and_the_rest_of_the_tower_is_not():
    model = tiny_model("florence2").eval()
    with pytest.raises(ModelMismatchError, match=r"channels.*layers=\[0, 2, 4, 6, 8\]"):
        hap.patch(model, "kk_attention")
    assert not hap.active(model)
    handle = hap.patch(model, "kk_attention", layers=[0, 2])
    tower = model.model.vision_tower
    with torch.no_grad():
        tower(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert {s.q_len for s in handle.report().sites} == {math.prod((8, 8))}


def test_attention_without_dispatch_is_left_alone_and_said_so():
    model = tiny_model("siglip_vision_model").eval()
    said = "head (SiglipMultiheadAttentionPoolingHead)"
    assert said in str(hap.plan(model, "kk_attention"))
    assert hap.plan(model, "kk_attention").to_dict()["left_alone"] == [said]
    handle = hap.patch(model, "kk_attention")
    assert said in str(handle.report())
    assert hap.plan(tiny_model("vit"), "kk_attention").left_alone == []
