"""Calibration of vision-language models: questions about images as data, heads that look, sink dimensions for `var`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import hf_attn_patch as hap
from hf_attn_patch.calibration import image_data
from hf_attn_patch.calibration.calibrator import CalibrationError
from hf_attn_patch.calibration.image_heads import image_mass
from hf_attn_patch.errors import ModelMismatchError
from hf_attn_patch.model.head_sets import read as read_head_set

from .eval_models import language_model
from .small import model_of, refused

WORDS = "is there a cat dog what do you see yes no on the table user assistant".split()
TEMPLATE = (
    "{% for m in messages %}user {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def processor_of(model, template=TEMPLATE):
    """A `LlavaProcessor` of a tiny model: one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocab = {
        "<pad>": 0,
        "<unk>": 1,
        **{w: i for i, w in enumerate(WORDS, 3)},
        "<image>": model.config.image_token_id,
    }
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    vision = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


def rows(count=4):
    return [
        {"image": picture(i), "question": "is there a cat", "answer": ("yes there is", "no")[i % 2]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def vlm():
    model = model_of("llava").float()
    return model, processor_of(model)


# -- data ------------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_chat_with_its_answer_behind_it(vlm):
    model, processor = vlm
    sample = image_data.samples("test", rows(1), model, processor, 1)[0]
    image = model.config.image_token_id
    said = processor.tokenizer("yes there is")["input_ids"]
    asked = processor.tokenizer("is there a cat assistant")["input_ids"]
    ids = sample.inputs["input_ids"][0].tolist()
    assert ids[sample.start :] == said and ids[sample.start - len(asked) : sample.start] == asked
    assert sample.image.tolist() == [i == image for i in ids] and 0 < sample.image.sum() < len(ids)
    assert sample.inputs["attention_mask"].tolist() == [[1] * len(ids)]
    assert model(**sample.inputs).logits.shape[1] == len(sample)


def test_prompts_keep_their_placeholders_or_get_them(vlm):
    model, processor = vlm
    assert image_data.prompt_of("see <image> cat", 1, processor) == "see <image> cat"
    assert image_data.prompt_of("cat", 2, processor) == "user <image> <image> cat assistant"
    assert image_data.prompt_of("cat", 2, processor_of(model, None)) == "<image><image>\ncat"


def test_the_models_own_answer_is_what_it_generates(vlm):
    model, processor = vlm
    sample = image_data.samples("test", rows(1), model, processor, 1, answers="model", new=3)[0]
    prompt = {k: v[:, : sample.start] if k != "pixel_values" else v for k, v in sample.inputs.items()}
    expected = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(sample.inputs["input_ids"], expected)


def test_paths_of_a_file_count_from_its_folder_and_missing_images_are_listed(tmp_path, vlm):
    picture(0).save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    lines = [{"image": name, "prompt": "see", "answer": "cat"} for name in ("a.png", "b.png", "c.png")]
    file.write_text(json.dumps(lines[0]) + "\n")
    assert image_data.has_images(file)
    assert len(image_data.samples("test", file, *vlm, 9)) == 1
    file.write_text("\n".join(map(json.dumps, lines)))
    with refused(CalibrationError, "2 images", "b.png", "c.png"):
        image_data.records(file)


@pytest.mark.parametrize("data, words", [
    (None, ["data=", "question"]), ([], ["data="]), ([{"question": "see"}], ["record 1", "no image"]),
    ([{"image": "a.png"}], ["record 1", "no question"]), ("nowhere.jsonl", ["nowhere.jsonl", "no file"]),
], ids=str)  # fmt: skip
def test_data_without_images_or_questions_are_refused(data, words):
    with refused(CalibrationError, *words):
        image_data.records(data)


def test_a_tokenizer_alone_a_missing_answer_and_a_foreign_processor_are_refused(vlm):
    model, processor = vlm
    with refused(CalibrationError, "test", "processor of text and images", "AutoProcessor"):
        image_data.samples("test", rows(1), model, processor.tokenizer, 1)
    with refused(CalibrationError, "has no answer", "answers=model"):
        image_data.samples("test", [{"image": picture(0), "question": "see"}], model, processor, 1)
    other = model_of("llava", image_token_index=101)
    with refused(CalibrationError, "no image token", "processor of this model"):
        image_data.samples("test", rows(1), other, processor, 1)


# -- image_heads -----------------------------------------------------------------------------------------------------


def test_image_mass_is_the_models_own_attention_to_the_image_in_the_rows_of_the_answer(vlm):
    model, processor = vlm
    sample = image_data.samples("test", rows(1), model, processor, 1)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**sample.inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    expected = [a[0, :, sample.start - 1 : -1][:, :, sample.image].sum(-1).mean(-1) for a in attentions]
    np.testing.assert_allclose(image_mass(model, sample), torch.stack(expected).numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind, heads", [("q", 4), ("kv", 2)])
def test_image_heads_are_a_ranked_head_set_that_a_patch_takes(vlm, tmp_path, kind, heads):
    model, processor = vlm
    found = hap.calibrate(
        model, "image_heads", tokenizer=processor, data=rows(), kind=kind, top=2, out=tmp_path / "heads.json"
    )
    read = read_head_set(json.loads((tmp_path / "heads.json").read_text()), "test")
    assert len(read.heads) == 2 * heads and read.objectives == ("image_mass",)
    scores = [h.score for h in read.heads]
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] < scores[0] <= 1
    each = [image_mass(model, s) for s in image_data.samples("test", rows(), model, processor, 4)]
    mean = np.mean(each, 0).reshape(2, heads, -1).mean(-1)
    assert scores[0] == pytest.approx(mean.max(), rel=1e-6)
    assert (read.heads[0].layer, read.heads[0].head) == np.unravel_index(mean.argmax(), mean.shape)
    with hap.patched(model, found.patch, **found.options, part="text") as handle:
        assert handle.sites


def test_image_heads_of_a_text_model_are_refused():
    model, tokenizer = language_model()
    with refused(ModelMismatchError, "image_heads", "no image tokens"):
        hap.calibrate(model, "image_heads", tokenizer=tokenizer, data=rows())


def test_an_interrupted_run_goes_on_with_the_same_images_and_refuses_others(vlm, tmp_path, monkeypatch):
    from hf_attn_patch.calibration import image_heads

    model, processor = vlm
    run = lambda data: hap.calibrate(
        model, "image_heads", tokenizer=processor, data=data, out=tmp_path / "h.json"
    )
    first, calls, real = run(rows()), [], image_heads.image_mass
    monkeypatch.setattr(image_heads, "image_mass", lambda *a: (calls.append(1), real(*a))[1])
    assert run(rows()).plan == first.plan and not calls
    with refused(CalibrationError, "another calibration", "data"):
        run([{**r, "image": picture(99)} for r in rows()])


# -- sink_dims -------------------------------------------------------------------------------------------------------


def with_sink(model, channel=5, height=400.0, token=None):
    """Token `token` (None: all) enters with a huge `channel`, which no layer of a tiny model removes."""
    weight = model.get_input_embeddings().weight
    weight[slice(None) if token is None else token, channel] = height
    return model


def test_sink_dims_finds_the_huge_channel_and_var_takes_the_file(tmp_path, vlm):
    model = with_sink(model_of("llava").float())
    processor = vlm[1]
    file = tmp_path / "dims.json"
    found = hap.calibrate(
        model, "sink_dims", tokenizer=processor, data=rows(), tau=6.0, first_layer=0, out=file
    )
    assert found.plan["dims"] == [5] and found.plan["hidden_size"] == 64
    assert found.report["visual sinks per layer"] == [0.0, 0.0]  # image tokens come from the tower
    for dims in (str(file), found.plan):
        with hap.patched(model, "var", dims=dims, tau=6.0, first_layer=0) as handle:
            assert handle.config.to_dict()["dims"] == json.loads(file.read_text())
    text = hap.calibrate(
        model, "sink_dims", tokenizer=processor, data=[{"text": "cat"}], tau=6.0, first_layer=0
    )
    assert text.plan["dims"] == [5]


def test_sink_dims_counts_the_image_tokens_that_are_sinks(vlm):
    model = with_sink(model_of("llava").float())
    projector = model.model.multi_modal_projector.linear_2
    projector.bias[5] = 400.0
    found = hap.calibrate(model, "sink_dims", tokenizer=vlm[1], data=rows(2), tau=6.0, first_layer=1)
    assert found.report["visual sinks per layer"] == [16.0]


def test_a_channel_must_be_huge_in_more_than_the_share_of_prompts(vlm):
    processor = vlm[1]
    cat = processor.tokenizer("cat")["input_ids"][0]
    model = with_sink(model_of("llava").float(), token=cat)
    options = dict(tokenizer=processor, data=[{"text": "cat"}, {"text": "dog"}], tau=6.0, first_layer=0)
    assert hap.calibrate(model, "sink_dims", share=0.49, **options).plan["shares"] == {"5": 0.5}
    with refused(CalibrationError, "5 (ratio", "above tau in 50%"):
        hap.calibrate(model, "sink_dims", share=0.5, **options)


def test_no_sink_dimension_is_an_error_that_names_the_nearest(vlm):
    model, processor = vlm
    with refused(CalibrationError, "no channel", "tau=6", "nearest:", "var would edit nothing"):
        hap.calibrate(model, "sink_dims", tokenizer=processor, data=[{"text": "cat"}], tau=6.0, first_layer=0)
    with refused(CalibrationError, "tau=20", "8.0", "64 channels"):
        hap.calibrate(model, "sink_dims", tokenizer=processor, data=[{"text": "cat"}], first_layer=0)
    with refused(CalibrationError, "first_layer=2", "below 2"):
        hap.calibrate(model, "sink_dims", tokenizer=processor, tau=6.0)


def test_smollm2_has_one_sink_dimension_at_the_published_threshold():
    from hf_attn_patch import testbed

    model, tokenizer = testbed.load("smollm2")
    assert hap.calibrate(model, "sink_dims", tokenizer=tokenizer, samples=4).plan["dims"] == [507]


def test_both_calibrators_run_from_the_command_line(tmp_path, vlm, monkeypatch):
    from typer.testing import CliRunner

    from hf_attn_patch.cli import models
    from hf_attn_patch.cli.app import app

    asked = []
    model = with_sink(model_of("llava").float())
    monkeypatch.setattr(models, "load_model", lambda *a: (asked.append(a[2]), (model, vlm[1]))[1])
    picture(0).save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "see", "answer": "cat"}))
    for what, key in (("image_heads", "heads"), ("sink_dims:tau=6,first_layer=0", "dims")):
        out = tmp_path / "found.json"
        line = ["calibrate", what, "--model", "any", "--data", str(file), "--out", str(out)]
        line += ["--work", str(tmp_path / key)]
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())[key]
    assert asked == ["processor", "processor"]
