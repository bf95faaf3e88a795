"""Trains the projector and the LoRA of `testbed:llava` on rendered scenes: about 50 minutes on one CPU core.

    python -m hf_attn_patch.testbed.train_llava --out runs/llava
    python -m hf_attn_patch.testbed.train_llava --resume runs/llava/adapter.safetensors --steps 90 --lr 0.6 \\
        --out runs/llava-2 --install                                         # what the package ships
    python -m hf_attn_patch.testbed.train_llava --steps 2 --align-scenes 20  # see that it runs

Two stages. (0) The projector alone: the output at each patch is pulled towards the mean word embedding of the object
there (cross-entropy over cosines with all object words and "background", and a small MSE). (1) Captions and yes/no
questions through the language model: LoRA r=16 on q, v, o of every layer, and the projector.

Of one image all questions are asked in one row: every turn sees the image and itself, not the other turns (a 4-D mask
and positions that start again), so that the image tokens, most of the cost, are computed once.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_attn_patch.testbed import llava, scenes
from hf_attn_patch.testbed.objects import GROUPS, NAMES, PARTNER

RANK, ALPHA, TARGETS = 16, 32, ("q_proj", "v_proj", "o_proj")
PROJECTOR_LR, LORA_LR = 5e-4, 1e-3
TEMPERATURE = 0.05  # of the cosines in stage 0
IN_GROUP = 0.3  # share of the questions answered "No" that ask for an object of the scene's own group


@dataclass
class Row:
    """One image with all its turns: ids [L], positions [L], turn of each token (0 = the shared prefix), targets [L]
    (-100: none), and whether the target is a yes/no word."""

    ids: list[int]
    positions: list[int]
    turns: list[int]
    targets: list[int]
    short: list[bool]
    image: Any


# -- stage 0 --------------------------------------------------------------------------------------------------------


def words(tokenizer: Any, table: Any) -> Any:
    """float32 [86 + 1, width]: mean embedding of the tokens of " name" for every object, and of " background"."""
    rows = [tokenizer(" " + name, add_special_tokens=False).input_ids for name in (*NAMES, "background")]
    return torch.stack([table[row].float().mean(0) for row in rows])


def labels_of(things: list[scenes.Thing], size: int, patch: int) -> Any:
    """int64 [(size / patch)^2]: the object that covers most of each patch (by its box), the last index for none."""
    side = size // patch
    label = torch.full((side, side), len(NAMES))
    best = torch.full((side, side), 0.35)  # of a patch
    for thing in things:
        left, top, right, bottom = thing.box
        edges = torch.arange(side) * patch
        wide = (torch.clamp(edges + patch, max=right) - torch.clamp(edges, min=left)).clamp(min=0) / patch
        high = (torch.clamp(edges + patch, max=bottom) - torch.clamp(edges, min=top)).clamp(min=0) / patch
        share = high[:, None] * wide[None]
        taken = share > best
        label[taken], best[taken] = NAMES.index(thing.name), share[taken]
    return label.flatten()


@torch.no_grad()
def features(model: Any, pixels: Any) -> Any:
    """[B, patches, 384]: what the projector reads."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def align(model: Any, processor: Any, count: int, seed: int, epochs: int = 12, log: Any = print) -> float:
    """Stage 0. Returns the share of held-out object patches whose nearest word is the right one."""
    table = words(processor.tokenizer, model.get_input_embeddings().weight)
    seen, wanted = [], []
    for start in range(0, count, 50):
        drawn = [scenes.draw(f"train-align{seed}-{i}") for i in range(start, min(start + 50, count))]
        pixels = processor.image_processor([image for image, _, _ in drawn], return_tensors="pt").pixel_values
        seen.append(features(model, pixels))
        wanted += [labels_of(things, llava.PIXELS, llava.PATCH) for _, _, things in drawn]
    held = max(count // 10, 1)
    x, y = torch.cat(seen), torch.stack(wanted)
    projector = model.model.multi_modal_projector.train()
    optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    rows_per_step = 16
    total = epochs * math.ceil((count - held) / rows_per_step)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=total)
    generator = torch.Generator().manual_seed(seed)
    direction = F.normalize(table, dim=-1)
    weight = torch.ones(len(table))
    weight[-1] = 0.2  # most patches are background
    for _ in range(epochs):
        for rows in torch.randperm(count - held, generator=generator).split(rows_per_step):
            out = projector(x[rows])
            target = y[rows]
            cosine = F.normalize(out.float(), dim=-1) @ direction.T
            loss = F.cross_entropy(cosine.flatten(0, 1) / TEMPERATURE, target.flatten(), weight)
            loss = loss + 10.0 * F.mse_loss(out.float(), table[target])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        found = (F.normalize(projector(x[-held:]).float(), dim=-1) @ direction.T).argmax(-1)
    objects = y[-held:] < len(NAMES)
    reached = float((found == y[-held:])[objects].float().mean())
    log(
        f"stage 0: {reached:.3f} of the object patches of {held} unseen images have the right word",
        flush=True,
    )
    return reached


# -- stage 1 --------------------------------------------------------------------------------------------------------


def turns_of(key: str, group: str, things: list[scenes.Thing]) -> list[tuple[str, str, bool]]:
    """Questions about one scene: (question, answer, whether it is a yes/no question)."""
    rng = random.Random(f"turns-{key}")
    names = list(dict.fromkeys(t.name for t in things))
    asked = [(scenes.PROMPT, scenes.caption(group, things), False)]
    asked += [(scenes.question(n), "Yes.", True) for n in rng.sample(names, min(3, len(names)))]
    near = [n for n in {PARTNER.get(n) for n in names} | set(GROUPS[group]) if n and n not in names]
    for _ in range(3):
        pool = sorted(near) if near and rng.random() < IN_GROUP else [n for n in NAMES if n not in names]
        asked.append((scenes.question(rng.choice(pool)), "No.", True))
    others = [(q, f"{a}.", True) for kind, q, a in scenes.yes_no(group, things, rng) if kind != "existence"]
    asked += rng.sample(others, min(3, len(others)))
    return asked


def row_of(key: str, processor: Any) -> Row:
    """Scene `key` as one row for training."""
    image, group, things = scenes.draw(key)
    tokenizer = processor.tokenizer
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    patches = (llava.PIXELS // llava.PATCH) ** 2
    ids = encode("<|im_start|>user\n" + llava.IMAGE_TOKEN * patches + "\n")
    row = Row(ids, list(range(len(ids))), [0] * len(ids), [-100] * len(ids), [False] * len(ids), image)
    prefix = len(ids)
    for turn, (asked, answer, short) in enumerate(turns_of(key, group, things), start=1):
        before = encode(f"{asked}<|im_end|>\n<|im_start|>assistant\n")
        after = encode(f"{answer}<|im_end|>")
        row.ids += before + after
        row.positions += range(prefix, prefix + len(before) + len(after))
        row.turns += [turn] * (len(before) + len(after))
        # the last token of the question predicts the first one of the answer
        row.targets += [-100] * (len(before) - 1) + after + [-100]
        row.short += [short] * (len(before) + len(after))
    return row


def batch_of(rows: list[Row], processor: Any, dtype: Any) -> dict[str, Any]:
    """Tensors of a batch, padded on the right; the mask is additive, [B, 1, L, L]."""
    longest = max(len(r.ids) for r in rows)
    filled = lambda values, fill: values + [fill] * (longest - len(values))
    ids = torch.tensor([filled(r.ids, processor.tokenizer.pad_token_id) for r in rows])
    turns = torch.tensor([filled(r.turns, -1) for r in rows])
    seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    pixels = processor.image_processor([r.image for r in rows], return_tensors="pt").pixel_values
    return {
        "input_ids": ids,
        "attention_mask": mask[:, None],
        "position_ids": torch.tensor([filled(r.positions, 0) for r in rows]),
        "pixel_values": pixels.to(dtype),
        "targets": torch.tensor([filled(r.targets, -100) for r in rows]),
        "short": torch.tensor([filled(r.short, False) for r in rows]),
    }


def losses(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """(mean loss of caption tokens, mean loss of yes/no answers); logits are computed at targets only."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    chosen = batch["targets"] >= 0
    each = F.cross_entropy(model.lm_head(hidden[chosen]).float(), batch["targets"][chosen], reduction="none")
    short = batch["short"][chosen]
    return each[~short].mean(), each[short].mean()


def batches(processor: Any, size: int, seed: int, dtype: Any, at: int = 0) -> Iterator[dict[str, Any]]:
    """New scenes for ever, from number `at` on."""
    while True:
        yield batch_of(
            [row_of(f"train-{seed}-{i}", processor) for i in range(at, at + size)], processor, dtype
        )
        at += size


def train(options: argparse.Namespace, log: Any = print) -> tuple[Any, Any]:
    """Both stages; writes `adapter.safetensors` and `training.jsonl` under `options.out`."""
    from peft import LoraConfig, inject_adapter_in_model

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model, processor = llava.untrained(options.seed)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    started = time.time()
    done: dict[str, Any] = {"trained_steps": 0}
    if options.resume is None:
        done["aligned"] = align(model, processor, options.align_scenes, options.seed, log=log)
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)), model.model.language_model
    )
    if options.resume is not None:
        done = restore(model, Path(options.resume))
    projector = list(model.model.multi_modal_projector.parameters())
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    rates = [PROJECTOR_LR * options.lr, LORA_LR * options.lr]
    optimiser = torch.optim.AdamW(
        [{"params": projector, "lr": rates[0]}, {"params": lora, "lr": rates[1]}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=options.steps, pct_start=0.1)
    facts = {**done, "scale": ALPHA / RANK, "rank": RANK, "targets": TARGETS, **vars(options)}
    before = done["trained_steps"]
    device = torch.device(options.device)
    model.to(device).train()
    with open(out / "training.jsonl", "w") as journal:
        source = batches(processor, options.batch, options.seed, torch.float32, before * options.batch)
        for step in range(1, options.steps + 1):
            caption_loss, short_loss = losses(model, {k: v.to(device) for k, v in next(source).items()})
            (caption_loss + short_loss).backward()
            torch.nn.utils.clip_grad_norm_(projector + lora, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            line = {
                "step": step,
                "caption": round(caption_loss.item(), 4),
                "yes_no": round(short_loss.item(), 4),
                "seconds": round(time.time() - started),
            }
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            if step % 10 == 0 or step == options.steps:
                log(line, flush=True)
            if step % 50 == 0 or step == options.steps:
                save(model, out / "adapter.safetensors", facts | {"trained_steps": before + step})
    return model, processor


def restore(model: Any, file: Path) -> dict[str, Any]:
    """Puts a saved projector and LoRA into a model with adapters; returns the facts of the file."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            target = parameters.get(name)
            (parameters[f"{name}.default.weight"] if target is None else target).copy_(tensor)
    with safe_open(file, "pt") as opened:
        facts: dict[str, Any] = json.loads(opened.metadata()["facts"])
    return facts


def save(model: Any, file: Path, facts: dict[str, Any]) -> None:
    """Projector and LoRA in bfloat16, named by the module they belong to (`llava.merge`)."""
    from safetensors.torch import save_file

    weights = {}
    for name, parameter in model.named_parameters():
        if name.startswith(llava.PROJECTOR):
            weights[name] = parameter
        elif "lora_" in name:  # PATH.lora_A.default.weight
            weights[name.replace(".default.weight", "")] = parameter
    cast = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in weights.items()}
    save_file(cast, file, metadata={"facts": json.dumps(facts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/llava")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1.0, help="factor on both learning rates")
    parser.add_argument(
        "--resume", help="adapter.safetensors to go on from, with new scenes and without stage 0"
    )
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--align-scenes", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--install", action="store_true", help="make the result the one that the package ships"
    )
    options = parser.parse_args()
    train(options)
    if options.install:
        shutil.copy(Path(options.out) / "adapter.safetensors", llava.WEIGHTS)


if __name__ == "__main__":
    main()
