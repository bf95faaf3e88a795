"""Facts of the running forward: image tokens, grids, prompts; streams and recomputations do not mix them up."""

from __future__ import annotations

import copy
import gc
import math
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_attn_patch as hap
from hf_attn_patch.call.rules import Neighborhood
from hf_attn_patch.errors import CacheError, ModelMismatchError, PatchError
from hf_attn_patch.forward.needs.grid import SeenGrid, grid_of
from hf_attn_patch.forward.needs.images import image_token_ids
from hf_attn_patch.forward.running import Running, current

from .conformance.families import or_dense_too
from .small import close, differ, inputs_of, model_of, output, refused

VAR = {"dims": [0, 3], "tau": 1.2, "rho": 0.9, "min_mass": 0.01, "first_layer": 0, "move": 1.0}
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def llava():
    return model_of("llava")


def context_of(model):
    return model.__dict__["_attn_patch_state"].context


def watch(model, monkeypatch):
    """What the patches of `model` see: a list of (image keys, prompt length, grid) per attention call."""
    from hf_attn_patch.patches.grounding.var import VisualAttentionRedistribution as Var

    seen, original = [], Var.edit

    def edit(self, program, call):
        seen.append((call.context.image_keys.clone(), call.context.prompt_length, call.context.grid))
        original(self, program, call)

    monkeypatch.setattr(Var, "edit", edit)
    return seen


def two_images(model, pads=(0, 5)):
    """Rows with two images each, apart from each other, and left padding."""
    one = inputs_of(model, batch=2, length=6)
    image = model.config.image_token_id
    count = int((one["input_ids"][0] == image).sum())
    rows = []
    for row in range(2):
        text = torch.randint(3, 99, (12,), generator=torch.Generator().manual_seed(row))
        images = torch.full((count,), image)
        ids = torch.cat([text[:2], images, text[2:5], images, text[5 : 12 - pads[row]]])
        rows.append(torch.cat([torch.zeros(pads[row], dtype=torch.long), ids]))
    ids = torch.stack(rows)
    mask = torch.stack([(torch.arange(ids.shape[1]) >= pads[row]).long() for row in range(2)])
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def decode(model, inputs, cache, step):
    """Logits of one more token behind `inputs`."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
    with torch.no_grad():
        return model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def prefill(model, inputs):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


# -- image tokens -----------------------------------------------------------


def test_image_keys_follow_two_images_and_left_padding(llava, monkeypatch):
    seen = watch(llava, monkeypatch)
    inputs = two_images(llava)
    with hap.patched(llava, "var", **VAR):
        cache = prefill(llava, inputs)
        keys, length, _ = seen[0]
        assert torch.equal(keys, inputs["input_ids"] == llava.config.image_token_id)
        assert length == inputs["input_ids"].shape[1] and keys.sum() > 0
        seen.clear()
        decode(llava, inputs, cache, torch.tensor([[7], [8]]))
        later, length, _ = seen[0]
        assert torch.equal(later[:, :-1], keys) and not later[:, -1].any()
        assert length == inputs["input_ids"].shape[1]


def test_rows_with_two_images_are_the_same_in_a_batch_and_alone(llava):
    inputs = two_images(llava)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with hap.patched(llava, "var", **VAR):
        together = output(llava, inputs)
        for row, pad in enumerate((0, 5)):
            alone = {
                "input_ids": inputs["input_ids"][row : row + 1, pad:],
                "attention_mask": inputs["attention_mask"][row : row + 1, pad:],
                "position_ids": inputs["position_ids"][row : row + 1, pad:],
                "pixel_values": inputs["pixel_values"][2 * row : 2 * row + 2],
            }
            close(output(llava, alone), together[row : row + 1, pad:], f"row {row}")


def test_interleaved_streams_with_two_caches_do_not_mix(llava):
    a, b = inputs_of(llava, seed=1), two_images(llava)
    step = torch.tensor([[7], [8]])
    with hap.patched(llava, "var", **VAR):
        alone = []
        for inputs in (a, b):
            cache = prefill(llava, inputs)
            alone.append(decode(llava, inputs, cache, step))
        first, second = prefill(llava, a), prefill(llava, b)
        assert torch.equal(decode(llava, a, first, step), alone[0])
        output(llava, b)  # a third one without a cache
        assert torch.equal(decode(llava, b, second, step), alone[1])


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_cache_that_the_model_made_itself_remembers_the_images(family):
    # the usual loop: out = model(**inputs); model(next, past_key_values=out.past_key_values)
    model = model_of(family)
    inputs = inputs_of(model)
    step = torch.tensor([[7], [8]])
    every = {k: torch.cat([v, step if k == "input_ids" else torch.ones_like(step)], 1) for k, v in inputs.items()
             if k in ("input_ids", "attention_mask")}  # fmt: skip
    with hap.patched(model, "var", **VAR), torch.no_grad():
        with hap.prompt(model, length=inputs["input_ids"].shape[1]):
            whole = model(**{**inputs, **every}, use_cache=False).logits
        cache = model(**inputs).past_key_values
        close(decode(model, inputs, cache, step), whole[:, -1:])


def test_a_copied_cache_remembers_its_images(llava):
    inputs, step = two_images(llava), torch.tensor([[7], [8]])
    with hap.patched(llava, "var", **VAR):
        cache = prefill(llava, inputs)
        twin = copy.deepcopy(cache)
        assert torch.equal(decode(llava, inputs, twin, step), decode(llava, inputs, cache, step))


def test_a_cache_read_before_var_came_is_refused_instead_of_forgetting_the_images(llava):
    inputs = two_images(llava)
    cache = prefill(llava, inputs)
    with hap.patched(llava, "var", **VAR) as handle:
        with refused(
            CacheError, f"{inputs['input_ids'].shape[1]} tokens", "image tokens", "hap.prompt", "fresh cache"
        ):
            decode(llava, inputs, cache, torch.tensor([[7], [8]]))
        with handle.disabled():
            cache = prefill(llava, inputs)
        with refused(CacheError, "var", "sink tokens", "fresh cache"):
            decode(llava, inputs, cache, torch.tensor([[7], [8]]))


def test_a_cache_that_was_reset_starts_anew(llava):
    a, b = inputs_of(llava, seed=1), inputs_of(llava, seed=2)
    with hap.patched(llava, "var", **VAR):
        expected = output(llava, b)
        cache = prefill(llava, a)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("a dynamic cache of this transformers keeps its length when it is reset")
        with torch.no_grad():
            again = llava(**b, past_key_values=cache, use_cache=True).logits
    close(again, expected)


def test_without_input_ids_the_images_must_be_named(llava):
    ids = torch.randint(3, 99, (1, 12))
    embeds = llava.get_input_embeddings()(ids)
    keys = torch.zeros(1, 12, dtype=torch.bool)
    keys[:, 2:7] = True
    with hap.patched(llava, "var", **VAR):
        with refused(ModelMismatchError, "var", "input_ids", "hap.prompt(model, image_keys="):
            output(llava, {"inputs_embeds": embeds})
        with hap.prompt(llava, image_keys=keys):
            edited = output(llava, {"inputs_embeds": embeds})
            # generated tokens are behind what was said, and are no image tokens
            cached = llava.generate(inputs_embeds=embeds, max_new_tokens=4, **GREEDY)
            assert cached.shape[1] == 4
        with refused(ModelMismatchError, "image_keys"):
            output(llava, {"inputs_embeds": embeds})
    assert differ(edited, output(llava, {"inputs_embeds": embeds}))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_var_generates_the_tokens_it_generates_without_a_cache(llava, more):
    inputs = two_images(llava)
    length = inputs["input_ids"].shape[1]
    plain = {k: v for k, v in more.items() if k == "num_beams"}

    def same_tokens():
        cached = llava.generate(**inputs, max_new_tokens=6, **GREEDY, **more)
        expected = llava.generate(**inputs, max_new_tokens=6, use_cache=False, **GREEDY, **plain)
        assert torch.equal(cached, expected)

    with or_dense_too(same_tokens):
        with hap.patched(llava, "var", **VAR), hap.prompt(llava, length=length):
            same_tokens()


def test_image_token_ids_are_read_from_any_config():
    assert image_token_ids(model_of("llava").config) == [100]
    assert len(image_token_ids(model_of("qwen2_5_vl").config)) == 2
    assert image_token_ids(model_of("llama").config) == []


# -- prompts -----------------------------------------------------------


def plan_of(layers=2, heads=4):
    return {"alphas": [[2.0] * heads] * layers, "betas": [[0.5] * heads] * layers}


def test_the_elastic_length_is_that_of_the_prompt(monkeypatch):
    from hf_attn_patch.patches.sparse.moa import MoA

    model, found = model_of("llama"), []
    original = MoA.elastic_length
    monkeypatch.setattr(
        MoA, "elastic_length", lambda self, *a: (found.append(original(self, *a)), found[-1])[1]
    )
    ids = torch.randint(3, 99, (1, 20))
    cache = DynamicCache(config=model.config)
    with (
        hap.patched(model, "moa", plan=plan_of(), sinks=1, block=1, smallest=2, max_new_tokens=5),
        torch.no_grad(),
    ):
        model(ids[:, :12], past_key_values=cache)
        model(ids[:, 12:13], past_key_values=cache)
        model(ids[:, 13:], past_key_values=cache)
        assert set(found) == {17}
        found.clear()
        model(ids, use_cache=False)
        assert set(found) == {25}
        found.clear()
        with hap.prompt(model, length=12):
            model(ids, use_cache=False)
            with hap.prompt(model, length=9):
                model(ids, use_cache=False)
            model(ids, use_cache=False)
        assert set(found[:2]) == {17} and set(found) == {17, 14}
        found.clear()
        model(ids, use_cache=False)
        assert set(found) == {25}


def test_what_was_said_is_forgotten_even_after_an_error():
    model = model_of("llama")
    with hap.patched(model, "moa", plan=plan_of()):
        with pytest.raises(ZeroDivisionError), hap.prompt(model, length=3):
            1 / 0  # noqa: B018
        output(model, inputs_of(model))
        assert context_of(model).said == {}


# -- grids -----------------------------------------------------------


def masked_by_hand(model, inputs, rule, prefix, monkeypatch, **more):
    """The same model with a dense mask in the place of the patch, on every vision site."""
    import torch.nn.functional as F

    size = prefix + math.prod(rule.grid)
    index = torch.arange(size)
    visible = rule.visible(torch.zeros(1, 1, dtype=torch.long), index[:, None], index[None])
    original = F.scaled_dot_product_attention

    def with_mask(query, key, value, attn_mask=None, **kwargs):
        assert attn_mask is None and query.shape[2] == size
        return original(query, key, value, attn_mask=visible.expand(1, 1, size, size), **kwargs)

    with monkeypatch.context() as patching:
        patching.setattr(F, "scaled_dot_product_attention", with_mask)
        return output(model, inputs, **more)


@pytest.mark.parametrize("family, prefix", [("vit", 1), ("dinov2", 1)])
@pytest.mark.parametrize("size, grid", [((32, 32), (4, 4)), ((48, 32), (6, 4)), ((24, 64), (3, 8))], ids=str)
def test_grid_of_pixels_that_are_not_square(family, prefix, size, grid, monkeypatch):
    model = model_of(family)
    side = model.config.patch_size
    size = (grid[0] * side, grid[1] * side)
    inputs = {"pixel_values": torch.randn(2, 3, *size, dtype=torch.float64)}
    more = {"interpolate_pos_encoding": True} if family == "vit" else {}
    rule = Neighborhood(grid, (3, 2), (1, 1), (1, 1), (False, False), prefix)
    expected = masked_by_hand(model, inputs, rule, prefix, monkeypatch, **more)
    dense = output(model, inputs, **more)
    with hap.patched(model, "neighborhood", window=[3, 2]):
        close(output(model, inputs, **more), expected)
    assert differ(expected, dense)


def test_grid_changes_from_image_to_image():
    model = model_of("dinov2")
    side = model.config.patch_size
    images = [torch.randn(1, 3, h * side, w * side, dtype=torch.float64) for h, w in ((4, 4), (3, 6), (6, 3))]
    with hap.patched(model, "neighborhood", window=3):
        first = [output(model, {"pixel_values": i}) for i in images]
        again = [output(model, {"pixel_values": i}) for i in reversed(images)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again)))


def test_videomae_has_a_grid_of_three_axes(monkeypatch):
    model = model_of("videomae")
    inputs = inputs_of(model)
    config = model.config
    frames, side = inputs["pixel_values"].shape[1], inputs["pixel_values"].shape[-1]
    grid = (frames // config.tubelet_size, side // config.patch_size, side // config.patch_size)
    window = tuple(min(2, g) for g in grid)
    rule = Neighborhood(grid, window, (1, 1, 1), (1, 1, 1), (False, False, False), 0)
    expected = masked_by_hand(model, inputs, rule, 0, monkeypatch)
    with hap.patched(model, "neighborhood", window=list(window)) as handle:
        close(output(model, inputs), expected)
        assert context_of(model).running().grid is None  # of this forward only
        assert handle.report().density < 1
    with refused(ModelMismatchError, "2 axes", "has 3"), hap.patched(model, "neighborhood", window=[2, 2]):
        output(model, inputs)


def test_a_given_grid_that_is_not_the_image_is_refused():
    model = model_of("vit")
    with hap.patched(model, "neighborhood", window=2, grid=[5, 5]):
        with refused(ModelMismatchError, "layers.0.attention", "17 x 17 tokens", "(5, 5)", "25 tokens"):
            output(model, inputs_of(model))


@pytest.mark.parametrize(
    "shape, fields, expected",
    [
        ((1, 3, 32, 48), {"patch_size": 16}, (2, 3)),
        ((1, 3, 32, 48), {"patch_size": (8, 16)}, (4, 3)),
        ((1, 8, 3, 32, 32), {"patch_size": 16, "tubelet_size": 2}, (4, 2, 2)),
        ((1, 8, 3, 32, 32), {"tubelet_size": [2, 16, 8]}, (4, 2, 4)),
        ((1, 3, 32, 48), {}, None),
        ((1, 5, 3, 32, 48), {"patch_size": 16}, None),
        ((7, 1176), {"patch_size": 14}, None),
    ],
)
def test_grid_of_pixel_values(shape, fields, expected):
    from types import SimpleNamespace

    assert grid_of(torch.zeros(shape), SimpleNamespace(**fields)) == expected


# -- recomputation during backward -----------------------------------------------------------


def gradient(model, batches, checkpointing):
    """Gradient of the summed outputs of several forwards, taken in one backward."""
    model.requires_grad_(True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    model.zero_grad()
    sum(model(**b)[0].square().sum() for b in batches).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def recomputed():
    """Around several forwards before one backward: refused by transformers whose layers checkpoint themselves around
    their hooks, which makes it unknowable which forward a layer belongs to."""
    inside = "__call__" in vars(GradientCheckpointingLayer)
    return refused(PatchError, "gradient checkpointing") if inside else nullcontext()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_recomputes_with_the_grid_of_its_own_forward():
    model = model_of("dinov2", drop_path_rate=0.0)
    side = model.config.patch_size
    # the same number of tokens, so that a mix-up would go unnoticed by shapes
    batches = [
        {"pixel_values": torch.randn(1, 3, h * side, w * side, dtype=torch.float64)}
        for h, w in ((3, 6), (6, 3))
    ]
    with hap.patched(model, "neighborhood", window=2), recomputed():
        close(gradient(model, batches, True), gradient(model, batches, False))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["siglip", "videomae"])
def test_layers_that_hand_nothing_on_are_recomputed_rightly_or_refused(family):
    model = model_of(family)
    if family == "videomae":
        one, other = inputs_of(model, batch=1), inputs_of(model, batch=1, seed=1)
    else:
        model = model.vision_model
        side = model.config.patch_size
        one, other = (
            {
                "pixel_values": torch.randn(1, 3, h * side, w * side, dtype=torch.float64),
                "interpolate_pos_encoding": True,
            }
            for h, w in ((2, 8), (8, 2))
        )
    with hap.patched(model, "neighborhood", window=2):
        for batches in ([one], [other], [one, one]):
            close(gradient(model, batches, True), gradient(model, batches, False))
        if family == "siglip":  # its attention takes keyword arguments, so the facts go along
            with recomputed():
                close(gradient(model, [one, other], True), gradient(model, [one, other], False))


def test_a_recomputed_layer_that_could_belong_to_two_forwards_is_refused():
    model = model_of("vit")
    with hap.patched(model, "neighborhood", window=2):
        context = context_of(model)
        first, second = Running(context), Running(context)
        first.pixels, second.pixels = SeenGrid((2, 8)), SeenGrid((8, 2))
        context.notes.add("layer", first, None)
        assert context.notes.of("layer", context) is first
        for running in (first, second):
            context.notes.add("layer", running, None)
        with refused(PatchError, "2 different forwards", "layer", "backward after every forward"):
            context.notes.of("layer", context)


def test_a_forward_that_never_sees_its_backward_is_forgotten_with_its_graph():
    model = model_of("vit")
    with hap.patched(model, "neighborhood", window=2):
        context, hidden = context_of(model), torch.ones(3, requires_grad=True) * 2
        context.notes.add("layer", Running(context), hidden)
        assert context.notes.of("layer", context) is not None
        del hidden
        gc.collect()
        assert context.notes.of("layer", context) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_recomputes_with_the_images_of_its_own_forward(llava):
    first = inputs_of(llava, seed=1)
    second = {**first, "input_ids": first["input_ids"].roll(3, 1)}
    with hap.patched(llava, "var", **VAR), hap.patched(llava, "head_gate", gate=0.5), recomputed():
        close(gradient(llava, [first, second], True), gradient(llava, [first, second], False))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_recomputes_with_the_prompt_of_its_own_forward():
    model = model_of("llama")
    inputs = inputs_of(model)
    model.requires_grad_(True).train()
    found = []
    spans = {"plan": plan_of(), "sinks": 1, "block": 1, "smallest": 2, "max_new_tokens": 0}
    with recomputed(), hap.patched(model, "moa", **spans):
        for checkpointing in (True, False):
            (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
            model.zero_grad()
            losses = []
            for length in (6, 14):
                with hap.prompt(model, length=length):
                    losses.append(model(**inputs, use_cache=False)[0].square().sum())
            sum(losses).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        close(*found)


# -- hooks -----------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_exist_only_while_something_needs_them(llava):
    assert hooks(llava) == 0
    with hap.patched(llava, "streaming", cache="keep"):
        on_models = hooks(
            llava
        )  # one pair for every transformers model around a patched site, none on a layer
        assert on_models == 2 * sum(
            isinstance(m, PreTrainedModel) for m in (llava, llava.model, llava.model.language_model)
        )
        with hap.patched(llava, "var", **VAR):
            with_var = hooks(llava)
            assert with_var > on_models
            with hap.patched(llava, "streaming", window=9):
                assert hooks(llava) == with_var  # one set serves all
        assert hooks(llava) == on_models
    assert hooks(llava) == 0


def test_a_context_keeps_no_tensors_after_the_forward(llava):
    with hap.patched(llava, "var", **VAR):
        output(llava, inputs_of(llava))
        context = context_of(llava)
        held = [v for v in context.__dict__.values() if isinstance(v, torch.Tensor)]
        assert not held and current(context) is None and context._inputs == {} == context.inside


def test_layer_input_of_a_layer_that_did_not_run_is_a_clear_error(llava):
    with hap.patched(llava, "var", **VAR):
        with refused(PatchError, "layers.0.self_attn", "hidden states", "outside a forward"):
            context_of(llava).running().layer_input("model.language_model.layers.0.self_attn")
