"""NMI, attention distance and maps of heads: recorded numbers, closed forms, real attention, and the page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hf_attn_patch as hap
from hf_attn_patch.cli import app as cli
from hf_attn_patch.errors import ConfigError, PatchError
from hf_attn_patch.inspection import attention_distance, nmi
from hf_attn_patch.inspection.heads import head_maps as look_at
from hf_attn_patch.inspection.heads import kind_of, patch_distances
from hf_attn_patch.report import heads as report

from .small import close, inputs_of, model_of, output, refused, untouched
from .test_golden import read


def gaussian(side: int, sigma: float) -> torch.Tensor:
    """Maps [1, 1, N, N] in which a patch looks at its neighbours."""
    return torch.softmax(-(patch_distances((side, side)) ** 2) / (2 * sigma**2), -1)[None, None]


# -- numbers --------------------------------------------------------------------------------------------------------


def test_nmi_is_that_of_the_original_notebook():
    tensors, config = read("nmi__maps")
    found = nmi(tensors["in.attn"], config["drop_first"], config["eps"])
    torch.testing.assert_close(found, tensors["out.nmi"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mean(), tensors["out.layer_value"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma, value", [(0.5, 0.763), (1, 0.499), (2, 0.275), (4, 0.091), (8, 0.011)])
def test_nmi_of_known_localities(sigma, value):
    """Values of the fact sheet for 14 x 14 patches, to the digits it gives."""
    assert round(float(nmi(gaussian(14, sigma), 0)), 3) == value


def test_nmi_is_one_for_the_identity_and_zero_where_all_look_at_the_same():
    one = torch.eye(9)[None, None]
    assert float(nmi(one, 0)) == pytest.approx(1, abs=1e-6)
    assert float(nmi(torch.full((1, 1, 9, 9), 1 / 9), 0)) == pytest.approx(0, abs=1e-6)
    same = torch.zeros(1, 1, 9, 9)
    same[..., 4] = 1  # H(p_k) is 0 as well
    assert float(nmi(same, 0, eps=0.0)) == 0
    assert [kind_of(v) for v in (0.5, 0.1, 0.01)] == ["local", "hybrid", "global"]


def test_attention_distance_is_the_mean_over_queries_of_the_expected_distance():
    attention = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = attention_distance(attention, (2, 3), prefix=1)
    for b in range(2):
        for h in range(3):
            total = 0.0
            for q in range(6):
                row = attention[b, h, 1 + q, 1:]
                for k in range(6):
                    far = ((q // 3 - k // 3) ** 2 + (q % 3 - k % 3) ** 2) ** 0.5
                    total += float(row[k] / row.sum()) * far / 6
            assert float(found[b, h]) == pytest.approx(total, abs=1e-6)


# -- a running model --------------------------------------------------------------------------------------------------


def eager_maps(model, pixels):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(pixel_values=pixels, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return maps


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("of", ["cls", "received"])
def test_maps_and_numbers_are_those_of_eager_probabilities(of, block):
    model = model_of("dinov2")
    pixels = inputs_of(model, batch=1)["pixel_values"]
    with untouched(model):
        found = look_at(model, pixels, of=of, block=block)
    h, w = found.grid
    for i, attention in enumerate(eager_maps(model, pixels)):
        close(torch.from_numpy(found.nmi[i]), nmi(attention, found.prefix)[0])
        close(torch.from_numpy(found.distance[i]), attention_distance(attention, found.grid, found.prefix)[0])
        patches = (
            attention[0, :, found.prefix :, found.prefix :] if of == "received" else attention[0, :, :1, 1:]
        )
        patches = (patches / patches.sum(-1, keepdim=True)).mean(1).unflatten(-1, (h, w)).float()
        torch.testing.assert_close(torch.from_numpy(found.maps[i]), patches, rtol=0, atol=1e-6)
    assert found.target == found.layers[int(np.abs(found.nmi.mean(1) - 0.09).argmin())]


def test_patches_are_part_of_what_is_seen_and_the_model_computes_the_same():
    model = model_of("dinov2")
    pixels = inputs_of(model, batch=1)["pixel_values"]
    dense = output(model, {"pixel_values": pixels})
    before = look_at(model, pixels)
    with hap.patched(model, "neighborhood", window=1):
        after = look_at(model, pixels)
    assert after.distance.max() == 0 < before.distance.min()  # a patch reads itself (and CLS) only
    assert after.patches == ["neighborhood(window=1)"] and before.patches == []
    assert torch.equal(output(model, {"pixel_values": pixels}), dense)


def test_the_tower_of_a_vlm_is_looked_at_by_itself():
    model = model_of("llava")
    pixels = inputs_of(model, batch=1)["pixel_values"]
    found = look_at(model, pixels)
    assert len(found.layers) == model.config.vision_config.num_hidden_layers and found.of == "cls"


def test_what_cannot_be_looked_at_is_refused():
    model = model_of("dinov2")
    pixels = inputs_of(model, batch=2)["pixel_values"]
    with untouched(model), refused(PatchError, "one image"):
        look_at(model, pixels)
    with untouched(model), refused(ConfigError, "of='heat'", "received"):
        look_at(model, pixels[:1], of="heat")
    siglip = model_of("siglip_vision_model")
    with refused(PatchError, "received"):
        look_at(siglip, inputs_of(siglip, batch=1)["pixel_values"], of="cls")
    swin = model_of("swin")
    with refused(PatchError, "windows"):
        look_at(swin, inputs_of(swin, batch=1)["pixel_values"])


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "cat <1>.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_inspect_writes_one_page_without_links(picture, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["inspect", "tiny:dinov2", "--image", str(picture), "--out", str(page), "--json"]
    result = CliRunner().invoke(cli.app, [*arguments, "-p", "neighborhood:window=3"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.output)
    layers, heads = np.asarray(made["nmi"]).shape
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == layers * heads
    assert text.count("<circle") == 2 * layers * heads
    assert "cat &lt;1&gt;.png" in text and "cat <1>" not in text
    assert "neighborhood(window=3)" in text
    assert not re.search(r'(?:src|href)="(?!data:)|url\((?!data:)|<script', text)
    assert sum(len(row) for row in made["kinds"]) == layers * heads
    assert f"layer {made['target_layer']}" in text


def test_inspect_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    for name, word in (("absent.png", "no file"), ("x.png", "no image")):
        result = CliRunner().invoke(cli.app, ["inspect", "tiny:dinov2", "--image", str(tmp_path / name)])
        assert isinstance(result.exception, ConfigError) and word in str(result.exception)


def test_a_map_is_clear_where_it_is_small_and_bright_where_it_is_large():
    import base64
    import io

    from PIL import Image

    values = np.zeros((4, 5))
    values[1, 2] = 1
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(report.overlay(values).split(",")[1]))))
    assert shown.shape == (4, 5, 4)
    bright = shown[..., :3].astype(int).sum(-1)
    assert bright[1, 2] == bright.max() and (bright == bright.min()).sum() == 19
    assert [report.tick(high) for high in (0.8, 12.0, 4.0, 1.0)] == pytest.approx([0.2, 5.0, 1.0, 0.2])
