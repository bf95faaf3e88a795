"""Two-stream decoding: the published rules, and a second stream that keeps step with ``generate``."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import decoding
from hf_attn_patch.decoding import icd, matching, rules, sid, vcd
from hf_attn_patch.errors import ConfigError, ModelMismatchError, PatchError, UnknownPatchError

from .small import close, inputs_of, model_of, output, refused, untouched
from .test_context import GREEDY, two_images
from .test_golden import read

NEW = 6
FAMILIES = ("llava", "qwen2_vl")
# far from neutral, so that every method changes the answer of a random model
OPTIONS = {
    "vcd": {"alpha": 2.0, "beta": 0.01},
    "icd": {"alpha": 2.0, "beta": 0.01, "tokens": [5, 6, 7]},
    "m3id": {"lamda": 0.7, "beta": 0.0},
    "pai": {"gamma": 3.0, "beta": 0.01},
    "sid": {"alpha": 2.0, "beta": 0.0, "layer": 1, "rank": 2},
}
every_method = pytest.mark.parametrize("name", list(OPTIONS))
every_family = pytest.mark.parametrize("family", FAMILIES)


def generate(model, inputs, *streams, **options):
    made = model.generate(
        **inputs, max_new_tokens=NEW, logits_processor=list(streams), **{**GREEDY, **options}
    )
    return made[:, inputs["input_ids"].shape[1] :]


def padded(model, seed=0):
    return inputs_of(model, batch=2, length=9, left_pad=[0, 3], seed=seed)


def alone(inputs, row):
    """One row of a batch, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    made = {k: v[row : row + 1, keep] for k, v in inputs.items() if v.shape == inputs["input_ids"].shape}
    if "image_grid_thw" in inputs:
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        made["pixel_values"] = inputs["pixel_values"].split(sizes)[row]
        made["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
    else:
        made["pixel_values"] = inputs["pixel_values"][row : row + 1]
    return made


# -- the rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "other", "name"),
    [
        ("vcd__logits", "cd", "vcd"),
        ("icd__logits", "cd", "icd"),
        ("m3id__logits", "m3id", "m3id"),
        ("sid__logits", "cd", "sid"),
        ("agla__logits", "cd", "agla"),
        ("pai__logits", "uncond", "pai"),
        ("pai__logits_gamma1", "uncond", "pai"),
    ],
)
def test_logits_are_those_of_the_original_code(case, other, name):
    tensors, config = read(case)
    known = {k: float(v) for k, v in config.items() if k in ("alpha", "beta", "lamda", "gamma")}
    method = decoding.build(name, known)
    for t in range(config["T"]):
        main, second = tensors["in.logits"][t], tensors[f"in.logits_{other}"][t]
        made = method.combine(main, [second], t + 1)
        assert torch.equal(made > float("-inf"), tensors["out.keep"][t])
        torch.testing.assert_close(made, tensors["out.logits"][t], rtol=0, atol=1e-6)
        if name == "sid":
            assert torch.equal(made.argmax(-1), tensors["out.greedy_fixed"][t])


def test_icd_adds_the_difference_to_a_noisy_picture_as_the_original_code_does():
    tensors, config = read("icd__logits_three_streams")
    method = decoding.build("icd", {"alpha": config["alpha"], "beta": config["beta"], "image_stream": True})
    for t in range(config["T"]):
        others = [tensors["in.logits_cd"][t], tensors["in.logits_image_cd"][t]]
        made = method.combine(tensors["in.logits"][t], others, t + 1)
        torch.testing.assert_close(made, tensors["out.logits"][t], rtol=0, atol=1e-6)


def test_m3ids_weight_can_be_given_an_upper_end():
    main, blind = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = decoding.build("m3id", {"max_weight": 3.0, "beta": 0.0})
    l, u = main.log_softmax(-1), blind.log_softmax(-1)
    close(method.combine(main, [blind], 500), l + 3 * (l - u))
    close(method.combine(main, [blind], 5), rules.image_prior(main, blind, 0.02, 5))


def test_the_noise_schedule_is_the_original_one():
    tensors, _ = read("vcd__schedule")
    kept, lost = vcd.schedule()
    torch.testing.assert_close(kept, tensors["out.sqrt_alpha_bar"], rtol=0, atol=2e-5)
    torch.testing.assert_close(lost, tensors["out.sqrt_one_minus_alpha_bar"], rtol=0, atol=2e-5)
    tensors, _ = read("vcd__noise")
    for step, noisy in zip(tensors["in.steps"].tolist(), tensors["out.noisy"]):
        made = vcd.diffused(tensors["in.pixels"], tensors["in.noise"], step)
        torch.testing.assert_close(made, noisy, rtol=0, atol=5e-5)


def test_sids_visible_tokens_are_those_of_the_original_code():
    tensors, config = read("sid__visible_tokens")
    seen = sid.visible_tokens(tensors["in.attn_last_row"], tensors["in.image_mask"], config["rank"])
    assert torch.equal(seen & ~tensors["in.pad_mask"], tensors["out.visible"])


# -- beside generate ------------------------------------------------------------------------------------------------


def by_hand(model, inputs, method):
    """Greedy answer to one prompt: both streams read whole at every token, no cache, no generate."""
    base = hap.two_stream(model, method, inputs=inputs)
    streams = [dict(inputs), *(dict(s.inputs) for s in base.streams)]
    answer = []
    with torch.no_grad():
        for step in range(NEW):
            main, *others = (
                model(**s, use_cache=False, **longer(s, answer)).logits[:, -1].float()
                for s in map(ids_apart, streams)
            )
            answer.append(int(method.combine(main, others, step + 1).argmax(-1)))
    return answer


def ids_apart(inputs):
    return Prompt({k: v for k, v in inputs.items() if k not in PER_TOKEN}, inputs)


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


class Prompt(dict):
    """Inputs without those that grow; `whole` has them."""

    def __init__(self, rest, whole):
        super().__init__(rest)
        self.whole = whole


def longer(prompt, answer):
    fill = {"input_ids": answer, "attention_mask": [1] * len(answer), "mm_token_type_ids": [0] * len(answer)}
    return {k: torch.cat([v, v.new_tensor([fill[k]])], 1) for k, v in prompt.whole.items() if k in PER_TOKEN}


@every_family
@pytest.mark.parametrize("name", ["vcd", "icd", "m3id", "pai"])
def test_a_padded_batch_gives_what_each_row_gives_read_anew_at_every_token(family, name):
    """The second stream's cache, positions and padding against no cache at all."""
    model = model_of(family)
    inputs = padded(model)
    method = decoding.build(name, OPTIONS[name])
    together = generate(model, inputs, hap.two_stream(model, method, inputs=inputs))
    for row in range(2):
        assert together[row].tolist() == by_hand(model, alone(inputs, row), method), f"row {row}"
    assert not torch.equal(together, generate(model, inputs))


@every_family
def test_sid_gives_in_a_padded_batch_what_it_gives_row_by_row(family):
    model = model_of(family)
    inputs = padded(model)
    together = generate(model, inputs, hap.two_stream(model, "sid", inputs=inputs, **OPTIONS["sid"]))
    for row in range(2):
        one = alone(inputs, row)
        made = generate(model, one, hap.two_stream(model, "sid", inputs=one, **OPTIONS["sid"]))
        assert torch.equal(made[0], together[row]), f"row {row}"
    assert not torch.equal(together, generate(model, inputs))


@every_method
def test_the_same_object_serves_two_generate_calls_in_a_row(name):
    """The published AGLA code reads a stale cache from the second token on."""
    model = model_of("llava")
    inputs, other = padded(model), padded(model, seed=1)
    stream = hap.two_stream(model, name, inputs=inputs, **OPTIONS[name])
    first = generate(model, inputs, stream)
    assert torch.equal(generate(model, inputs, stream), first)
    assert not torch.equal(generate(model, other, stream.prompt(other)), first)
    assert torch.equal(generate(model, inputs, stream.prompt(inputs)), first)


def naive_beams(model, inputs, method, beams):
    """Beam search over whole rereads of one prompt; no cache and no reordering, sums of normalised numbers."""
    base = hap.two_stream(model, method, inputs=inputs)
    streams = [dict(inputs), *(dict(s.inputs) for s in base.streams)]
    kept = [([], 0.0)]
    with torch.no_grad():
        for step in range(NEW):
            found = []
            for answer, score in kept:
                main, *others = (
                    model(**s, use_cache=False, **longer(s, answer)).logits[:, -1].float()
                    for s in map(ids_apart, streams)
                )
                numbers = method.combine(main.log_softmax(-1), others, step + 1).log_softmax(-1)[0]
                best = numbers.topk(2 * beams)
                found += [([*answer, int(i)], score + float(v)) for v, i in zip(*best)]
            kept = sorted(found, key=lambda pair: -pair[1])[:beams]
    return kept[0][0]


@every_family
@pytest.mark.parametrize("name", ["vcd", "m3id"])
def test_beams_take_their_second_stream_along(family, name):
    model = model_of(family)
    inputs = padded(model)
    method = decoding.build(name, {"vcd": {"beta": 0.0}, "m3id": {"beta": 0.0, "lamda": 0.3}}[name])
    stream = hap.two_stream(model, method, inputs=inputs)
    moved = []
    plain = stream._order
    stream._order = lambda *args: moved.append(plain(*args)) or moved[-1]
    made = generate(model, inputs, stream, num_beams=3, length_penalty=0.0)
    assert any(order is not None for order in moved), "no beam ever changed its place: the test shows nothing"
    for row in range(2):
        assert made[row].tolist() == naive_beams(model, alone(inputs, row), method, 3), f"row {row}"


def test_sampling_several_answers_and_generate_without_a_cache_work():
    model = model_of("llava")
    inputs = padded(model)
    stream = hap.two_stream(model, "vcd", inputs=inputs, **OPTIONS["vcd"])
    torch.manual_seed(0)
    made = generate(model, inputs, stream, do_sample=True, num_return_sequences=3)
    assert made.shape[0] == 6
    greedy = generate(model, inputs, stream)
    assert torch.equal(generate(model, inputs, stream, use_cache=False), greedy)


@every_family
@every_method
def test_the_neutral_value_gives_what_generate_gives(family, name):
    model = model_of(family)
    inputs = padded(model)
    needed = {k: v for k, v in OPTIONS[name].items() if k in ("tokens", "layer")}
    neutral = {**needed, **decoding.get(name).neutral}
    stream = hap.two_stream(model, name, inputs=inputs, **neutral)
    assert torch.equal(generate(model, inputs, stream), generate(model, inputs))
    assert torch.equal(generate(model, inputs, stream, num_beams=3), generate(model, inputs, num_beams=3))


def test_pai_with_gamma_1_runs_no_second_stream():
    model = model_of("llava")
    stream = hap.two_stream(model, "pai", inputs=padded(model), gamma=1.0)
    assert stream.streams == [] and "none needed" in repr(stream)


@every_family
@every_method
def test_the_model_is_left_as_it_was(family, name):
    model = model_of(family)
    inputs = padded(model)
    deltas = {n: copy.copy(m.rope_deltas) for n, m in model.named_modules() if hasattr(m, "rope_deltas")}
    assert deltas or family == "llava"
    plain = generate(model, inputs)
    deltas = {n: m.rope_deltas.clone() for n, m in model.named_modules() if hasattr(m, "rope_deltas")}
    with untouched(model, inputs):
        generate(model, inputs, hap.two_stream(model, name, inputs=inputs, **OPTIONS[name]))
        for n, m in model.named_modules():
            if n in deltas:
                assert torch.equal(m.rope_deltas, deltas[n]), (
                    "the second prompt's positions stayed on the model"
                )
    assert torch.equal(generate(model, inputs), plain)


def test_a_model_that_reads_its_image_by_cross_attention_has_a_second_stream_too():
    """Mllama: one image token, pixels and a cross-attention mask that grows with the answer."""
    model = model_of("mllama")
    inputs = inputs_of(model, batch=2, length=9)
    inputs["input_ids"][:, 1] = model.config.image_token_index
    plain = generate(model, inputs)
    for name in ("vcd", "icd", "m3id"):
        method = decoding.build(name, {**OPTIONS[name], "beta": 0.0})
        stream = hap.two_stream(model, method, inputs=inputs)
        made = generate(model, inputs, stream)
        assert torch.equal(made, generate(model, inputs, stream)) and not torch.equal(made, plain), name
        same = hap.two_stream(model, method, inputs=inputs, second=inputs)
        assert torch.equal(generate(model, inputs, same), plain), name


# -- patches and the second stream ----------------------------------------------------------------------------------


def test_pais_image_free_pass_runs_without_the_models_patches_and_m3ids_can_run_with_them():
    model = model_of("llava")
    inputs = padded(model)
    with hap.patched(model, "streaming", sinks=1, window=2):
        edited = generate(
            model, inputs, hap.two_stream(model, "pai", inputs=inputs, **OPTIONS["pai"], patched=True)
        )
        clean = hap.two_stream(model, "pai", inputs=inputs, **OPTIONS["pai"])
        made = generate(model, inputs, clean)
        with hap.active(model)[0].disabled():
            blind = clean.streams[0].begin(1)
        torch.testing.assert_close(clean.streams[0].begin(1), blind, rtol=0, atol=0)
        assert hap.active(model)[0].is_active
    assert not torch.equal(made, edited)
    plain = hap.two_stream(model, "pai", inputs=inputs, **OPTIONS["pai"]).streams[0].begin(1)
    torch.testing.assert_close(blind, plain, rtol=0, atol=0)


def test_pai_as_published_is_the_patch_and_the_guidance_together():
    model = model_of("llava")
    inputs = padded(model)
    with hap.patched(model, "pai", alpha=2.0, first_layer=0):
        patch_alone = generate(model, inputs)
        both = generate(model, inputs, hap.two_stream(model, "pai", inputs=inputs, **OPTIONS["pai"]))
        with refused(PatchError, "no image token"):  # nothing to pay attention to without an image
            generate(model, inputs, hap.two_stream(model, "pai", inputs=inputs, gamma=3.0, patched=True))
    guidance_alone = generate(model, inputs, hap.two_stream(model, "pai", inputs=inputs, **OPTIONS["pai"]))
    assert not torch.equal(both, patch_alone) and not torch.equal(both, guidance_alone)


def test_sid_hides_the_tokens_that_a_dense_forward_attends_to_most():
    model = model_of("llava")
    inputs = alone(padded(model), 1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True).attentions[0][:, :, -1].mean(1)[0]
    image = inputs["input_ids"][0] == model.config.image_token_id
    hidden = (~image).nonzero()[:, 0].tolist() + weights.masked_fill(~image, 9.0).argsort()[:2].tolist()
    shown = []
    method = decoding.build("sid", OPTIONS["sid"])
    stream = hap.two_stream(model, method, inputs=inputs).streams[0]
    from hf_attn_patch.inspection.calls import watched

    def look(program, call):
        rows = program.mask.query_columns[-1:]
        shown.append(program.mask.block(rows, program.mask.key_columns)[0, 0, 0].nonzero()[:, 0].tolist())

    with method.around(model, stream), watched(model, look), torch.no_grad():
        model(**inputs)
    assert shown[0] == list(range(image.numel()))  # the layer that chooses sees everything
    assert shown[1] == sorted(hidden)


def test_sid_that_hides_nothing_is_the_first_stream():
    model = model_of("llava")
    inputs = padded(model)
    stream = hap.two_stream(model, "sid", inputs=inputs, alpha=3.0, beta=0.0, layer=1, rank=1000)
    assert torch.equal(generate(model, inputs, stream), generate(model, inputs))


# -- the second prompt ----------------------------------------------------------------------------------------------


def test_the_image_free_prompt_holds_the_text_and_nothing_else():
    model = model_of("qwen2_vl")
    inputs = padded(model)
    second = hap.two_stream(model, "m3id", inputs=inputs).streams[0].inputs
    image = model.config.image_token_id
    for row in range(2):
        text = [
            t
            for t, real in zip(inputs["input_ids"][row].tolist(), inputs["attention_mask"][row])
            if real and t != image
        ]
        seen = second["input_ids"][row][second["attention_mask"][row].bool()].tolist()
        assert seen == text
        assert second["attention_mask"][row].tolist() == sorted(
            second["attention_mask"][row].tolist()
        )  # left padding
    assert not any("pixel" in k or "grid" in k for k in second)


def test_icds_sentence_stands_behind_the_last_image_of_every_row():
    model = model_of("llava")
    inputs = two_images(model)
    second = hap.two_stream(model, "icd", inputs=inputs, tokens=[5, 6, 7]).streams[0].inputs
    image = model.config.image_token_id
    for row in range(2):
        ids = second["input_ids"][row].tolist()
        last = max(i for i, t in enumerate(ids) if t == image)
        assert ids[last + 1 : last + 4] == [5, 6, 7]
        assert [*ids[: last + 1], *ids[last + 4 :]] == inputs["input_ids"][row].tolist()
    assert second["attention_mask"].sum(1).tolist() == (inputs["attention_mask"].sum(1) + 3).tolist()


@every_family
def test_noise_on_an_image_does_not_depend_on_the_batch(family):
    model = model_of(family)
    inputs = padded(model)
    together = vcd.noisy(inputs, 500, 0)["pixel_values"]
    apart = torch.cat([vcd.noisy(alone(inputs, row), 500, 0)["pixel_values"] for row in range(2)])
    assert torch.equal(together, apart)
    other = vcd.noisy(inputs, 500, 1)["pixel_values"]
    assert not torch.equal(together, other)
    noise = (together - inputs["pixel_values"] * float(vcd.schedule()[0][500])) / float(
        vcd.schedule()[1][500]
    )
    image = noise.split(len(noise) // 2)[0].flatten(1)
    assert len(image.unique(dim=0)) == len(image), "patches of one image got the same noise"
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


def test_a_second_prompt_may_be_given():
    model = model_of("llava")
    inputs = padded(model)
    made = hap.two_stream(model, "vcd", inputs=inputs, **OPTIONS["vcd"])
    again = hap.two_stream(model, "vcd", inputs=inputs, second=made.streams[0].inputs, **OPTIONS["vcd"])
    assert torch.equal(generate(model, inputs, again), generate(model, inputs, made))
    same = hap.two_stream(model, "vcd", inputs=inputs, second=inputs, **OPTIONS["vcd"])
    assert torch.equal(generate(model, inputs, same), generate(model, inputs))


# -- agla ---------------------------------------------------------------------------------------------------------


def test_gradcam_is_that_of_the_original_code():
    tensors, _ = read("agla__gradcam")
    cam = matching.gradcam(tensors["in.cross_attn"], tensors["in.cross_attn_grad"], tensors["in.text_mask"])
    torch.testing.assert_close(cam, tensors["out.cam"], rtol=0, atol=1e-9)


def test_kept_pixels_are_those_of_the_original_code():
    tensors, config = read("agla__mask_small")
    side = config["resolution"]
    for i, score in enumerate(tensors["in.itc_score"].tolist()):
        relevant = matching.relevance(tensors["in.cam"][i].numpy(), side)
        np.testing.assert_allclose(relevant, tensors["out.map"][i].numpy(), rtol=0, atol=1e-5)
        keep = matching.kept_pixels(relevant, matching.kept_fraction(score))
        assert np.array_equal(keep, tensors["out.mask"][i].numpy())
        assert int(keep.sum()) == int(tensors["out.kept"][i])
    tensors, config = read("agla__mask_384")
    relevant = matching.relevance(tensors["in.cam"][0].numpy())
    keep = matching.kept_pixels(relevant, matching.kept_fraction(float(tensors["in.itc_score"][0])))
    packed = np.unpackbits(tensors["out.mask_packed"][0].numpy())[: keep.size].reshape(keep.shape)
    assert np.array_equal(keep, packed.astype(bool))


def pictures(count, side=48):
    random = np.random.default_rng(0)
    return [random.integers(1, 255, (side, side, 3)).astype(np.uint8) for _ in range(count)]


class Pixels:
    """An image processor: nearest pixels of the size the tiny model wants."""

    def __init__(self, side=32):
        self.side = side

    def __call__(self, images, text=None, return_tensors="pt"):
        images = [images] if isinstance(images, np.ndarray) else images
        at = np.arange(self.side) * images[0].shape[0] // self.side
        values = torch.tensor(np.stack([i[at][:, at] for i in images])).permute(0, 3, 1, 2).float() / 255
        made = {"pixel_values": values}
        if text is not None:
            ids = torch.tensor([[3, *(ord(c) % 60 + 4 for c in text)][:8]])
            made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return made


def with_pictures(model, images):
    return {**padded(model), "pixel_values": Pixels()(images)["pixel_values"].double()}


def test_agla_without_a_matcher_says_that_the_models_own_attention_chooses():
    model = model_of("llava")
    images = pictures(2)
    inputs = with_pictures(model, images)
    with pytest.warns(UserWarning, match="not the published method"):
        stream = hap.two_stream(model, "agla", inputs=inputs, images=images, processor=Pixels(), keep=0.5)
    masked = stream.streams[0].inputs["pixel_values"]
    kept = (masked > 0).all(1)  # no pixel of the pictures is black
    assert torch.equal(masked[:, 0][kept], inputs["pixel_values"][:, 0][kept])
    assert 0.4 < float(kept.double().mean()) < 0.6
    made = generate(model, inputs, stream)
    assert made.shape == (2, NEW)


def test_agla_keeps_the_pixels_that_the_models_last_row_attends_to():
    model = model_of("llava")
    inputs = padded(model)
    from hf_attn_patch.decoding.agla import own_attention

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for row, cam in enumerate(own_attention(model, inputs)):
        one = alone(inputs, row)
        with torch.no_grad():
            seen = eager(**one, output_attentions=True).attentions
        mean = torch.stack([layer[0, :, -1].mean(0) for layer in seen]).mean(0)
        image = one["input_ids"][0] == model.config.image_token_id
        error = (torch.tensor(cam).flatten() - mean[image]).abs().max()
        assert float(error) <= torch.finfo(torch.float32).eps  # eager attention takes its softmax in float32


def tiny_matcher():
    from transformers import BlipConfig, BlipForImageTextRetrieval

    side = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    config = BlipConfig(
        text_config={
            **side,
            "vocab_size": 64,
            "max_position_embeddings": 16,
            "encoder_hidden_size": 16,
            "projection_dim": 8,
        },
        vision_config={**side, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        image_text_hidden_size=8,
    )
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.3)
    return model


def test_agla_with_a_matcher_blacks_out_what_the_question_is_not_about():
    model, matcher = model_of("llava"), tiny_matcher()
    images = pictures(2)
    inputs = with_pictures(model, images)
    given = dict(images=images, processor=Pixels(), matcher=(matcher, Pixels()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = hap.two_stream(model, "agla", inputs=inputs, texts=["a cat?", "a dog?"], block=0, **given)
    cam, score = matching.match(matcher, Pixels(), images[0], "a cat?", 0)
    assert cam.shape == (4, 4) and cam.min() >= 0 and cam.max() > 0 and -1 <= score <= 1
    keep = matching.kept_pixels(matching.relevance(cam), matching.kept_fraction(score))
    expected = Pixels()([matching.black_out(images[0], keep)])["pixel_values"].double()
    close(first.streams[0].inputs["pixel_values"][:1], expected)
    assert all(p.grad is None for p in matcher.parameters())
    with refused(ConfigError, "1 texts", "2 pictures"):
        hap.two_stream(model, "agla", inputs=inputs, texts=["one"], **given)
    with refused(ConfigError, "layer[9]", "block="):
        hap.two_stream(model, "agla", inputs=inputs, texts=["a", "b"], block=9, **given)


def test_the_matchers_map_is_the_derivative_of_its_match_logit():
    """Against finite differences: each probability of the cross-attention is moved by itself."""
    matcher, image = tiny_matcher().double(), pictures(1)[0]
    site = matcher.text_encoder.encoder.layer[0].crossattention.self
    inputs = Pixels()(image, "a cat?")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    length, step, seen = inputs["input_ids"].shape[1], 1e-6, {}

    def before(module, args, kwargs):
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        seen["values"] = module.value(states)[0].unflatten(-1, (2, 8))  # [1 + P * P, heads, 8]

    def logit(head=0, word=0, key=0, by=0.0):
        def nudge(module, args, output):
            seen["probs"] = output[1]
            context = output[0].clone()
            context[0, word, head * 8 : head * 8 + 8] += by * seen["values"][key, head]
            return (context, *output[1:])

        handles = [
            site.register_forward_pre_hook(before, with_kwargs=True),
            site.register_forward_hook(nudge),
        ]
        with torch.no_grad():
            found = float(matcher(**inputs, use_itm_head=True)[0][0, 1])
        for handle in handles:
            handle.remove()
        return found

    expected = torch.zeros(16, dtype=torch.float64)
    for head in range(2):
        for word in range(1, length - 1):
            for key in range(16):
                slope = (logit(head, word, key + 1, step) - logit(head, word, key + 1, -step)) / (2 * step)
                expected[key] += (
                    float(seen["probs"][0, head, word, key + 1]) * max(slope, 0) / 2 / (length - 2)
                )
    cam, _ = matching.match(matcher, Pixels(), image, "a cat?", 0)
    torch.testing.assert_close(torch.tensor(cam).flatten(), expected, rtol=1e-5, atol=step**2)


# -- refusals -------------------------------------------------------------------------------------------------------


@every_method
def test_a_text_only_prompt_is_refused(name):
    model = model_of("llava")
    text = {k: v for k, v in padded(model).items() if k != "pixel_values"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == model.config.image_token_id, 7)
    with untouched(model), refused(PatchError, name, "no image token"):
        hap.two_stream(model, name, inputs=text, **OPTIONS[name])


def test_what_cannot_work_is_refused_before_anything_runs():
    model = model_of("llava")
    inputs = padded(model)
    with untouched(model):
        with refused(PatchError, "no input_ids"):
            hap.two_stream(model, "vcd", inputs={"inputs_embeds": torch.zeros(1, 4, 8)})
        with refused(PatchError, "no pixel_values"):
            hap.two_stream(model, "vcd", inputs={k: v for k, v in inputs.items() if k != "pixel_values"})
        with refused(ConfigError, "tokenizer", "tokens="):
            hap.two_stream(model, "icd", inputs=inputs)
        with refused(ConfigError, "images="):
            hap.two_stream(model, "agla", inputs=inputs)
        with refused(UnknownPatchError, "vdc", "vcd"):
            hap.two_stream(model, "vdc", inputs=inputs)
        with refused(ConfigError, "alhpa", "alpha"):
            hap.two_stream(model, "vcd", inputs=inputs, alhpa=1.0)
        with refused(ConfigError, "noise_step"):
            hap.two_stream(model, "vcd", inputs=inputs, noise_step=1000)
        with refused(ModelMismatchError, "layer=7", "2 layers"):
            hap.two_stream(model, "sid", inputs=inputs, layer=7)
    text = model_of("llama")
    with untouched(text), refused(ModelMismatchError, "no image token", "vision-language"):
        hap.two_stream(text, "vcd")
    with refused(ModelMismatchError, "encoder-decoder"):
        hap.two_stream(model_of("florence2"), "m3id")


def test_a_row_of_nothing_but_its_image_is_refused():
    model = model_of("llava")
    one = alone(padded(model), 0)
    keep = one["input_ids"][0] == model.config.image_token_id
    one = {**one, "input_ids": one["input_ids"][:, keep], "attention_mask": one["attention_mask"][:, keep]}
    with refused(PatchError, "nothing but its image"):
        hap.two_stream(model, "m3id", inputs=one)


def test_a_processor_for_another_prompt_or_in_the_middle_of_one_is_refused():
    model = model_of("llava")
    inputs, other = padded(model), padded(model, seed=3)
    stream = hap.two_stream(model, "vcd", inputs=inputs)
    with refused(PatchError, "not start with the prompt", ".prompt(inputs)"):
        generate(model, other, stream)
    with refused(PatchError, "no prompt yet"):
        generate(model, inputs, hap.two_stream(model, "vcd"))
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], 1)
    with refused(PatchError, "has read nothing"):
        stream.prompt(inputs)(ids, output(model, inputs)[:, -1])


# -- registry, evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", decoding.available())
def test_docstring_says_source_formula_neutral_value_and_differences(name):
    cls = decoding.get(name)
    for word in ("Source:", "Formula:", "Neutral value:", "Defaults:", "Differs", "READ", cls.arxiv):
        assert word in cls.__doc__, f"{name} does not say {word}"
    assert cls.arxiv and cls.paper and cls.neutral


def test_a_method_of_ones_own_is_a_dataclass_with_two_methods():
    model = model_of("llava")
    inputs = padded(model)

    from dataclasses import dataclass

    @decoding.register_decoding("mean_of_two")
    @dataclass
    class MeanOfTwo(decoding.Decoding):
        weight: float = 0.5

        def second(self, model, inputs, given):
            return [vcd.noisy(inputs, 999, 0)]

        def combine(self, main, others, step):
            return main + self.weight * (others[0] - main)

    try:
        assert "mean_of_two" in decoding.available()
        stream = hap.two_stream(model, "mean_of_two", inputs=inputs, weight=0.0)
        assert torch.equal(generate(model, inputs, stream), generate(model, inputs))
        assert not torch.equal(
            generate(model, inputs, hap.two_stream(model, "mean_of_two", inputs=inputs, weight=1.0)),
            generate(model, inputs),
        )
    finally:
        decoding.base._known.pop("mean_of_two")


def test_inside_decoded_an_evaluation_gets_the_processor_and_outside_none():
    model = model_of("llava")
    inputs = padded(model)
    assert list(decoding.processors(model, inputs)) == []
    with decoding.decoded(model, "vcd", **OPTIONS["vcd"]):
        inside = decoding.processors(model, inputs)
        made = generate(model, inputs, *inside)
    assert torch.equal(
        made, generate(model, inputs, hap.two_stream(model, "vcd", inputs=inputs, **OPTIONS["vcd"]))
    )
    assert list(decoding.processors(model, inputs)) == []
    assert icd.InstructionContrastiveDecoding.from_dict({"tokens": [1]}).to_dict()["tokens"] == [1]


def test_an_evaluation_measures_a_decoding_like_a_patch_and_checks_its_neutral_value():
    from hf_attn_patch import eval as evaluation
    from hf_attn_patch.eval.pope import Pope

    from . import tiny_vlm

    model, processor = tiny_vlm.llava()
    task = Pope(samples=1, batch_size=2, max_new_tokens=4, neutral=2)
    result = evaluation.run(
        task,
        model,
        processor,
        patches=["pai:alpha=3,first_layer=0"],
        decodings=["vcd:alpha=3,beta=0.01", "pai:gamma=3,beta=0"],
        limit=4,
    )
    names = [v.label for v in result.variants]
    assert names[0] == "dense" and names[2:] == [
        "decoding vcd(alpha=3.0, beta=0.01)",
        "decoding pai(gamma=3.0, beta=0.0)",
    ]
    for name in names[2:]:
        assert result[name].answers != result["dense"].answers
        assert result[name].patch["kind"] == "decoding"
    assert len(result.checks) == 3 and all(check.ok for check in result.checks)


def test_a_decoding_that_is_misspelt_is_refused_before_a_model_is_loaded():
    from hf_attn_patch.eval.harness import resolve
    from hf_attn_patch.eval.specs import SpecError

    with refused(SpecError, "alhpa", "alpha"):
        resolve([], ["vcd:alhpa=1"])
    with refused(UnknownPatchError, "vdc", "vcd"):
        resolve([], ["vdc"])
    with refused(SpecError, "two variants"):
        resolve([], ["vcd", "vcd"])


def test_a_text_task_refuses_a_decoding_instead_of_ignoring_it():
    from hf_attn_patch.eval.generation import Prompt
    from hf_attn_patch.eval.generation import generate as answer

    from . import tiny_vlm

    model, processor = tiny_vlm.llava()
    with decoding.decoded(model, "vcd"), refused(PatchError, "no image token"):
        answer(model, processor.tokenizer, [Prompt((5, 6, 7), ("a",), 2, "x")])
