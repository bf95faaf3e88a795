"""testbed:llava: shipped weights merge as PEFT merges them, and the model answers from the image, not from words."""

from __future__ import annotations

import json

import pytest
import torch

from hf_attn_patch import testbed
from hf_attn_patch.testbed import llava, scenes, tiny, train_llava
from hf_attn_patch.testbed.wheels import TestbedError


def test_saved_adapters_merge_into_what_peft_computes(tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors import safe_open
    from safetensors.torch import load_file

    plain, trained = tiny.tiny_model("llava"), tiny.tiny_model("llava")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(train_llava.TARGETS))
    peft.inject_adapter_in_model(config, trained.model.language_model)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():  # values that bfloat16 holds exactly, as the file does
        for name, p in trained.named_parameters():
            if "lora_" in name or name.startswith(llava.PROJECTOR):
                p.copy_((0.1 * torch.randn(p.shape, generator=gen)).bfloat16())
    train_llava.save(trained, tmp_path / "a.safetensors", {"scale": 2.0})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    llava.merge(plain, load_file(tmp_path / "a.safetensors"), facts)
    inputs = tiny.tiny_inputs(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, trained(**inputs).logits)


@pytest.fixture(scope="module")
def real():
    try:
        return testbed.load("llava")
    except TestbedError as error:
        pytest.skip(f"testbed:llava cannot be had here: {error}")


@torch.no_grad()
def yes(model, processor, image, question) -> bool:
    inputs = processor(images=[image], text=[llava.prompt(question)], return_tensors="pt")
    logits = model(**inputs, logits_to_keep=1).logits[0, -1]
    words = [processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
    return bool(logits[words[0]] > logits[words[1]])


def test_it_answers_from_the_image(real):
    model, processor = real
    data = scenes.build("test", 10, seed=77)
    right = []
    for row, other in zip(data, data.select([*range(1, 10), 0])):
        here = {o["name"] for o in row["objects"]}
        asked = [(min(here), True), (min({o["name"] for o in other["objects"]} - here), False)]
        right += [
            yes(model, processor, row["image"], scenes.question(name)) == answer for name, answer in asked
        ]
    assert sum(right) >= 15  # of 20; 10 by chance


def test_its_prompt_is_its_chat_template_and_its_batches_pad_left(real):
    model, processor = real
    text = "Is there a cat in the image?"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    assert processor.apply_chat_template(turn, add_generation_prompt=True) == llava.prompt(text)
    data = scenes.build("test", 2, seed=5)
    prompts = [llava.prompt("Describe."), llava.prompt(text)]
    both = processor(images=list(data["image"]), text=prompts, return_tensors="pt", padding=True)
    assert both["attention_mask"][0, 0] == 0 and both["attention_mask"][1].all()
    assert (both["input_ids"] == model.config.image_token_id).sum(-1).tolist() == [64, 64]
    with torch.no_grad():
        batch = model(**both).logits[:, -1]
        for i in range(2):
            one = processor(images=[data[i]["image"]], text=[prompts[i]], return_tensors="pt")
            torch.testing.assert_close(batch[i], model(**one).logits[0, -1], atol=1e-3, rtol=1e-3)
