"""`Mask`: facts agree with the tensor transformers would have made, and the guest behaves like that tensor."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, masking_utils

import hf_attn_patch as hap
from hf_attn_patch.call.mask import Mask, first_true
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.install import dispatch, native, stack

from .small import close, differ, inputs_of, model_of, output, refused

B, L = 3, 11
PADDINGS = {
    "none": None,
    "all_real": torch.ones(B, L, dtype=torch.long),
    "left": torch.tensor([[0] * 4 + [1] * 7, [1] * 11, [0] * 1 + [1] * 10]),
    "right": torch.tensor([[1] * 7 + [0] * 4, [1] * 11, [1] * 10 + [0]]),
    "holes": torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1], [1] * 11, [1, 0] * 5 + [1]]),
    "empty_row": torch.tensor([[0] * 11, [1] * 11, [0] * 10 + [1]]),
}
KINDS = ["causal", "sliding", "bidirectional", "chunked", "or_mask", "and_mask", "packed"]


@pytest.fixture(autouse=True)
def our_mask_function():
    dispatch.register()
    yield
    dispatch.unregister_if_unused()


def config_with(implementation):
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, sliding_window=4, attention_chunk_size=4
    )
    config._attn_implementation = implementation
    return config


def seen_cache(config, seen):
    cache = DynamicCache()
    if seen:
        cache.update(torch.zeros(B, 1, seen, 8), torch.zeros(B, 1, seen, 8), 0)
    return cache


def made_by_transformers(kind, implementation, padding, seen=0, dtype=torch.float32):
    """What create_*_mask returns for the last L - seen queries of L columns."""
    config = config_with(implementation)
    arguments = dict(
        config=config,
        inputs_embeds=torch.zeros(B, L - seen, 8, dtype=dtype),
        attention_mask=padding,
        past_key_values=None if kind in ("bidirectional", "packed") else seen_cache(config, seen),
    )
    if kind == "bidirectional":
        arguments.pop("past_key_values")
        return masking_utils.create_bidirectional_mask(**arguments)
    if kind == "sliding":
        return masking_utils.create_sliding_window_causal_mask(**arguments)
    if kind == "chunked":
        return masking_utils.create_chunked_causal_mask(**arguments)
    if kind == "or_mask":
        arguments["or_mask_function"] = lambda b, h, q, k: (q < 5) & (k < 5)
    if kind == "and_mask":
        arguments["and_mask_function"] = lambda b, h, q, k: (k + b) % 3 != 0
    if kind == "packed":
        arguments["position_ids"] = torch.cat([torch.arange(4), torch.arange(5), torch.arange(2)]).expand(
            B, -1
        )
    return masking_utils.create_causal_mask(**arguments)


def case(kind, padding, seen):
    if kind == "bidirectional" and seen:
        pytest.skip("no cache behind bidirectional attention")
    if kind == "packed" and (seen or padding != "none"):
        pytest.skip("packing is told by position_ids alone")


def visible(tensor):
    """A mask tensor of transformers as bool."""
    return tensor if tensor.dtype == torch.bool else tensor == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("seen", [0, 6, 10])
@pytest.mark.parametrize("flavour", ["sdpa", "eager"])
def test_the_guest_is_the_tensor_of_the_implementation(kind, padding, seen, flavour):
    case(kind, padding, seen)
    name = dispatch.NAME if flavour == "sdpa" else dispatch.EAGER_NAME
    ours = made_by_transformers(kind, name, PADDINGS[padding], seen)
    native = made_by_transformers(kind, flavour, PADDINGS[padding], seen)
    if native is None:
        assert ours is None or ours.native(flavour) is None
        if ours is None:
            return
        native = made_by_transformers(kind, "eager", PADDINGS[padding], seen)
        assert torch.equal(
            visible(ours.as_tensor()).expand(B, 1, L - seen, L), visible(native).expand(B, 1, L - seen, L)
        )
        return
    assert isinstance(ours, Mask)
    assert torch.equal(ours.native(flavour), native) and torch.equal(ours.as_tensor(), native)
    assert ours.dtype == native.dtype and ours.shape == native.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("seen", [0, 6, 10])
def test_blocks_are_cut_from_the_dense_mask(kind, padding, seen):
    case(kind, padding, seen)
    mask = made_by_transformers(kind, dispatch.NAME, PADDINGS[padding], seen)
    if mask is None:
        return
    dense = mask.dense().expand(B, 1, L - seen, L)
    truth = made_by_transformers(kind, "eager", PADDINGS[padding], seen)
    if truth is not None and PADDINGS[padding] is not None:
        assert torch.equal(dense, visible(truth).expand_as(dense))
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        rows = seen + torch.randperm(L - seen, generator=generator)[: max(1, (L - seen) // 2)]
        cols = torch.randperm(L, generator=generator)[:5]
        block = mask.block(rows, cols).expand(B, 1, -1, -1)
        assert torch.equal(block, dense[:, :, rows - seen][..., cols])
        own = torch.stack([torch.randperm(L, generator=generator)[:5] for _ in range(B)])
        own[1, 2] = -1  # an empty slot of a ragged cache
        block = mask.block(rows, own).expand(B, 1, -1, -1)
        for b in range(B):
            expected = dense[b, 0][rows - seen][:, own[b]] & (own[b] >= 0)
            assert torch.equal(block[b, 0], expected)


def test_facts_of_common_masks_are_arithmetic_and_of_odd_ones_are_not():
    facts = {
        kind: made_by_transformers(kind, dispatch.NAME, PADDINGS["left"])
        for kind in KINDS
        if kind != "packed"
    }
    assert facts["causal"].causal and facts["causal"].window is None and facts["causal"].arithmetic
    assert facts["sliding"].causal and facts["sliding"].window == 4 and facts["sliding"].arithmetic
    assert not facts["bidirectional"].causal and facts["bidirectional"].arithmetic
    for kind in ("chunked", "or_mask", "and_mask"):
        assert not facts[kind].arithmetic and facts[kind].restricts, kind
    assert facts["or_mask"].causal is False  # a query may see later keys


def test_padding_facts():
    mask = lambda name: made_by_transformers("causal", dispatch.NAME, PADDINGS[name])
    assert mask("left").starts == [4, 0, 1] and mask("left").has_padding
    assert mask("right").starts == [0, 0, 0] and mask("right").real_spans is not None
    assert mask("holes").real_spans is None and mask("holes").starts == [1, 0, 0]
    assert mask("empty_row").starts == [11, 0, 10] and mask("empty_row").real_spans is not None
    assert not mask("all_real").has_padding and mask("all_real").starts == [0, 0, 0]
    assert first_true(torch.tensor([[False, True], [False, False]])).tolist() == [1, 2]


# -- a guest in code that expects a tensor -----------------------------------------------------------


@pytest.fixture(params=["sdpa", "eager"])
def guest(request):
    name = dispatch.NAME if request.param == "sdpa" else dispatch.EAGER_NAME
    ours = made_by_transformers("causal", name, PADDINGS["left"])
    return ours, made_by_transformers("causal", request.param, PADDINGS["left"])


USES = {
    "index": lambda m: m[:, :, 2:5, :3],
    "index_none": lambda m: m[:, None],
    "ellipsis": lambda m: m[..., -1],
    "equals": lambda m: m == 0,
    "not_equals": lambda m: m != 0,
    "less": lambda m: m < 0,
    "where": lambda m: torch.where(m == 0, 1.0, 2.0),
    "cat": lambda m: torch.cat([m, m], -1),
    "stack": lambda m: torch.stack((m, m)),
    "pad": lambda m: torch.nn.functional.pad(m, (1, 0)),
    "expand": lambda m: m.expand(-1, 2, -1, -1),
    "float": lambda m: m.float(),
    "to_dtype": lambda m: m.to(torch.float64),
    "to_device_and_dtype": lambda m: m.to("cpu", torch.float64),
    "to_keyword": lambda m: m.to(dtype=torch.float16),
    "to_other": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    "add": lambda m: torch.zeros(B, 1, L, L) + m,
    "add_left": lambda m: m + torch.zeros(B, 1, L, L),
    "multiply": lambda m: m * 2.0,
    "subtract_from": lambda m: 1.0 - m.float(),
    "any": lambda m: m.any(),
    "sum": lambda m: (m == 0).sum(),
    "iterate": lambda m: torch.stack(list(m)),
    "numel": lambda m: torch.tensor(m.numel()),
    "size": lambda m: torch.tensor(m.size(-1)),
    "dim": lambda m: torch.tensor([m.dim(), m.ndim, len(m), *m.shape]),
    "transpose": lambda m: m.transpose(-1, -2),
    "type": lambda m: torch.tensor([m.is_floating_point(), m.dtype == torch.bool]),
}


@pytest.mark.parametrize("use", list(USES))
def test_a_guest_computes_like_its_tensor(guest, use):
    ours, native = guest
    if use == "subtract_from" and native.dtype != torch.bool:
        native = native.clamp(min=-1e4)
        ours = ours.clamp(min=-1e4)
    got, expected = USES[use](ours), USES[use](native)
    assert isinstance(got, torch.Tensor) and torch.equal(got, expected) and got.dtype == expected.dtype


def test_logic_on_a_bool_guest():
    ours = made_by_transformers("causal", dispatch.NAME, PADDINGS["left"])
    native = made_by_transformers("causal", "sdpa", PADDINGS["left"])
    other = torch.rand(B, 1, L, L) > 0.5
    for use in (
        lambda m: ~m,
        lambda m: m & other,
        lambda m: other | m,
        lambda m: m ^ other,
        lambda m: other & m,
    ):
        assert torch.equal(use(ours), use(native))
    assert torch.equal(ours & ours, native)


def test_a_device_move_keeps_the_facts():
    mask = made_by_transformers("causal", dispatch.NAME, PADDINGS["left"])
    assert mask.to("cpu") is mask and mask.to(device=torch.device("cpu")) is mask and mask.to() is mask
    moved = mask.to("meta")
    assert isinstance(moved, Mask) and moved.causal and torch.device(moved.device).type == "meta"
    assert mask.contiguous() is mask and mask.clone() is mask and mask.detach() is mask


def test_a_guest_is_no_tensor_where_it_cannot_be_one():
    mask = made_by_transformers("causal", dispatch.NAME, PADDINGS["left"])
    with pytest.raises(AttributeError, match="no_such_method"):
        mask.no_such_method()
    with pytest.raises(TypeError):  # an edit in place would be lost
        mask[:, :, 0] = False
    assert hash(mask) == hash(mask) and mask in {mask}
    assert "causal" in repr(mask) and "padded" in repr(mask)


# -- masks that a user brings -----------------------------------------------------------


def given_masks(mask):
    """One visibility [B, 1, L, L] in every form that users pass."""
    minimum = torch.finfo(torch.float64).min
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "bool": mask,
        "float_min": torch.where(mask, zero, torch.tensor(minimum, dtype=torch.float64)),
        "float_inf": torch.where(mask, zero, torch.tensor(float("-inf"), dtype=torch.float64)),
        "float_half_min": torch.where(mask, zero, torch.tensor(-65504.0, dtype=torch.float64)),
    }


@pytest.mark.parametrize("form", ["bool", "float_min", "float_inf", "float_half_min"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_given_mask_is_obeyed(form, impl):
    model = model_of("llama")
    ids = inputs_of(model)["input_ids"]
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask[0, :, 5:, 2] = False
    mask[1, :, :4, :4] = True  # not even causal
    given = given_masks(mask)[form]
    dense = output(model, {"input_ids": ids, "attention_mask": given})
    assert differ(dense, output(model, {"input_ids": ids}))
    with hap.patched(model, "streaming", window=1 << 20, impl=impl):
        close(output(model, {"input_ids": ids, "attention_mask": given}), dense)
    with hap.patched(model, "streaming", sinks=1, window=4, impl=impl):
        got = output(model, {"input_ids": ids, "attention_mask": given})
    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() < 4
    near[:, :1] = True
    close(got, output(model, {"input_ids": ids, "attention_mask": mask & near}))


def test_a_given_bias_is_added():
    model = model_of("llama")
    ids = inputs_of(model)["input_ids"]
    length = ids.shape[1]
    bias = torch.randn(2, 1, length, length, dtype=torch.float64)
    bias = bias.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    dense = output(model, {"input_ids": ids, "attention_mask": bias})
    for impl in ("reference", "torch"):
        with hap.patched(model, "head_gate", gate=1.0, impl=impl):
            close(output(model, {"input_ids": ids, "attention_mask": bias}), dense)


@pytest.mark.parametrize("form", ["bool", "float_min", "float_inf"])
def test_a_row_that_may_see_nothing_gives_zero_and_no_nan(form):
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    visible[0, 0, 2] = False
    given = given_masks(visible)[form]
    query = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    mask = Mask.of(given, query, query, causal=True)
    for impl in ("reference", "torch"):
        result = stack.attention(stack.Program(query, query, query, mask, scale=1.0), impl)
        assert torch.isfinite(result.output).all() and not bool(result.output[:, :, 2].any())


def test_packed_sequences_do_not_see_each_other():
    model = model_of("llama")
    ids = torch.randint(3, 100, (1, 17))
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    with hap.patched(model, "head_gate", gate=0.5), torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        parts = [model(ids[:, :6]).logits, model(ids[:, 6:]).logits]
    close(packed, torch.cat(parts, 1))


def test_a_mask_for_another_number_of_keys_is_refused():
    mask = Mask(1, 2, 5, causal=True)
    with refused(ModelMismatchError, "Linear", "7 keys", "made for 5"):
        native.check_length(torch.nn.Linear(1, 1), mask, torch.zeros(1, 1, 7, 4))


@pytest.mark.parametrize("form", ["bool", "float_min", "float_inf"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_sinks_behind_left_padding_are_found_in_a_given_mask_too(form, impl):
    # the same padding said as [B, S] and as [B, 1, L, S]
    model = model_of("llama")
    inputs = inputs_of(model, left_pad=[6, 0])
    flat = inputs["attention_mask"].bool()
    length = flat.shape[1]
    inputs["position_ids"] = (flat.long().cumsum(-1) - 1).clamp(min=0)
    full = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & flat[:, None, None, :]
    with hap.patched(model, "streaming", sinks=2, window=4, impl=impl):
        expected = output(model, inputs, use_cache=False)
        got = output(model, {**inputs, "attention_mask": given_masks(full)[form]}, use_cache=False)
    close(got[flat], expected[flat])


PACKED = (5, 7, 1, 9)  # lengths of the sequences of one row
COUNTING = [
    ("streaming", {"sinks": 1, "window": 3}),
    ("moba", {"block": 3, "topk": 1}),
    ("s2", {"stride": 2, "local_blocks": 1, "block": 2}),
    ("pasta", {"marked": [[1, 3]], "alpha": 0.05}),
    ("moa", {"plan": {"alphas": [[2.0] * 4] * 2, "betas": [[0.2] * 4] * 2}, "sinks": 1, "block": 1, "smallest": 2,
             "max_new_tokens": 0}),
]  # fmt: skip


def packed_row():
    ids = torch.arange(sum(PACKED))[None] + 5
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    return ids, positions, ids.split(PACKED, 1)


@pytest.mark.parametrize("told", ["positions", "positions and a mask", "positions and a cache", "lengths"])
@pytest.mark.parametrize("name, options", COUNTING, ids=[name for name, _ in COUNTING])
def test_packed_sequences_are_counted_one_by_one(name, options, told):
    model = model_of("llama")
    ids, positions, each = packed_row()
    more = {"use_cache": told.endswith("cache"), "position_ids": positions}
    if told.endswith("mask"):
        more["attention_mask"] = torch.ones_like(ids)
    if told == "lengths":
        ends = torch.tensor([0, *torch.tensor(PACKED).cumsum(0).tolist()], dtype=torch.int32)
        more.update(
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(PACKED), max_length_k=max(PACKED)
        )
    with hap.patched(model, name, **options), torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False)[0] for part in each], 1)
        together = model(input_ids=ids, **more)[0]
    torch.testing.assert_close(together, alone)


def test_gates_leave_packed_rows_to_the_model():
    model = model_of("llama")
    ids, positions, each = packed_row()
    with hap.patched(model, "head_gate", gate=0.5), torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        alone = torch.cat([model(input_ids=part, use_cache=False)[0] for part in each], 1)
    torch.testing.assert_close(together, alone)


def test_packed_rows_are_refused_by_methods_that_know_whole_rows_only():
    model = model_of("llava")
    ids = torch.cat([torch.full((1, 4), model.config.image_token_id), torch.arange(8)[None] + 5], 1)
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    lengths = torch.tensor([0, 6, 12], dtype=torch.int32)
    with hap.patched(model, "vaf", first_layer=0, last_layer=None), torch.no_grad():
        with pytest.raises(hap.PatchError, match="packs several sequences"):
            embeds = model.get_input_embeddings()(ids)
            with hap.prompt(model, image_keys=ids == model.config.image_token_id):
                model(inputs_embeds=embeds, position_ids=positions, use_cache=False, cu_seq_lens_q=lengths)


def test_padding_between_the_turns_of_a_batched_chat_is_not_counted():
    model = model_of("llama")
    one, two = [list(range(5, 14)), list(range(20, 25))], [list(range(30, 34)), list(range(40, 47))]
    options = [*COUNTING[:3], ("pasta", {"marked": [[1, 3]], "alpha": 0.05, "length": 12})]

    def padded(rows):
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def batch():
        (first, real), (second, also), cache = padded(one), padded(two), DynamicCache(config=model.config)
        both = torch.cat([real, also], 1)
        positions = (both.cumsum(1) - 1).clamp(min=0)
        model(first, attention_mask=real, position_ids=positions[:, :9], past_key_values=cache)
        after = model(
            second, attention_mask=both, position_ids=positions[:, 9:], past_key_values=cache
        ).logits[:, -1]
        step = torch.cat([both, torch.ones(2, 1, dtype=both.dtype)], 1)
        more = model(torch.tensor([[7], [8]]), attention_mask=step, position_ids=step.sum(1, keepdim=True) - 1,
                     past_key_values=cache).logits[:, -1]  # fmt: skip
        return torch.stack([after, more])

    def alone():
        found = []
        for first, second, last in zip(one, two, (7, 8)):
            every = torch.tensor([first + second + [last]])
            with hap.prompt(model, length=every.shape[1] - 1):
                found.append(model(every, use_cache=False).logits[0, -2:])
        return torch.stack(found, 1)

    for name, chosen in options:
        with hap.patched(model, name, **chosen), torch.no_grad():
            torch.testing.assert_close(batch(), alone(), msg=lambda text, name=name: f"{name}: {text}")
