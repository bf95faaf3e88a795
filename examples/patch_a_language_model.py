"""Patch a language model, look at what changed, measure it, undo it.

python examples/patch_a_language_model.py                # SmolLM2-135M from the testbed (a PyPI wheel, no hub)
python examples/patch_a_language_model.py org/model      # any causal LM of the hub, or a local folder
"""

import sys

import torch

import hf_attn_patch as hap
from hf_attn_patch import testbed


def main() -> None:
    if len(sys.argv) > 1:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    else:
        model, tokenizer = testbed.load("smollm2")

    prompt = tokenizer("The three primary colours are", return_tensors="pt")
    with torch.no_grad():
        before = model(**prompt).logits

    print(
        hap.plan(model, "streaming", sinks=4, window=64).to_dict()["untouched_sites"],
        "sites would stay as they are",
    )
    with hap.patched(model, "streaming", sinks=4, window=64) as handle:
        out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(out[0], skip_special_tokens=True))
        print(handle.report())

    with torch.no_grad():
        after = model(**prompt).logits
    print("largest difference after undo:", float((after - before).abs().max()))


if __name__ == "__main__":
    main()
