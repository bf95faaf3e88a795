"""The language-model half of the demo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .. import measurements, pictures
from ..harness import DENSE, evaluating, run
from ..passkey import Passkey
from ..perplexity import Perplexity
from .common import Choice, Size, Step, column, follow, part, rounds, row, state
from .plan import demo_plan

DRAWN = ["perplexity", "passkey", "kv_bytes", "prefill"]
NOTE = (
    "Below each number: 95 % interval of its difference to dense (paired bootstrap over items), or the ratio to dense. "
    "The weights are de-quantised from 4 bits and the prose comes with Python: perplexities compare with each other, "
    "not with those of other texts."
)


def plan_file() -> Path:
    """The per-head plan for SmolLM2-135M that ships with the package."""
    return Path(str(resources.files("hf_attn_patch.patches") / "plans" / "smollm2-demo.json"))


def choices(model: Any, tokenizer: Any, folder: Path) -> dict[str, Choice]:
    """The patches the model is shown with, by label; a plan is made and kept in `folder` if none ships."""
    plan = plan_file()
    if not plan.is_file():
        plan = folder / "moa-plan.json"
        folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps(demo_plan(model, tokenizer)) + "\n", encoding="utf-8")
    return {
        "streaming, 4 sinks": ("streaming", {"sinks": 4, "window": 256}),
        "streaming, no sinks": ("streaming", {"sinks": 0, "window": 256}),
        "moa, per-head plan": ("moa", {"plan": str(plan)}),
    }


def measure(
    model: Any, tokenizer: Any, patches: Mapping[str, Choice], size: Size, seed: int, step: Step
) -> dict[str, Any]:
    """Perplexity, passkey retrieval, prefill speed and KV bytes of `model`, dense and with each patch."""
    several, length = len(patches) + 1, size.prefill_tokens
    common: dict[str, Any] = {"patches": patches, "seed": seed}
    quality = run(
        Perplexity(size.perplexity_tokens, size.perplexity_tokens),
        model,
        tokenizer,
        progress=follow(step, "perplexity", several),
        **common,
    )
    passkey = run(
        Passkey(size.passkey_lengths, size.passkey_depths),
        model,
        tokenizer,
        progress=follow(step, "passkey", several),
        **common,
    )
    seconds, held, seen = prefills(model, tokenizer, patches, size, step)
    rows = []
    for label in [DENSE, *patches]:
        by_length = passkey[label].by_group["accuracy"]
        values = {
            "perplexity": quality[label].aggregates["perplexity"],
            **{f"passkey_{n}": by_length[str(n)] for n in size.passkey_lengths},
            "passkey": passkey[label].aggregates["accuracy"],
            "prefill": length / statistics.median(seconds[label]),
            "kv_bytes": held[label] / 2**20,
        }
        rows.append(row(label, patches.get(label), values, seen.get(label)))
    timings = {"prefill_seconds": seconds, "kv_bytes": held}
    made = part(model, "", columns(size), rows, [quality, passkey], timings, seen)
    return {**made, "drawn": DRAWN, "notes": [NOTE]}


def prefills(
    model: Any, tokenizer: Any, patches: Mapping[str, Choice], size: Size, step: Step
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, dict[str, Any]]]:
    """(seconds per round, bytes of the filled cache, what was read) by label."""
    ids = measurements.prose_ids(tokenizer, size.prefill_tokens)
    held: dict[str, int] = {}
    seen: dict[str, dict[str, Any]] = {}

    def once(label: str, choice: Choice | None) -> float:
        with state(model, choice) as handle:
            seconds, cache = measurements.prefill(model, ids)
            held[label] = measurements.cache_nbytes(cache)
            if handle is not None and label not in seen:
                seen[label] = pictures.language(handle, size.prefill_tokens)
        return seconds

    with evaluating(model):
        measurements.prefill(model, ids[:, :256])
        what = f"prefill of {size.prefill_tokens} tokens"
        return rounds(patches, once, size.rounds, what, step), held, seen


def columns(size: Size) -> list[dict[str, Any]]:
    """Columns of the table."""
    depths, length = len(size.passkey_depths), size.prefill_tokens
    texts = f"{size.perplexity_tokens} tokens of English prose, one context"
    where = f"tokens at {depths} depths, through generate() and its cache"
    passkeys = [
        column(
            f"passkey_{n}", f"passkey {n / 1000:g}k", "of", "higher", 0, f"hidden number found in {n} {where}"
        )
        | {"of": depths}
        for n in size.passkey_lengths
    ]
    return [
        column("perplexity", "perplexity", "", "lower", 2, texts),
        *passkeys,
        column("passkey", "passkey, all", "%", "higher", 0, f"all {depths * len(passkeys)} prompts"),
        column(
            "prefill",
            "prefill tokens/s",
            "",
            "higher",
            0,
            f"{length} tokens, median of {size.rounds}, in turns",
        ),
        column(
            "kv_bytes", "KV cache, MiB", "MiB", "lower", 1, f"held by the cache object after {length} tokens"
        ),
        column(
            "density", "pairs read", "%", "none", 1, f"of the causal (query, key) pairs of {length} tokens"
        ),
    ]
