"""KV caches of patched models: memory is really freed, and what is kept gives the tokens that no cache would give."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch.cache.spans import SpanLayer
from hf_attn_patch.call.ragged import RaggedKV
from hf_attn_patch.errors import CacheError, PatchError
from hf_attn_patch.model.sites import find_sites

from .conformance.families import or_dense_too
from .small import close, differ, inputs_of, model_of, output, refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # a method that transformers renames in v6
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
SPAN = {"sinks": 2, "window": 8}


@pytest.fixture
def llama():
    return model_of("llama")


def moa(model, **more):
    """A plan whose KV heads have different spans: 5 and 9 tokens in layer 0, 3 and 12 in layer 1."""
    plan = {"alphas": [[5.0, 4.0, 9.0, 9.0], [3.0, 3.0, 12.0, 1.0]], "betas": [[0.0] * 4] * 2}
    return {"plan": plan, "sinks": 2, "block": 1, "smallest": 3, "length": 100, **more}


def held(layer):
    """Tokens per KV head, and the bytes of storage behind them, counted on the tensors themselves."""
    tensors = [t for g in layer.groups for t in g.tensors()]
    slots = {h: g.key.shape[2] for g in layer.groups for h in g.heads}
    return slots, sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def feed(model, ids, cuts, mask=None, cache=None, position_ids=None):
    """Logits of ids [B, L] fed in pieces that end at `cuts`, through a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    begin, parts = int(cache.get_seq_length()), []
    for end in cuts:
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        if position_ids is not None:
            more["position_ids"] = position_ids[:, begin:end]
        with torch.no_grad():
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **more).logits)
        begin = end
    return torch.cat(parts, 1), cache


# -- memory -----------------------------------------------------------


@pytest.mark.parametrize("prompt", [200, 5], ids=["long_prompt", "short_prompt"])
def test_streaming_holds_sinks_and_window_and_stops_growing(prompt):
    model = model_of("llama", max_position_embeddings=512)
    ids = torch.randint(3, 100, (2, 260))
    with hap.patched(model, "streaming", **SPAN):
        _, cache = feed(model, ids, [prompt, *range(prompt + 1, 201)])
        for layer in cache.layers:
            slots, size = held(layer)
            assert slots == {0: 10, 1: 10} and layer.get_seq_length() == 200
            assert (
                size == layer.nbytes() == 2 * 2 * 2 * 10 * 16 * 8
            )  # K and V, rows, KV heads, slots, D, float64
        _, cache = feed(model, ids, [*range(201, 230), 250, 260], cache=cache)
        assert [held(layer) for layer in cache.layers] == [({0: 10, 1: 10}, 10240)] * 2
        assert cache.get_seq_length() == 260


def test_moa_holds_another_span_for_every_kv_head(llama):
    ids = torch.randint(3, 100, (1, 60))
    with hap.patched(llama, "moa", **moa(llama)):
        _, cache = feed(llama, ids, [40, *range(41, 61)])
        # a KV head keeps the largest span of its group of query heads
        assert [held(layer)[0] for layer in cache.layers] == [{0: 5, 1: 9}, {0: 3, 1: 12}]
        assert [layer.nbytes() for layer in cache.layers] == [2 * 14 * 16 * 8, 2 * 15 * 16 * 8]


def test_heads_without_the_patch_keep_everything(llama):
    ids = torch.randint(3, 100, (1, 40))
    with hap.patched(llama, "streaming", **SPAN, heads="0-1"):  # the query heads of KV head 0
        _, cache = feed(llama, ids, [30, *range(31, 41)])
        assert held(cache.layers[0])[0] == {0: 10, 1: 40}
    with hap.patched(llama, "streaming", **SPAN, heads="0"):  # its group still needs all keys
        _, cache = feed(llama, ids, [30, *range(31, 41)])
        assert type(cache.layers[0]).__name__ == "DynamicLayer"
    with hap.patched(llama, "streaming", **SPAN, layers=1):
        _, cache = feed(llama, ids, [30])
        assert [type(x).__name__ for x in cache.layers] == ["DynamicLayer", "SpanLayer"]


def test_a_prompt_does_not_keep_its_dense_keys_alive(llama):
    cache = DynamicCache(config=llama.config)
    with hap.patched(llama, "streaming", **SPAN):
        feed(llama, torch.randint(3, 100, (1, 100)), [100], cache=cache)
        for group in (g for layer in cache.layers for g in layer.groups):
            for tensor in group.tensors():
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_default_call_returns_a_converted_cache(llama):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN), torch.no_grad():
        for cache in (llama(ids).past_key_values, llama(ids, None, None, None).past_key_values):
            assert [type(x) for x in cache.layers] == [SpanLayer] * 2
        assert llama(ids, use_cache=False).past_key_values is None


def test_cache_built_without_a_config_is_converted(llama):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN):
        whole = output(llama, {"input_ids": ids}, use_cache=False)
        got, cache = feed(llama, ids, [20, 21, 30], cache=DynamicCache())
        assert [type(x) for x in cache.layers] == [SpanLayer] * 2
    close(got, whole)


def test_keep_equals_auto_and_frees_nothing(llama):
    inputs = inputs_of(llama, left_pad=[5, 0], length=24)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    results = {}
    for policy in ("auto", "keep"):
        with hap.patched(llama, "streaming", **SPAN, cache=policy):
            results[policy], cache = feed(llama, ids, [12, *range(13, 25)], mask)
            assert isinstance(cache.layers[0], SpanLayer) == (policy == "auto")
    close(results["keep"][mask.bool()], results["auto"][mask.bool()])


def test_sliding_layers_of_the_model_are_left_alone():
    model = model_of("gemma3_text")
    ids = torch.randint(3, 100, (1, 60))
    with hap.patched(model, "streaming", **SPAN) as handle:
        whole = output(model, {"input_ids": ids}, use_cache=False)
        got, cache = feed(model, ids, [40, *range(41, 61)])
        kinds = [type(x).__name__ for x in cache.layers]
        assert set(kinds) == {"DynamicSlidingWindowLayer", "SpanLayer"}
        assert "DynamicSlidingWindowLayer layers kept as they are" in str(handle.report())
    close(got, whole)


# -- the right tokens -----------------------------------------------------------

CHUNKINGS = [
    [24],
    [1, 24],
    list(range(1, 25)),
    [3, 6, 9, 12, 15, 18, 21, 24],
    [23, 24],
    [2, 24],
    [8, 9, 24],
    [10, 11, 12, 24],
    [7, 15, 16, 24],
    [9, 10, 23, 24],
]


@pytest.mark.parametrize(
    "options", [SPAN, {"sinks": 0, "window": 3}, {"sinks": 9, "window": 1}, {"sinks": 3, "window": 30}]
)
@pytest.mark.parametrize("pads", [[0, 0, 0], [6, 0, 23], [22, 21, 1]], ids=str)
def test_every_chunking_equals_no_cache(llama, options, pads):
    # rows with 23 pads hold one real token after the prompt: fewer than there are sinks
    inputs = inputs_of(llama, batch=3, length=24, left_pad=pads)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with hap.patched(llama, "streaming", **options):
        whole = output(llama, inputs, position_ids=positions, use_cache=False)
        for cuts in CHUNKINGS:
            got, _ = feed(llama, ids, cuts, mask, position_ids=positions)
            close(got[mask.bool()], whole[mask.bool()], str(cuts))


@pytest.mark.parametrize("pads", [[0, 0], [20, 3]], ids=str)
def test_every_chunking_equals_no_cache_for_uneven_spans(llama, pads):
    inputs = inputs_of(llama, batch=2, length=24, left_pad=pads)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with hap.patched(llama, "moa", **moa(llama)):
        whole = output(llama, inputs, position_ids=positions, use_cache=False)
        for cuts in CHUNKINGS:
            got, _ = feed(llama, ids, cuts, mask, position_ids=positions)
            close(got[mask.bool()], whole[mask.bool()], str(cuts))


def test_several_turns_equal_one_conversation(llama):
    ids = torch.randint(3, 100, (2, 12))
    with hap.patched(llama, "streaming", **SPAN):
        cache = DynamicCache(config=llama.config)
        for turn in range(3):
            ids = llama.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
            ids = torch.cat([ids, torch.randint(3, 100, (2, 5 + turn))], 1)
        assert cache.get_seq_length() >= 30
        again = llama.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
        fresh = llama.generate(ids, use_cache=False, max_new_tokens=6, **GREEDY)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["streaming", "moa"])
def test_generate_gives_the_tokens_of_no_cache(llama, more, method):
    inputs = inputs_of(llama, length=20, left_pad=[7, 0])
    options = SPAN if method == "streaming" else moa(llama)
    plain = {k: v for k, v in more.items() if k not in ("prefill_chunk_size", "cache_implementation")}
    with hap.patched(llama, method, **options):
        got = llama.generate(**inputs, max_new_tokens=12, **GREEDY, **more)
        expected = llama.generate(**inputs, max_new_tokens=12, use_cache=False, **GREEDY, **plain)
    assert torch.equal(got, expected)


def test_sampled_return_sequences_are_the_same_with_and_without_cache(llama):
    inputs = inputs_of(llama, length=20, left_pad=[7, 0])
    settings = dict(
        do_sample=True, num_return_sequences=3, max_new_tokens=8, eos_token_id=None, pad_token_id=0
    )
    found = []
    with hap.patched(llama, "streaming", **SPAN):
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(llama.generate(**inputs, use_cache=use_cache, **settings))
    assert torch.equal(*found) and found[0].shape[0] == 6


def test_static_cache_stays_and_says_so(llama):
    inputs = inputs_of(llama, length=20)
    with hap.patched(llama, "streaming", **SPAN) as handle:
        llama.generate(**inputs, max_new_tokens=3, cache_implementation="static", **GREEDY)
        assert "StaticLayer layers kept as they are" in str(handle.report())


@pytest.mark.parametrize("policy", ["auto", "keep"])
@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant"])
def test_speculative_decoding_gives_right_tokens_or_a_clear_error(llama, policy, kind):
    # both take tokens back, which a cache that has evicted cannot do
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 6])}
    more = (
        {"prompt_lookup_num_tokens": 3}
        if kind == "prompt_lookup"
        else {"assistant_model": model_of("llama", seed=1)}
    )
    dense = functools.partial(llama.generate, **inputs, max_new_tokens=10, **GREEDY, **more)
    with or_dense_too(dense), hap.patched(llama, "streaming", **SPAN, cache=policy):
        expected = llama.generate(**inputs, max_new_tokens=10, use_cache=False, **GREEDY)
        try:
            got = llama.generate(**inputs, max_new_tokens=10, **GREEDY, **more)
        except (CacheError, ValueError) as refusal:
            assert policy == "auto"
            assert "cache" in str(refusal)
        else:
            assert torch.equal(got, expected)
        again = llama.generate(**inputs, max_new_tokens=10, **GREEDY)
        assert torch.equal(again, expected)


# -- operations on a cache -----------------------------------------------------------


def continued(model, ids, cache, more):
    """Logits of the tokens `more` [B, n] behind `ids`, from the cache and without one."""
    every = torch.cat([ids, more], 1)
    whole = output(model, {"input_ids": every}, use_cache=False)[:, ids.shape[1] :]
    got, _ = feed(model, every, range(ids.shape[1] + 1, every.shape[1] + 1), cache=cache)
    return got, whole


@pytest.mark.parametrize("length", [5, 30], ids=["before_wrapping", "after_wrapping"])
@pytest.mark.parametrize("operation", ["repeat", "select", "reorder"])
def test_rows_of_a_cache_can_be_rearranged(llama, length, operation):
    ids = torch.randint(3, 100, (3, length))
    with hap.patched(llama, "streaming", **SPAN):
        _, cache = feed(llama, ids, [length])
        if operation == "repeat":
            cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, 0)
        elif operation == "select":
            cache.batch_select_indices(torch.tensor([2, 0]))
            ids = ids[[2, 0]]
        else:
            cache.reorder_cache(torch.tensor([1, 1, 0]))
            ids = ids[[1, 1, 0]]
        close(*continued(llama, ids, cache, torch.randint(3, 100, (ids.shape[0], 9))))


def test_rearranged_rows_keep_their_own_padding(llama):
    inputs = inputs_of(llama, batch=2, length=12, left_pad=[10, 0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.randint(3, 100, (2, 14))
    with hap.patched(llama, "streaming", sinks=4, window=6):
        _, cache = feed(llama, ids, [12], mask)
        cache.reorder_cache(torch.tensor([1, 0]))
        ids, mask = (
            torch.cat([ids[[1, 0]], more], 1),
            torch.cat([mask[[1, 0]], torch.ones(2, 14, dtype=mask.dtype)], 1),
        )
        whole = output(llama, {"input_ids": ids, "attention_mask": mask}, use_cache=False)
        got, _ = feed(llama, ids, range(13, 27), mask, cache=cache)
    close(got, whole[:, 12:])


def test_reset_makes_a_cache_as_new(llama):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN):
        first, cache = feed(llama, ids, [20, 30])
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].nbytes() == 0
        again, _ = feed(llama, ids, [20, 30], cache=cache)
    assert torch.equal(first, again)


def test_crop_takes_tokens_back_until_something_was_evicted(llama):
    ids = torch.randint(3, 100, (1, 8))
    with hap.patched(llama, "streaming", **SPAN):
        _, cache = feed(llama, ids, [8])
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        close(*continued(llama, ids[:, :5], cache, torch.randint(3, 100, (1, 10))))
        with refused(CacheError, "2 tokens", "evicted", "cache='keep'"):
            cache.crop(-2)
        cache.crop(0)
        assert cache.get_seq_length() == 15


def test_a_copied_prefix_serves_several_answers(llama):
    # prompt caching: fill once, deepcopy for every request; elastic spans must not be computed anew
    options = moa(llama, length=None, max_new_tokens=20)
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "moa", **options):
        _, prefix = feed(llama, ids, [30])
        for seed in (1, 2):
            torch.manual_seed(seed)
            every = torch.cat([ids, torch.randint(3, 100, (1, 6))], 1)
            with refused(PatchError, "2 parts", "30 tokens before", "hap.prompt(model, length="):
                feed(llama, every, [33, 34, 35, 36], cache=copy.deepcopy(prefix))
            with hap.prompt(llama, length=30):
                whole = output(llama, {"input_ids": every}, use_cache=False)[:, 30:]
                got, _ = feed(llama, every, [33, 34, 35, 36], cache=copy.deepcopy(prefix))
            close(got, whole)
        assert prefix.get_seq_length() == 30


# -- caches that do not fit the patches -----------------------------------------------------------


def test_a_cache_filled_before_the_patch_is_refused(llama):
    ids = torch.randint(3, 100, (1, 30))
    _, cache = feed(llama, ids, [20])
    with hap.patched(llama, "streaming", **SPAN):
        with refused(CacheError, "already holds 20 tokens", "DynamicLayer", "fresh cache", "cache='keep'"):
            feed(llama, ids, [30], cache=cache)
        assert cache.get_seq_length() == 20
        feed(llama, ids, [30])  # the model still works
    feed(llama, ids, [30], cache=cache)  # and so does the cache
    with hap.patched(llama, "streaming", **SPAN, cache="keep"):
        _, cache = feed(llama, ids, [20])
        got, _ = feed(llama, ids, [30], cache=cache)
        close(got, output(llama, {"input_ids": ids}, use_cache=False)[:, 20:])


def test_a_cache_of_other_spans_is_refused(llama):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN):
        _, cache = feed(llama, ids, [20])
    with hap.patched(llama, "streaming", sinks=2, window=9):
        with refused(CacheError, "20 tokens", "2+8", "fresh cache"):
            feed(llama, ids, [30], cache=cache)


@pytest.mark.parametrize("step", [1, 3], ids=["one_token", "chunk"])
def test_a_cache_used_after_unpatch_says_what_it_is(llama, step):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN):
        _, cache = feed(llama, ids, [20])
    with pytest.raises((TypeError, CacheError), match="(?s)per-head-span cache.*start a new cache"):
        feed(llama, ids, [20 + step], cache=cache)


@pytest.mark.parametrize("with_other", [False, True], ids=["alone", "beside_head_gate"])
def test_a_cache_used_while_its_patch_is_off_is_refused(llama, with_other):
    # a second patch on the site must not read the leftovers as if they were everything
    ids = torch.randint(3, 100, (1, 30))
    if with_other:
        hap.patch(llama, "head_gate", gate=0.5)
    handle = hap.patch(llama, "streaming", **SPAN)
    _, cache = feed(llama, ids, [20])
    with handle.disabled():
        with refused(CacheError, "not active now", "evicted", "fresh cache"):
            feed(llama, ids, [21], cache=cache)
        feed(llama, ids, [20, 21])
    _, cache = feed(llama, ids, [20])
    handle.remove()
    if with_other:
        with refused(CacheError, "not active now"):
            feed(llama, ids, [21], cache=cache)
        hap.unpatch(llama)


def test_a_model_that_computes_with_its_cached_keys_gets_an_error_and_a_way_out():
    group = SpanLayer([(1, 2)])
    group.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    ragged, _ = group.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert isinstance(ragged, RaggedKV) and ragged.shape == (1, 1, 6, 4) and ragged.size(2) == 6
    for use in (
        lambda: torch.cat([ragged, ragged]),
        lambda: ragged.transpose(1, 2),
        lambda: ragged[:, :, -1],
        lambda: torch.matmul(torch.zeros(1, 1, 1, 4), ragged),
    ):
        with refused(TypeError, "per-head-span cache", "cache='keep'"):
            use()


def test_two_streaming_patches_keep_the_smaller_span(llama):
    ids = torch.randint(3, 100, (1, 40))
    with hap.patched(llama, "streaming", **SPAN), hap.patched(llama, "streaming", sinks=2, window=4):
        whole = output(llama, {"input_ids": ids}, use_cache=False)
        got, cache = feed(llama, ids, [20, *range(21, 41)])
        assert held(cache.layers[0])[0] == {0: 6, 1: 6}
    close(got, whole)


def test_two_spans_of_which_neither_holds_the_other_give_what_no_cache_gives(llama):
    # many sinks and a small window, few sinks and a large window: what both may see is smaller than either
    ids = torch.randint(3, 100, (1, 40))
    with (
        hap.patched(llama, "streaming", sinks=12, window=2),
        hap.patched(llama, "streaming", sinks=1, window=20),
    ):
        whole = output(llama, {"input_ids": ids}, use_cache=False)
        got, _ = feed(llama, ids, [20, *range(21, 41)])
    close(got, whole)


# -- training -----------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_a_freeing_patch_gives_the_gradients_of_keep(llama, checkpointing):
    inputs = inputs_of(llama, left_pad=[4, 0])
    llama.requires_grad_(True).train()
    if checkpointing:
        llama.gradient_checkpointing_enable()
    gradients = []
    for policy in ("auto", "keep"):
        llama.zero_grad()
        with hap.patched(llama, "streaming", **SPAN, cache=policy):
            llama(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
    close(*gradients)
    llama.zero_grad()
    llama(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert differ(torch.cat([p.grad.flatten() for p in llama.parameters()]), gradients[0])


def test_gradients_flow_through_a_decoded_token(llama):
    # a ring slot must not be overwritten under autograd's feet
    ids = torch.randint(3, 100, (1, 16))
    llama.requires_grad_(True)
    gradients = []
    with hap.patched(llama, "streaming", sinks=1, window=4):
        for cached in (True, False):
            llama.zero_grad()
            if cached:
                cache, parts, begin = DynamicCache(config=llama.config), [], 0
                for end in (10, 11, 12, 16):
                    parts.append(llama(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
                    begin = end
                logits = torch.cat(parts, 1)
            else:
                logits = llama(ids, use_cache=False).logits
            logits.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
    close(*gradients)


def test_a_given_mask_and_a_static_cache_say_where_the_queries_are(llama):
    from transformers import StaticCache

    ids = torch.randint(3, 100, (1, 20))
    causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    with hap.patched(llama, "streaming", **SPAN), torch.no_grad():
        whole = llama(ids, use_cache=False).logits
        cache = StaticCache(config=llama.config, max_cache_len=40)
        parts = []
        for begin, end in ((0, 15), (15, 16), (16, 20)):
            mask = causal[:, :, begin:end]
            positions = torch.arange(begin, end)[None]
            step = llama(
                ids[:, begin:end], attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            parts.append(step.logits)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_t5_generates_the_tokens_of_no_cache(part):
    # T5 brings a position bias, which must follow the keys into the slots of the cache
    model = model_of("t5")
    if not find_sites(model):
        pytest.skip("T5 of this transformers does not use the attention interface")
    inputs = {k: v for k, v in inputs_of(model).items() if k != "decoder_input_ids"}
    settings = {**GREEDY, "max_new_tokens": 12, "decoder_start_token_id": 0}
    with hap.patched(model, "streaming", sinks=1, window=3, part=part):
        got = model.generate(**inputs, **settings, return_dict_in_generate=True)
        spans = [isinstance(x, SpanLayer) for x in got.past_key_values.self_attention_cache.layers]
        assert all(spans) == any(spans) == (part == "decoder")
        assert torch.equal(got.sequences, model.generate(**inputs, **settings, use_cache=False))


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_whisper_generates_the_tokens_of_no_cache(part):
    model = model_of("whisper")
    features = inputs_of(model)["input_features"]
    with hap.patched(model, "streaming", sinks=1, window=3, part=part):
        got = model.generate(features, max_new_tokens=12, do_sample=False)
        assert torch.equal(got, model.generate(features, max_new_tokens=12, do_sample=False, use_cache=False))


def test_code_that_looks_into_an_evicted_cache_gets_a_way_out():
    # Whisper does, to hand out one cache per recording
    model = model_of("whisper")
    features = inputs_of(model)["input_features"]
    with hap.patched(model, "streaming", sinks=1, window=3, part="decoder"):
        with refused(TypeError, "per-head-span cache", "cache='keep'"):
            model.generate(features, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    layer = SpanLayer([(1, 2)])
    assert layer.keys is None and layer.values is None
    layer.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    assert layer.keys.shape == (1, 1, 5, 4)
    with refused(CacheError, "cannot be replaced"):
        layer.keys = torch.zeros(1)


def test_attention_probabilities_over_an_evicted_cache_are_zero_where_nothing_is_left(llama):
    ids = torch.randint(3, 100, (1, 30))
    with hap.patched(llama, "streaming", **SPAN), torch.no_grad():
        dense = llama(ids, use_cache=False, output_attentions=True).attentions
        _, cache = feed(llama, ids, [28, 29])
        step = llama(ids[:, 29:], past_key_values=cache, output_attentions=True).attentions
    assert len(step) == 2 and step[0].shape == (1, 4, 1, 30)
    for got, expected in zip(step, dense):
        close(got, expected[:, :, -1:])
