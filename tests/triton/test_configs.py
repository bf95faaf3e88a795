"""Which block sizes a kernel gets: the table, a measured row before it, a forced one before that."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch.kernels.triton import configs, launch
from hf_attn_patch.kernels.triton.configs import Config, config

BF16, META = torch.bfloat16, torch.device("meta")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ATTN_PATCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("target", launch.TARGETS)
def test_every_kernel_has_a_row_for_every_head_dimension(target, cache):
    import hf_attn_patch.kernels.triton.aot as aot

    for module in aot.modules_with_cases():
        __import__(f"hf_attn_patch.kernels.triton.{module}")
    with launch.recording(target):
        for kernel in configs.TABLE:
            for dim in (16, 40, 64, 80, 96, 128, 192, 256):
                for dtype in (BF16, torch.float16, torch.float32):
                    found = config(kernel, META, dim, dtype)
                    assert found.num_warps in (1, 2, 4, 8, 16) and found.num_stages >= 1


def test_a_dimension_without_a_row_is_an_error_that_names_it():
    with (
        launch.recording("sm90"),
        pytest.raises(ValueError, match="layout: no configuration for head dimension 512"),
    ):
        config("layout", META, 512, BF16)


def test_a_measured_row_wins_for_its_dimension_only_and_survives_the_process(cache):
    chosen = Config(32, 128, 2, 5)
    with launch.recording("sm90"):
        before = config("layout", META, 64, BF16)
        path = configs.remember("layout", META, 128, BF16, chosen)
        assert path.parent.parent == cache and config("layout", META, 128, BF16) == chosen
        configs._read.cache_clear()  # what a new process would see
        assert config("layout", META, 128, BF16) == chosen
        assert config("layout", META, 64, BF16) == before
        assert config("layout", META, 128, torch.float32) != chosen
        with configs.as_shipped():
            assert config("layout", META, 128, BF16) != chosen
    with launch.recording("sm80"):
        assert config("layout", META, 128, BF16) != chosen


def test_a_forced_configuration_wins_and_ends_with_its_block(cache):
    with launch.recording("sm90"):
        usual = config("layout", META, 128, BF16)
        with configs.forced("layout", Config(64, 64, 4, 1)):
            assert config("layout", META, 128, BF16) == Config(64, 64, 4, 1)
        assert config("layout", META, 128, BF16) == usual


def test_recording_runs_nothing_and_knows_every_argument():
    from hf_attn_patch.kernels.triton import layout_attention

    with launch.recording("sm90") as record:
        layout_attention.aot_cases()[0].run()
    (noted,) = record.launches
    given = set(noted.arguments) | set(noted.constexprs)
    assert noted.name == "layout_forward" and given == set(noted.kernel.arg_names)
