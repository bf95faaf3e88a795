"""Speed is measured in turns, on work that is really done."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.measurements import kv_bytes
from hf_attn_patch.eval.throughput import Throughput, answer, peak_memory
from tests.eval_models import Characters, language_model
from tests.test_eval_resume import counting

STREAMING = "streaming:sinks=2,window=32"


@pytest.mark.parametrize("patch", [False, True])
def test_the_timed_decoding_says_what_generate_says(patch):
    model, _ = language_model()
    ids = torch.randint(1, 128, (2, 90))
    if patch:
        hap.patch(model, "streaming", sinks=2, window=32)
    tokens, first, rest, cache = answer(model, ids, 8)
    model.generation_config.eos_token_id = None
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens, whole[:, 90:]) and first > 0 and rest > 0
    assert cache.get_seq_length() == 97


def test_variants_take_turns_item_by_item():
    model, tokenizer = language_model()
    seen = []

    class Spy(Throughput):
        def score(self, model, processor, items, reference, tick):
            seen.append((items[0].length, len(hap.active(model))))
            return super().score(model, processor, items, reference, tick)

    task = Spy(lengths=(64, 128), new_tokens=3, repeats=2)
    result = evaluation.run(task, model, tokenizer, patches=[STREAMING])
    assert seen == [(64, 0), (64, 1), (128, 0), (128, 1)] * 2
    assert not hap.active(model) and result.groups == ["64", "128", "64", "128"]
    assert result.variants[1].sites and not result["dense"].sites


def test_numbers_are_speeds_of_all_rows_and_bytes_of_the_real_cache(tmp_path):
    model, tokenizer = language_model()
    task = Throughput(lengths=(200,), new_tokens=5, repeats=2, batch_size=3)
    result = evaluation.run(task, model, tokenizer, patches=[STREAMING], out=tmp_path)
    dense, sparse = result.variants
    ms = np.array(dense.scores["first token"])
    assert np.allclose(np.array(dense.scores["prefill"]) * ms / 1000, 3 * 200)
    assert min(dense.scores["decode"]) > 0
    # 204 keys of which the last token's is there too; 2 (k, v) x 2 layers x 2 KV heads x 8 x 4 bytes x 3 rows
    assert dense.aggregates["kv cache"] == pytest.approx(2 * 2 * 2 * 8 * 4 * 3 * 204 / 2**20)
    with hap.patched(model, "streaming", sinks=2, window=32):
        one_row = kv_bytes(model, 204)
    assert sparse.aggregates["kv cache"] == pytest.approx(3 * one_row / 2**20)
    assert sparse.aggregates["kv cache"] < 0.25 * dense.aggregates["kv cache"]
    assert not (tmp_path / "items.jsonl").exists()  # speeds of two starts are not mixed


def test_five_metrics_are_rows_and_not_narrow_columns():
    model, tokenizer = language_model()
    task = Throughput(lengths=(64, 128), new_tokens=2, repeats=1)
    result = evaluation.run(task, model, tokenizer, patches=[STREAMING])
    lines = str(result).splitlines()
    rows = [line for line in lines if " dense " in line or "streaming(sinks=2, window=32)" in line]
    assert (
        len(rows) == 2 * len(result.metrics) + 1
    )  # and the header, which says what differences are taken from
    speed = f"{result['dense'].by_group['prefill']['128']:.1f}"
    assert any("prefill, tokens/s ↑" in line and speed in line for line in lines)


def test_peak_memory_sees_what_was_held_for_a_moment():
    model, _ = language_model()
    with (
        peak_memory(model) as peak,
        mmap.mmap(-1, 64 << 20) as fresh,
    ):  # malloc may reuse what is resident already
        for _ in range(64):
            fresh.write(b"1" * (1 << 20))
    if not peak.known:
        pytest.skip("this machine does not tell the peak of a process (/proc/self/clear_refs)")
    assert 60 << 20 < peak.bytes < 90 << 20


def test_several_processes_are_refused(monkeypatch):
    from hf_attn_patch.eval import harness
    from hf_attn_patch.eval.team import Team

    monkeypatch.setattr(harness, "find_team", lambda model: Team(0, 2))
    model, tokenizer = language_model()
    calls = counting(model)
    with pytest.raises(ValueError, match="2 processes would slow each other down"):
        evaluation.run(Throughput(lengths=(64,)), model, tokenizer)
    assert calls == []


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Throughput(lengths=()), "at least 2 tokens each"),
        (lambda: Throughput(repeats=0), "'repeats': 0.* must be at least 1"),
        (
            lambda: Throughput(lengths=(1020,)).items(language_model()[0], Characters(), 0),
            "Ask for lengths up to 992",
        ),
    ],
)
def test_options_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()
