"""Learn per-head gates with your own Trainer script: the two lines that this package adds are marked.

python examples/trainer_with_head_gates.py
"""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import hf_attn_patch as hap
from hf_attn_patch import testbed
from hf_attn_patch.testbed.prose import prose


class Prose(Dataset):
    """Segments of 64 tokens of English prose."""

    def __init__(self, tokenizer, count: int = 16):
        ids = tokenizer(prose(60_000), return_tensors="pt").input_ids[0]
        self.rows = ids[: count * 64].reshape(count, 64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    model, tokenizer = testbed.load("smollm2")
    model.requires_grad_(False)
    handle = hap.patch(model, "head_gate", gate=1.0, trainable_gate=True)  # line 1: gates are now parameters

    arguments = TrainingArguments(
        output_dir="runs/head-gates", max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Prose(tokenizer)).train()

    handle.save("runs/head-gates/adapter")  # line 2: JSON + safetensors, a few kB
    handle.remove()
    print(hap.load(model, "runs/head-gates/adapter"))


if __name__ == "__main__":
    main()
