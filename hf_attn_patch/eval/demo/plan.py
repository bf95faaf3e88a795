"""A per-head `moa` plan for the demo, from two looks at the dense model. Not the calibration of the MoA paper.

Heads whose attention goes back to a hidden number when the model is about to say it keep everything (they retrieve);
heads that look far on plain prose keep a quarter of the length; the rest keep a short window.

    python -m hf_attn_patch.eval.demo.plan > hf_attn_patch/patches/plans/smollm2-demo.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..harness import evaluating
from ..measurements import prose_ids
from ..passkey import Passkey

EVERYTHING, QUARTER, SHORT = (
    (0.0, 1.0),
    (0.0, 0.25),
    (256.0, 0.0),
)  # (alpha, beta): span = alpha + beta * length


def demo_plan(
    model: Any,
    tokenizer: Any,
    *,
    retrieves: float = 0.1,
    looks_far: float = 0.5,
    length: int = 900,
    seed: int = 1,
) -> dict[str, Any]:
    """Plan in the official format, one rule per query head (all heads of a KV head alike).

    Args:
        retrieves: share of attention on the needle from which a KV head keeps everything.
        looks_far: share of attention on keys that neither 64 sinks nor 192 recent tokens hold, from which a KV head
            keeps a quarter. length, seed: of the needle prompts; the seed differs from that of the demo's own prompts.
    """
    needle, far = head_scores(model, tokenizer, length, seed)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    rules = [
        [
            EVERYTHING if n >= retrieves else QUARTER if f >= looks_far else SHORT
            for n, f in zip(in_needle, in_far)
            for _ in range(heads // kv_heads)
        ]
        for in_needle, in_far in zip(needle, far)
    ]
    return {
        "alphas": [[alpha for alpha, _ in row] for row in rules],
        "betas": [[beta for _, beta in row] for row in rules],
    }


def head_scores(
    model: Any, tokenizer: Any, length: int, seed: int
) -> tuple[list[list[float]], list[list[float]]]:
    """(needle, far): share of attention per layer and KV head, the largest of its query heads."""
    import torch

    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns probabilities
    try:
        with evaluating(model), torch.inference_mode():
            prompts = Passkey((length,), (0.1, 0.3, 0.5, 0.7)).haystacks(tokenizer, seed)
            answers = [_needle_mass(model, tokenizer, p) for p in prompts]
            needle = torch.stack(answers).mean(0)
            ids = prose_ids(tokenizer, 1024)
            attention = model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(previous)
    q, k = torch.arange(1024)[:, None], torch.arange(1024)[None]
    outside = (k >= 64) & (k <= q - 192)
    far = torch.stack([(a[0] * outside).sum(-1)[:, 512:].mean(-1) for a in attention])
    kv_heads = model.config.num_key_value_heads
    per_kv = lambda x: x.unflatten(-1, (kv_heads, -1)).amax(-1).tolist()
    return per_kv(needle), per_kv(far)


def _needle_mass(model: Any, tokenizer: Any, prompt: Any) -> Any:
    """Attention on the needle from the tokens that say the number: float [layers, query heads]."""
    import torch

    answer = tokenizer(f" {prompt.key}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt.ids, answer], 1)
    end = prompt.ids.shape[1]
    columns = needle_columns(ids[0, :end].tolist(), answer[0].tolist()[-len(prompt.key) :])
    attention = model(ids, output_attentions=True, use_cache=False).attentions
    rows = slice(end - 1, ids.shape[1] - 1)
    return torch.stack([a[0, :, rows][:, :, columns].sum(-1).mean(-1) for a in attention])


def needle_columns(tokens: Sequence[int], digits: Sequence[int], before: int = 6) -> list[int]:
    """Columns of every occurrence of `digits`, and of the `before` tokens that announce each."""
    starts = [
        i for i in range(len(tokens) - len(digits) + 1) if list(tokens[i : i + len(digits)]) == list(digits)
    ]
    return sorted({c for i in starts for c in range(max(i - before, 0), i + len(digits))})


if __name__ == "__main__":
    from ... import testbed

    print(json.dumps(demo_plan(*testbed.load("smollm2"))))
