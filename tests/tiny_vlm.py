"""Tiny random vision-language models with real processors: a tokenizer of single characters and 32-pixel images."""

from __future__ import annotations

from typing import Any

from hf_attn_patch.testbed.tiny import tiny_model
from tests.tiny_text import characters as characters

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)


def llava(chat: bool = False) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration, LlavaProcessor), with a chat template if `chat`."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    model = tiny_model("llava")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        _tokenizer(model.config),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>") if chat else None,
    )
    return model, processor


def llava_next() -> tuple[Any, Any]:
    """(LlavaNextForConditionalGeneration, LlavaNextProcessor): as many image tokens as the shape of an image asks for,
    so rows of different lengths."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    model = tiny_model("llava_next")
    config = model.config
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return model, LlavaNextProcessor(
        images,
        _tokenizer(config),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


def paligemma() -> tuple[Any, Any]:
    """(PaliGemmaForConditionalGeneration, PaliGemmaProcessor): attends to image and question in both directions."""
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    model = tiny_model("paligemma")
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = (32 // model.config.vision_config.patch_size) ** 2
    return model, PaliGemmaProcessor(images, _tokenizer(model.config))


def gemma3() -> tuple[Any, Any]:
    """(Gemma3ForConditionalGeneration, Gemma3Processor): prompts hold one token that stands for image_seq_length."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    model = tiny_model("gemma3")
    config, tokenizer = model.config, characters()
    names = {config.boi_token_index: "<start_of_image>", config.eoi_token_index: "<end_of_image>",
             config.image_token_id: "<image_soft_token>"}  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [names[i] for i in sorted(names)]})
    assert {tokenizer.convert_tokens_to_ids(name): name for name in names.values()} == names
    of_kind = {"boi": config.boi_token_index, "eoi": config.eoi_token_index, "image": config.image_token_id}
    for kind, index in of_kind.items():
        setattr(tokenizer, f"{kind}_token", names[index])
        setattr(tokenizer, f"{kind}_token_id", index)
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    chat = CHAT.replace("IMAGE", "<start_of_image>")
    return model, Gemma3Processor(
        images, tokenizer, chat_template=chat, image_seq_length=config.mm_tokens_per_image
    )


def _tokenizer(config: Any) -> Any:
    tokenizer = characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    return tokenizer
