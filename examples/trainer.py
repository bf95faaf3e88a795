"""Your own Trainer script for a patched model with LoRA: the two lines that this package adds are marked.

python examples/trainer.py [MODEL_FOLDER] [STEPS]
"""

import sys

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hf_attn_patch as hap
from hf_attn_patch import testbed, training
from hf_attn_patch.testbed.prose import prose


def main(folder: str | None = None, steps: int = 4, out: str = "runs/trainer") -> float:
    if folder is None:
        model, tokenizer = testbed.load("smollm2")
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prose(60_000, offset=40_000))["input_ids"]
    rows = [{"input_ids": ids[i : i + 128]} for i in range(0, len(ids) - 128, 128)]

    hap.patch(
        model, "moh", router="learned", active=0.75, shared=0.25
    )  # line 1: routers and their balance loss
    lora = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["attn_patch"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)

    arguments = TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[training.PatchCallback()],  # line 2: checks, NaN guard, moh.balance in the log
    ).train()

    training.save(model, f"{out}/adapters")  # LoRA and routers, side by side
    return float(hap.aux_losses(model)["moh.balance"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 4)
