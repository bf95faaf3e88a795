"""One rank of the tensor-parallel test of `test_devices.py`, under ``torch.distributed.run``; prints lines with ">"."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

import hf_attn_patch as hap
from hf_attn_patch.errors import AdapterError, ModelMismatchError, SelectionError
from hf_attn_patch.model.sites import find_sites

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PLAN = {"alphas": [[2.0 + 3 * h for h in range(8)], [9.0 - h for h in range(8)]], "betas": [[0.0] * 8] * 2}
GATES = [[0.1 * h for h in range(8)], [1.0 - 0.1 * h for h in range(8)]]
HEADS = {"heads": [{"layer": 0, "head": 6}, {"layer": 1, "head": 1, "kind": "kv"}, {"layer": 1, "head": 7}]}
PATTERNS = [{str(h): ["vertical_and_slash", 1 + h, 1, 1.0] for h in range(8)}] * 2
CASES = [
    ("streaming", {"sinks": 1, "window": 4}),
    ("streaming", {"sinks": 1, "window": 3, "heads": [1, 6]}),
    ("streaming", {"sinks": 0, "window": 9, "heads": {"0-2": {"window": 2}, "7": {"window": 4}}}),
    ("streaming", {"sinks": 0, "window": 2, "heads": [7]}),  # no head of rank 0
    ("streaming", {"sinks": 0, "window": 2, "layers": {0: {"window": 5}, 1: {}}}),
    ("moa", {"plan": PLAN, "sinks": 1, "block": 1, "smallest": 2, "length": 64}),
    ("duo", {"alphas": [[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.7, 0.3]], "sinks": 1, "window": 2}),
    ("duo", {"alphas": HEADS, "sinks": 1, "window": 2}),
    ("head_gate", {"gate": 0.5}),
    ("head_gate", {"gate": GATES}),
    ("head_gate", {"gate": GATES[0], "heads": [0, 3, 5]}),
    ("retrieval_mask", {"head_set": HEADS}),
    ("pasta", {"head_config": HEADS, "marked": [[1, 5]], "alpha": 0.05}),
    ("entropy_scale", {"train_length": 4}),
    ("block_topk", {"block": 4, "topk": 2}),
    ("vertical_slash", {"patterns": PATTERNS, "sinks": 1, "recent": 2, "last": 4}),
]
REFUSED = [("moh", {}), ("s2", {}), ("head_gate", {"gate": 0.5, "trainable_gate": True})]


def run(model, ids, cached: bool):
    with torch.no_grad():
        if not cached:
            return model(ids, use_cache=False).logits
        out = model.generate(
            ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids), output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    split = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto")
    ids = torch.randint(5, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    lines = [f"heads {find_sites(split)[0]}"]
    for name, options in CASES:
        for cached in (False, True):
            with hap.patched(full, name, **options):
                want = run(full, ids, cached)
            with hap.patched(split, name, **options) as handle:
                torch.testing.assert_close(run(split, ids, cached), want)
                assert handle.sites[0].num_heads == 8 and handle.config.name == name
            lines.append(f"{name} equal")
    for name, options in REFUSED:
        try:
            hap.patch(split, name, **options)
            lines.append(f"{name} taken")
        except ModelMismatchError as error:
            lines.append(f"{name} refused: {error}")
    with hap.patched(split, "head_gate", gate=0.5) as handle:
        try:
            handle.save(folder)
        except AdapterError as error:
            lines.append(f"save: {error}")
    try:
        hap.patch(split, "streaming", heads=[8])
    except SelectionError as error:
        lines.append(f"selection: {error}")
    split._tp_plan = {**split._tp_plan, "model.norm": "sequence_parallel"}
    try:
        hap.patch(split, "streaming")
    except ModelMismatchError as error:
        lines.append(f"streaming: {error}")
    if dist.get_rank() == 0:
        print("\n".join(f"> {line}" for line in lines), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
