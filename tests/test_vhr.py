"""`vhr` and the image-free pass it needs: the formula, which prompt runs a second time, and when heads are chosen."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.calibration.capture import captured
from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import Program
from hf_attn_patch.errors import CacheError, ConfigError, ModelMismatchError, PatchError
from hf_attn_patch.forward.needs import image_free
from hf_attn_patch.forward.running import current
from hf_attn_patch.kernels import attention
from hf_attn_patch.patches.grounding.vhr import choose_heads, divergence, outliers

from .conformance.families import columns_of, media_end, row_of
from .small import close, differ, inputs_of, model_of, output, refused, untouched
from .test_context import GREEDY, context_of, decode, gradient, prefill, two_images
from .test_golden import read
from .test_grounding import FAMILIES, positions

pytestmark = pytest.mark.filterwarnings("ignore:.*published for models of 32 layers")
BRANCHES = ("reference", "joint")
every_branch = pytest.mark.parametrize("branch", BRANCHES)
WIDE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def llava():
    return model_of("llava")


def deep_llava():
    """Four layers of eight heads, so that layers differ in what they choose."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = model_of("llava").config.to_dict()
    config["text_config"].update(WIDE, layer_types=None)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model.double().requires_grad_(False)


# -- the formula --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["even_heads", "image_equals_text"])
def test_every_step_of_the_formula_is_that_of_the_golden_file(case):
    tensors, _ = read(f"vhr__{case}")
    seen, blind = tensors["out.head_image"], tensors["out.head_text"]
    vhd = divergence(seen, blind)
    close(vhd, tensors["out.vhd"])
    assert torch.equal(outliers(vhd, blind), tensors["out.outlier"])
    assert torch.equal(choose_heads(seen, blind), tensors["out.selected"])
    if case == "even_heads":
        variants = {
            "no_outlier": {"drop_outliers": False},
            "squared": {"squared": True},
            "std_ddof1": {"ddof": 1},
        }
        for name, options in variants.items():
            assert torch.equal(choose_heads(seen, blind, **options), tensors[f"out.selected_{name}"]), name
        assert bool(tensors["out.outlier"].any()), "the file is about the outlier rule"
    else:
        assert not choose_heads(seen, blind).any()


def plain_program(tensors, suffix=""):
    query, key, value = (tensors[f"in.{name}{suffix}"] for name in "qkv")
    mask = Mask(query.shape[0], query.shape[2], query.shape[2], causal=True)
    return Program(query, key, value, mask, scale=query.shape[-1] ** -0.5)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_all_rows_are_scaled_as_in_the_golden_file_and_decoding_uses_the_same_gate(impl):
    tensors, config = read("vhr__even_heads")
    length, text = config["L_image"], attention(plain_program(tensors, "_text"), impl).output[:, :, -1]
    last = torch.full((config["B"],), length - 1)
    has = torch.ones(config["B"], dtype=torch.bool)
    context = SimpleNamespace(
        config=model_of("llava").config, image_free_pass=None, scratch={}, override={}, prompt_length=length,
        memory={image_free.ROWS: {"last": last, "has": has}}, image_keys=torch.ones(config["B"], length).bool(),
        image_free=lambda path, how: text,
    )  # fmt: skip
    call = SimpleNamespace(layer=1, path="site", context=context, heads=None, key="vhr")
    program = plain_program(tensors)
    patch = registry.build("vhr", {"alpha": config["alpha"]})
    patch.edit(program, call)
    assert "output gate" in repr(program)
    out = attention(program, impl).output
    torch.testing.assert_close(out, tensors["out.context_scaled"], rtol=0, atol=1e-9)
    layer = out.transpose(1, 2).flatten(2) @ tensors["param.w_o"]
    torch.testing.assert_close(layer, tensors["out.layer_output"], rtol=0, atol=1e-9)
    later = plain_program(tensors)
    patch.edit(later, call)
    assert torch.equal(later.head_gate[:, 0], tensors["out.gate"]) and not later.output_gates


def test_a_scaled_head_is_a_scaled_block_of_the_output_projection(llava):
    """Fold test: the gate of one prompt, multiplied into W_O, gives the same logits without a patch."""
    inputs = inputs_of(llava, batch=1)
    with hap.patched(llava, "vhr", alpha=3.0):
        cache = prefill(llava, inputs)
        expected = output(llava, inputs)
    gates = {
        k.split()[-1]: v
        for m in cache._attn_patch_memory.values()
        for k, v in m.items()
        if k.startswith("vhr")
    }
    assert len(gates) == 2
    for path, gate in gates.items():
        weight = llava.get_submodule(path).o_proj.weight
        weight.mul_(gate[0].repeat_interleave(weight.shape[1] // gate.shape[1]))
    close(output(llava, inputs), expected)


def last_outputs(model, inputs, gates=None):
    """layer -> output [B, H, Dv] of the heads in the last row, with `gates` (layer -> [H]) on the way."""
    found = {}
    heads = model.config.text_config.num_attention_heads
    depth = model.config.text_config.num_hidden_layers
    table = [(gates or {}).get(layer, torch.ones(heads)).tolist() for layer in range(depth)]
    with (
        captured(model, lambda layer, _, out: found.__setitem__(layer, out[:, :, -1].clone())),
        hap.patched(model, "head_gate", gate=table, part="text"),
    ):
        logits = output(model, inputs)
    return found, logits


@pytest.mark.parametrize("more", [{}, {"last": 2, "also": (0,)}, {"last": 0, "also": (-3,)}], ids=str)
@every_branch
def test_layers_are_gone_through_one_by_one_and_joint_scales_both_branches(branch, more):
    model = deep_llava()
    inputs = inputs_of(model, batch=1)
    text = {k: inputs[k][:, inputs["input_ids"][0] != 100] for k in ("input_ids", "attention_mask")}
    gates = {}
    for layer in sorted(registry.build("vhr", more).layers_of(4)):
        seen, _ = last_outputs(model, inputs, gates)
        blind, _ = last_outputs(model, text, gates if branch == "joint" else None)
        gates[layer] = torch.where(choose_heads(seen[layer], blind[layer])[0], 2.0, 1.0)
    assert all(int((g > 1).sum()) in (3, 4) for g in gates.values())
    expected = last_outputs(model, inputs, gates)[1]
    with hap.patched(model, "vhr", branch=branch, **more):
        close(output(model, inputs), expected)


def test_the_two_branches_choose_other_heads_somewhere():
    model = deep_llava()
    found = []
    for branch in BRANCHES:
        with hap.patched(model, "vhr", branch=branch):
            found.append(output(model, inputs_of(model, batch=3)))
    assert differ(*found)


def test_layers_are_the_second_and_the_last_fourteen():
    build = functools.partial(registry.build, "vhr")
    assert build({}).layers_of(32) == {1, *range(18, 32)}
    assert build({"last": 18, "also": ()}).layers_of(32) == set(range(14, 32))
    assert build({"last": 0, "also": (1, -1, 99)}).layers_of(8) == {1, 7}


def test_chosen_heads_are_only_those_of_heads(llava):
    inputs = inputs_of(llava, batch=1)
    with hap.patched(llava, "vhr"):
        every = prefill(llava, inputs)._attn_patch_memory
    with hap.patched(llava, "vhr", heads=(0, 1)):
        some = prefill(llava, inputs)._attn_patch_memory
    gates = [{k.split()[-1]: v[0] for m in memory.values() for k, v in m.items() if k.startswith("vhr")}
             for memory in (every, some)]  # fmt: skip
    path = "model.language_model.layers.0.self_attn"
    assert torch.equal(gates[1][path][:2], gates[0][path][:2]) and bool((gates[1][path][2:] == 1).all())
    assert bool((gates[0][path] > 1).any())


# -- the image-free pass -------------------------------------------------------------------------------------------


def watched_pass(model, inputs, **options):
    """(arguments of the image-free pass, path -> its outputs) of a prefill."""
    passes = []
    with hap.patched(model, "vhr", **options):
        hook = lambda module, args, kwargs: (
            passes.append(kwargs) if context_of(model).running().image_free_pass else None
        )
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        cache = prefill(model, inputs)
        handle.remove()
    kept = {k.split()[-1]: v for m in cache._attn_patch_memory.values() for k, v in m.items()
            if k.startswith("image-free reference")}  # fmt: skip
    assert len(passes) == 1
    return passes[0], kept


def test_it_runs_on_the_text_of_every_row_padded_on_the_left_again(llava):
    inputs = positions(two_images(llava))
    ids = inputs["input_ids"]
    given, kept = watched_pass(llava, inputs)
    assert "pixel_values" not in given and given["use_cache"] is False
    width = given["input_ids"].shape[1]
    for row, pad in enumerate((0, 5)):
        text = ids[row, pad:][ids[row, pad:] != llava.config.image_token_id]
        assert torch.equal(given["input_ids"][row, width - len(text) :], text)
        assert int(given["attention_mask"][row].sum()) == len(text)
        assert given["position_ids"][row, width - len(text) :].tolist() == list(range(len(text)))
        alone, _ = last_outputs(llava, {"input_ids": text[None]})
        for layer, (_, out) in enumerate(sorted(kept.items())):
            close(out[row : row + 1], alone[layer])
    assert not bool((given["input_ids"] == llava.config.image_token_id).any())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_tokens_around_an_image_go_with_it(family):
    model = model_of(family)
    around = image_free.wrapper_ids(model.config)
    assert len(around) >= 2
    inputs = inputs_of(model, batch=1)
    ids = inputs["input_ids"]
    ids[0, -3], ids[0, -2] = around[0], 9
    image = model.config.image_token_id
    begin, keep = (
        int((ids[0] == image).nonzero()[0]),
        (ids[0] != image) & (ids[0] != around[0]) & (ids[0] != 9),
    )
    assert begin == 1
    given, _ = watched_pass(model, inputs, wrappers=(9,))
    assert torch.equal(given["input_ids"][0], ids[0][keep])
    given, _ = watched_pass(model, inputs)
    assert 9 in given["input_ids"][0].tolist()


def test_it_costs_one_forward_of_the_text_per_conversation_and_none_of_the_tower(llava):
    inputs = two_images(llava)
    forwards = {"language_model": 0, "vision_tower": 0}

    def count(name):
        return lambda *_: forwards.__setitem__(name, forwards[name] + 1)

    for name in forwards:
        llava.get_submodule(f"model.{name}").register_forward_hook(count(name))
    with hap.patched(llava, "vhr"):
        llava.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert forwards == {"language_model": 5, "vision_tower": 1}


@pytest.mark.parametrize("wanted", [{"output_hidden_states": True}, {"output_attentions": True}], ids=str)
@every_branch
def test_it_adds_nothing_to_what_the_forward_collects(branch, wanted):
    model = deep_llava()
    inputs = inputs_of(model)
    name = next(iter(wanted)).removeprefix("output_")
    with hap.patched(model, "vhr", branch=branch), torch.no_grad():
        plain = model(**inputs)
        found = model(**inputs, **wanted)
    close(found.logits, plain.logits)
    assert len(found[name]) == 4 + (name == "hidden_states")
    assert all(t.shape[-2] == inputs["input_ids"].shape[1] for t in found[name])


@every_branch
def test_the_forward_goes_on_with_its_own_facts_after_it_and_after_an_error_in_it(llava, branch):
    inputs = two_images(llava)
    with hap.patched(llava, "vhr", branch=branch):
        expected = output(llava, inputs)
        context = context_of(llava)
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(image_free.Pass, "keep", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                output(llava, inputs)
        assert current(context) is None and context._depth == 0
        assert torch.equal(output(llava, inputs), expected)


@pytest.mark.parametrize("other, options", [("head_gate", {"gate": 0.5}), ("pai", {"first_layer": 0})])
def test_the_reference_branch_is_clean_whatever_else_is_patched(llava, other, options):
    inputs = inputs_of(llava)
    _, alone = watched_pass(llava, inputs)
    with hap.patched(llava, other, **options):
        _, beside = watched_pass(llava, inputs)
    assert all(torch.equal(alone[path], beside[path]) for path in alone)


def test_the_joint_branch_runs_other_patches_but_those_of_image_keys(llava):
    inputs = inputs_of(llava)
    found = []
    for gate in (1.0, 0.5):
        with hap.patched(llava, "head_gate", gate=gate), hap.patched(llava, "pai", first_layer=0):
            with hap.patched(llava, "vhr", branch="joint"):
                memory = prefill(llava, inputs)._attn_patch_memory
        found.append(
            {k: v for m in memory.values() for k, v in m.items() if k.startswith("image-free joint")}
        )
    key = "image-free joint () model.language_model.layers.0.self_attn"
    close(found[1][key], found[0][key] / 2)


# -- caches, batches, streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@every_branch
def test_decoding_with_a_cache_gives_what_one_forward_gives(branch, family):
    model = model_of(family)
    inputs = inputs_of(model, left_pad=[3, 0])
    if "image_grid_thw" in inputs:  # positions in three axes, which the model finds only in its first forward
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        known = {k: inputs[k] for k in names if k in inputs}
        inputs["position_ids"] = model.model.get_rope_index(**known)[0]
    else:
        inputs = positions(inputs)
    first, length = media_end(inputs, model) + 3, inputs["input_ids"].shape[1]
    dense = output(model, inputs)
    with hap.patched(model, "vhr", branch=branch):
        with hap.prompt(model, length=first):
            whole = output(model, inputs)
        cache, parts, begin = DynamicCache(config=model.config), [], 0
        for end in range(first, length + 1):  # the cache knows where the prompt ended
            part = columns_of(inputs, begin, end)
            parts.append(output(model, part, past_key_values=cache, use_cache=True))
            begin = end
    for row, pad in enumerate((3, 0)):
        close(torch.cat(parts, 1)[row, pad:], whole[row, pad:])
    assert differ(whole, dense)


@every_branch
def test_rows_are_the_same_in_a_batch_and_alone(llava, branch):
    inputs = positions(two_images(llava))
    with hap.patched(llava, "vhr", branch=branch):
        together = output(llava, inputs)
        for row, pad in enumerate((0, 5)):
            close(output(llava, row_of(inputs, row, 2, pad)), together[row : row + 1, pad:], f"row {row}")


def test_right_padding_does_not_hide_the_row_that_predicts_the_answer(llava):
    alone = positions(inputs_of(llava, batch=1, length=9))
    length = alone["input_ids"].shape[1]
    padded = {k: torch.nn.functional.pad(v, (0, 4)) for k, v in alone.items() if k != "pixel_values"}
    both = {k: torch.cat([torch.nn.functional.pad(alone[k], (0, 4), value=1), padded[k]]) for k in padded}
    both["pixel_values"] = alone["pixel_values"].repeat(2, 1, 1, 1)
    with hap.patched(llava, "vhr"):
        close(output(llava, both)[1, :length], output(llava, alone)[0])


def test_a_row_without_an_image_is_left_alone(llava):
    inputs = inputs_of(llava, batch=2, length=30)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[1][ids[1] == llava.config.image_token_id] = 7
    mask[1, :25] = (
        0  # padded differently without the image: positions differ, and by rounding so do the outputs
    )
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"][:1]}
    dense = output(llava, inputs)
    with hap.patched(llava, "vhr"):
        edited = output(llava, inputs)
    close(edited[1, 25:], dense[1, 25:])
    assert differ(edited[0], dense[0])


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@every_branch
def test_generation_with_a_cache_gives_the_logits_of_generation_without(llava, branch, more):
    inputs = two_images(llava)
    plain = {k: v for k, v in more.items() if k == "num_beams"}
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    dense = llava.generate(**inputs, **options, **more)
    with hap.patched(llava, "vhr", branch=branch), hap.prompt(llava, length=inputs["input_ids"].shape[1]):
        cached = llava.generate(**inputs, **options, **more)
        expected = llava.generate(**inputs, use_cache=False, **options, **plain)
    assert torch.equal(cached.sequences, expected.sequences)
    close(torch.stack(cached.logits), torch.stack(expected.logits))
    assert differ(cached.logits[1], dense.logits[1])


def test_the_choice_belongs_to_its_cache_and_follows_copies_and_beams(llava):
    a, b, step = inputs_of(llava, seed=1), two_images(llava), torch.tensor([[7], [8]])
    with hap.patched(llava, "vhr"):
        alone = [decode(llava, inputs, prefill(llava, inputs), step) for inputs in (a, b)]
        first, second = prefill(llava, a), prefill(llava, b)
        twin = copy.deepcopy(first)
        output(llava, b)  # a third one without a cache
        for cache, inputs, expected in ((second, b, alone[1]), (first, a, alone[0]), (twin, a, alone[0])):
            assert torch.equal(decode(llava, inputs, cache, step), expected)
        cache = prefill(llava, a)
        cache.batch_repeat_interleave(3)
        beams = {"attention_mask": a["attention_mask"].repeat_interleave(3, 0)}
        close(decode(llava, beams, cache, step.repeat_interleave(3, 0)), alone[0].repeat_interleave(3, 0))
        memory = context_of(llava)
        assert current(memory) is None


def test_a_reset_cache_chooses_anew(llava):
    a, b = inputs_of(llava, seed=1), inputs_of(llava, seed=2)
    with hap.patched(llava, "vhr"):
        expected = output(llava, b)
        cache = prefill(llava, a)
        cache.reset()
        close(output(llava, b, past_key_values=cache, use_cache=True), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_branch
def test_gradient_checkpointing_recomputes_with_the_choice_of_its_own_forward(llava, branch):
    first = inputs_of(llava, seed=1)
    second = {**first, "input_ids": first["input_ids"].roll(3, 1)}
    with hap.patched(llava, "vhr", branch=branch):
        close(gradient(llava, [first, second], True), gradient(llava, [first, second], False))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_text_only_prompt_is_refused_and_two_ways_out_are_dense(llava):
    ids = torch.randint(3, 99, (2, 9))
    dense = output(llava, {"input_ids": ids})
    with hap.patched(llava, "vhr") as handle:
        with refused(PatchError, "vhr", "no image token", "handle.disabled()", "image_keys="):
            output(llava, {"input_ids": ids})
        with handle.disabled():
            assert torch.equal(output(llava, {"input_ids": ids}), dense)
        with hap.prompt(llava, image_keys=torch.zeros(2, 9, dtype=torch.bool)):
            close(output(llava, {"input_ids": ids}), dense)


def test_embeddings_alone_are_refused_with_and_without_image_keys(llava):
    embeds = llava.get_input_embeddings()(torch.randint(3, 99, (1, 12)))
    keys = torch.zeros(1, 12, dtype=torch.bool)
    keys[:, 2:7] = True
    with hap.patched(llava, "vhr"):
        with refused(ModelMismatchError, "vhr", "input_ids"):
            output(llava, {"inputs_embeds": embeds})
        with hap.prompt(llava, image_keys=keys), refused(ModelMismatchError, "vhr", "Pass input_ids"):
            output(llava, {"inputs_embeds": embeds})


def test_a_cache_read_before_vhr_came_is_refused(llava):
    inputs, step = two_images(llava), torch.tensor([[7], [8]])
    with hap.patched(llava, "vhr") as handle:
        with handle.disabled():
            cache = prefill(llava, inputs)
        with refused(CacheError, "vhr", f"{inputs['input_ids'].shape[1]} tokens", "fresh cache"):
            decode(llava, inputs, cache, step)


def test_a_prompt_that_goes_on_after_the_forward_is_refused(llava):
    inputs = inputs_of(llava)
    end = inputs["input_ids"].shape[1]
    with hap.patched(llava, "vhr"), hap.prompt(llava, length=end + 2):
        with refused(PatchError, f"at token {end + 2}", f"ends at token {end}", "in one forward"):
            output(llava, inputs)


def test_a_prompt_of_images_only_and_a_mask_of_four_axes_are_refused(llava):
    inputs = inputs_of(llava)
    image = inputs["input_ids"] == llava.config.image_token_id
    only = {
        **inputs,
        "attention_mask": torch.where(torch.tensor([[False], [True]]), image, inputs["attention_mask"]),
    }
    square = torch.ones(2, 1, *[image.shape[1]] * 2, dtype=torch.bool).tril()
    with hap.patched(llava, "vhr"):
        with refused(PatchError, "row 1", "nothing but its image"):
            output(llava, only)
        with refused(PatchError, "attention_mask [B, L]", str(list(square.shape))):
            output(llava, {**inputs, "attention_mask": square})


def test_models_that_cannot_lose_their_image_are_refused_before_anything_changes():
    for family, words in (
        ("llama", ["names no image token"]),
        ("mllama", ["cross-attention", "placeholder"]),
        ("instructblip", ["needs pixel_values, qformer_input_ids", "cannot run"]),
    ):
        model = model_of(family)
        with untouched(model), refused(ModelMismatchError, "vhr", *words):
            hap.patch(model, "vhr")


@pytest.mark.parametrize("options", [
    {"alpha": -1.0}, {"alpha": float("nan")}, {"last": -1}, {"also": (), "last": 0}, {"wrappers": (-1,)},
    {"branch": "both"}, {"ddof": 2},
], ids=str)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with refused(ConfigError, "vhr", next(reversed(options))):
        registry.build("vhr", options)


def test_a_plan_warns_where_the_published_layers_say_little(llava):
    assert any("published for models of 32 layers" in w for w in hap.plan(llava, "vhr").warnings)
    assert any(
        "nothing will be edited" in w for w in hap.plan(llava, "vhr", last=1, also=(), layers=0).warnings
    )
    assert hap.plan(llava, "vhr", last=1, also=()).warnings == []
