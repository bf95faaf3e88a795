"""The shortcut of decoded tokens gives what the general way gives, and is left when anything it rests on changes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch.install import steady

from .small import close, model_of

PLAN = {"alphas": [[5.0, 4.0, 9.0, 9.0], [3.0, 3.0, 12.0, 1.0]], "betas": [[0.0] * 4] * 2}
CASES = [
    ("streaming", {"sinks": 2, "window": 6}),
    ("streaming", {"sinks": 0, "window": 5}),
    ("moa", {"plan": PLAN, "sinks": 2, "block": 1, "smallest": 3, "length": 100}),
    ("head_gate", {"gate": [0.5, 0.0, 1.0, 2.0]}),
    ("retrieval_mask", {"head_set": {"heads": [{"layer": 0, "head": 1}, {"layer": 1, "head": 2}]}}),
    ("duo", {"alphas": [[1.0, 0.0]] * 2, "sinks": 2, "window": 6}),
]
IDS = [f"{name}-{n}" for n, (name, _) in enumerate(CASES)]


@pytest.fixture
def counted(monkeypatch):
    """Counts of tokens that took the shortcut."""
    taken, original = [], steady.Steady.run

    def run(self, *args):
        found = original(self, *args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(steady.Steady, "run", run)
    return taken


def ids_of(batch, length):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def decoded(model, ids, prompt, mask=None, cache=None):
    """Logits of the tokens behind `prompt`, fed one by one."""
    cache, found = DynamicCache(config=model.config) if cache is None else cache, []
    for begin, end in zip([0, *range(prompt, ids.shape[1])], range(prompt, ids.shape[1] + 1)):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            more["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:end]
        found.append(model(ids[:, begin:end], past_key_values=cache, **more).logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
@pytest.mark.parametrize("pads", [None, (4, 0)], ids=["", "padded"])
def test_the_shortcut_gives_what_the_general_way_gives(name, options, pads, counted, monkeypatch):
    model, ids = model_of("llama"), ids_of(2, 30)
    mask = None if pads is None else torch.stack([(torch.arange(30) >= n).long() for n in pads])
    with hap.patched(model, name, **options) as handle:
        short = decoded(model, ids, 12, mask)
        if name != "duo" or pads is None:  # heads that keep everything hold padding too, which must be masked
            assert sum(counted) >= 20  # two layers, most of 18 tokens
        assert handle.report().sites[0].kv_len == 30
        monkeypatch.setattr(steady, "of", lambda *a: None)
        for site in handle.sites:
            site.module.attn_patch.steady = None
        close(short, decoded(model, ids, 12, mask))


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_switching_a_patch_off_and_on_takes_the_general_way(name, options, counted):
    model, ids = model_of("llama"), ids_of(1, 20)
    with hap.patched(model, name, cache="keep", **options) as handle:
        on = decoded(model, ids, 12)
        with handle.disabled():
            off = decoded(model, ids, 12)
        assert torch.equal(decoded(model, ids, 12), on)
    assert torch.equal(decoded(model, ids, 12), off)


def test_a_gate_that_is_changed_in_place_is_seen_at_the_next_token(counted):
    model, ids = model_of("llama"), ids_of(1, 20)
    with hap.patched(model, "head_gate", gate=0.5, trainable_gate=True) as handle:
        decoded(model, ids, 12)
        assert any(counted)
        with torch.no_grad():
            for site in handle.sites:
                site.module.attn_patch.patches["head_gate"].gate.fill_(0.25)
        changed = decoded(model, ids, 12)
    with hap.patched(model, "head_gate", gate=0.25):
        close(changed, decoded(model, ids, 12))


def test_attention_probabilities_and_gradients_take_the_general_way(counted):
    model, ids = model_of("llama", attn_implementation="eager"), ids_of(1, 20)
    with hap.patched(model, "head_gate", gate=0.5):
        cache = DynamicCache(config=model.config)
        decoded(model, ids, 12, cache=cache)
        with torch.no_grad():
            out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
        assert out.attentions[0].shape[-1] == 21 and not counted[-1]
        out = model(ids[:, :1], past_key_values=cache)
        assert out.logits.requires_grad or not any(p.requires_grad for p in model.parameters())


def test_two_patches_on_one_site_share_the_shortcut(counted):
    model, ids = model_of("llama"), ids_of(1, 24)
    with hap.patched(model, "streaming", sinks=2, window=6), hap.patched(model, "head_gate", gate=0.5):
        short = decoded(model, ids, 12)
        assert sum(counted) >= 16
        whole = model(ids, use_cache=False).logits[:, 11:]
    close(short, whole)


def test_rules_that_do_not_cover_the_span_are_no_shortcut(counted):
    model, ids = model_of("llama"), ids_of(1, 24)
    with (
        hap.patched(model, "streaming", sinks=6, window=4),
        hap.patched(model, "streaming", sinks=2, window=8),
    ):
        short = decoded(model, ids, 12)
        assert not any(counted)
        close(short, model(ids, use_cache=False).logits[:, 11:])
