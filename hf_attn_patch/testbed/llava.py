"""A real LLaVA without a hub: DINOv2-S, SmolLM2-135M, and a projector and LoRA trained on rendered scenes.

    model, processor = testbed.load("llava")
    inputs = processor(images=[image], text=[prompt("Is there a cat in the image?")], return_tensors="pt")

`LlavaForConditionalGeneration`, 112-pixel images, 64 image tokens. What is shipped (`llava_weights/`) was trained by
`python -m hf_attn_patch.testbed.train_llava`; the LoRA is merged when the item is built. It describes `testbed.scenes`
and answers yes/no questions about them, with mistakes that follow what it saw together in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.store import Item

WEIGHTS = Path(__file__).with_name("llava_weights") / "adapter.safetensors"
PARTS = ("dinov2s", "smollm2")
PIXELS, PATCH, IMAGE_TOKEN = 112, 14, "<image>"
PROJECTOR = "model.multi_modal_projector."
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prompt(question: str, images: int = 1) -> str:
    """The text of one question with `images` placeholders, ready for the processor."""
    return (
        f"<|im_start|>user\n{(IMAGE_TOKEN + chr(10)) * images}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def untrained(seed: int = 0) -> tuple[Any, Any]:
    """(`LlavaForConditionalGeneration`, `LlavaProcessor`): both towers real, the projector random."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from hf_attn_patch import testbed

    vision, _ = testbed.load("dinov2s")
    language, tokenizer = testbed.load("smollm2")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN], "pad_token": "<|endoftext|>"})
    text_config = language.config.to_dict() | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    state = language.model.state_dict()
    table = state["embed_tokens.weight"]  # the row of the placeholder is never read: its logit stays 0
    state["embed_tokens.weight"] = torch.cat(
        [table, table.new_zeros(len(tokenizer) - len(table), table.shape[1])]
    )
    model.model.language_model.load_state_dict(state)
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), processor_of(tokenizer)


def processor_of(tokenizer: Any) -> Any:
    """`LlavaProcessor` that resizes images to 112 pixels square (no crop) and pads on the left."""
    from transformers import LlavaProcessor

    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def image_processor() -> Any:
    """The Pillow version of transformers' image processor of DINOv2 (torchvision is not needed)."""
    from transformers import AutoImageProcessor

    from hf_attn_patch import testbed

    size = {"height": PIXELS, "width": PIXELS}
    return AutoImageProcessor.from_pretrained(testbed.path("dinov2s"), size=size, backend="pil")


def merge(model: Any, weights: dict[str, Any], facts: dict[str, Any]) -> None:
    """Loads the projector and adds the LoRA of `train_llava` to the language model's weights.

    weights: `MODULE.weight|bias` of the projector, `MODULE.lora_A` [r, in] and `MODULE.lora_B` [out, r].
    facts: {"scale": alpha / r}.
    """
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, tensor in weights.items():
            path, _, kind = name.rpartition(".")
            if kind == "lora_B":
                up, down = tensor.float(), weights[f"{path}.lora_A"].float()
                modules[path].weight += facts["scale"] * (up @ down)
            elif kind != "lora_A":
                getattr(modules[path], kind).copy_(tensor.float())


def build(dest: Path, wheel: Path | None) -> None:
    """Both towers, the projector and the merged LoRA as one folder in Hugging Face format."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    model, processor = untrained()
    with safe_open(WEIGHTS, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    merge(model, load_file(WEIGHTS), facts)
    model.save_pretrained(dest)
    processor.save_pretrained(dest)


def load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """`(LlavaForConditionalGeneration, LlavaProcessor)`."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype), processor_of(tokenizer)


ITEM = Item(
    name="llava",
    summary="LlavaForConditionalGeneration: DINOv2-S + SmolLM2-135M, trained on rendered scenes, 64 image tokens",
    licence="Apache-2.0 (SmolLM2), MIT (DINOv2-S, projector and LoRA), sprites OFL-1.1",
    needs=("gguf", "onnx", "pillow"),
    build=build,
    load=load,
)
